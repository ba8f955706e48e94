"""The command that decodes videos."""

import pytest
import torch

from custom.fourd.scripts.prepare_video import main, prepare_all
from custom.fourd.world.writers import write_mp4


def test_a_folder_of_videos_becomes_folders_of_pictures(tmp_path, capsys):
    for name in ("cam10", "cam2"):
        write_mp4(tmp_path / f"{name}.mp4", torch.zeros(3, 32, 32, 3, dtype=torch.uint8))
    order = []
    folders = prepare_all(tmp_path, 2, lambda video, done, total: order.append(video.stem))
    assert list(dict.fromkeys(order)) == ["cam2", "cam10"]
    assert [len(list(folder.glob("*.png"))) for folder in folders] == [3, 3]
    assert main([str(tmp_path), "--downsample", "2"]) == 0
    assert "2 videos are ready in" in capsys.readouterr().out
    assert main([str(tmp_path / "cam2.mp4")]) == 0
    assert (tmp_path / "frames_1x" / "cam2" / "000002.png").is_file()


def test_refusals_are_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "gone")]) == 1
    assert "gone does not exist; expected a video" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1
    assert "holds no video" in capsys.readouterr().err
    (tmp_path / "a.mp4").write_bytes(b"cut")
    assert main([str(tmp_path)]) == 1
    assert "a.mp4 is no whole video" in capsys.readouterr().err
    with pytest.raises(ValueError, match="does not exist"):
        prepare_all(tmp_path / "gone", 1, print)
