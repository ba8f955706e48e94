"""Which file and line a key comes from."""

from threestudio.utils.config_origins import key_origins, with_overrides, with_profile


def test_lines_of_a_file_over_those_of_its_includes(tmp_path):
    (tmp_path / "blocks.yaml").write_text("models:\n  sd: x\nseed: 1\n")
    config = tmp_path / "run.yaml"
    config.write_text(
        "include: [blocks.yaml]\nseed: 2\nsystem:\n  geometry:\n    radius: 1\n"
        "profiles:\n  test:\n    system:\n      geometry:\n        radius: 2\n"
    )
    origins = key_origins(config, tmp_path)
    assert origins["seed"] == f"{config}:2"
    assert origins["models.sd"] == f"{tmp_path / 'blocks.yaml'}:2"
    assert origins["system.geometry.radius"] == f"{config}:5"
    in_profile = with_profile(origins, "test")
    assert in_profile["system.geometry.radius"] == f"{config}:10"
    overridden = with_overrides(in_profile, ["system.geometry"])
    assert overridden["system.geometry"] == "command line"
    assert "system.geometry.radius" not in overridden


def test_a_file_that_includes_itself_ends(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("include: run.yaml\nseed: 2\n")
    assert key_origins(config, tmp_path)["seed"] == f"{config}:2"
