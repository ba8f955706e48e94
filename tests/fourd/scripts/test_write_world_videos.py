"""The command that writes videos of the world."""

import pytest
import threestudio

import custom.fourd  # noqa: F401 - registers the names
from custom.fourd.scripts.write_world_videos import main


def test_the_folder_is_read_as_videos_and_never_overwritten(tmp_path, capsys):
    folder = tmp_path / "world"
    sizes = ["--cameras", "2", "--times", "2", "--size", "16"]
    assert main([str(folder), "--caption", "a red cube sliding", *sizes]) == 0
    assert "2 videos of 2 frames" in capsys.readouterr().out
    scene = threestudio.find("dynerf-datamodule")({"dataroot": str(folder)}).scene
    assert (len(scene), scene.height, int(scene.held_out.sum())) == (4, 16, 2)
    assert main([str(folder), *sizes]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--times", "1"], "--times is 1; expected at least 2"), (["--caption", "a red cat"], "cat")],
)
def test_what_cannot_work_is_named(tmp_path, capsys, options, message):
    assert main([str(tmp_path / "new"), *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "new").exists()
