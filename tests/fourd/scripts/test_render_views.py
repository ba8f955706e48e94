"""The command that writes the training views."""

import torch

from custom.fourd.scripts.render_views import main
from custom.fourd.scripts.world_views import load_groups


def test_views_are_written_once_and_alike_from_one_seed(tmp_path, capsys):
    sizes = ["--single", "2", "--pair", "1"]
    assert main(["--work", str(tmp_path / "a"), *sizes]) == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["views_1_0.pt", "views_2_0.pt"], "no half-written file is left"
    lone, pair = (load_groups(tmp_path / "a" / name) for name in files)
    assert lone.layers.shape == (2, 4, 2, 1, 64, 64) and pair.layers.shape == (1, 4, 2, 2, 64, 64)

    stamp = (tmp_path / "a" / files[0]).stat().st_mtime_ns
    assert main(["--work", str(tmp_path / "a"), "--single", "9", "--pair", "9"]) == 0
    assert capsys.readouterr().out.count("exists; kept") == 2
    assert (tmp_path / "a" / files[0]).stat().st_mtime_ns == stamp

    assert main(["--work", str(tmp_path / "b"), *sizes]) == 0
    assert torch.equal(load_groups(tmp_path / "b" / files[0]).layers, lone.layers)
    assert main(["--work", str(tmp_path / "b"), "--shard", "1", *sizes]) == 0
    other = load_groups(tmp_path / "b" / "views_1_1.pt")
    assert not torch.equal(other.cameras, lone.cameras)
