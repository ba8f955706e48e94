"""Which reader takes which source."""

import pytest
import torch

from custom.fourd.data.open_scene import open_scene, reader_name
from custom.fourd.world.capture import path_capture, rig_capture
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.writers import write_dycheck, write_dynerf, write_transforms, write_video

SCENE = parse_caption("a red cube sliding")


def test_every_kind_of_source_is_read_in_the_world_it_was_filmed_in(tmp_path):
    truths = {
        "dynerf": write_dynerf(tmp_path / "dynerf", SCENE, n_cameras=2, n_times=2, size_px=32),
        "dycheck": write_dycheck(tmp_path / "dycheck", SCENE, n_times=3, size_px=32, n_val=1),
    }
    capture = rig_capture(SCENE, torch.tensor([0.0, 20.0]), 2, 16)
    write_transforms(tmp_path / "posed", capture)
    truths["posed"] = truths["posed/transforms.json"] = capture
    truths["clip.mp4"] = path_capture(SCENE, 3, 32)
    write_video(tmp_path / "clip.mp4", truths["clip.mp4"])
    for name, truth in truths.items():
        scene = open_scene(tmp_path / name)
        assert torch.allclose(scene.c2w, truth.c2w, atol=1e-4), name
        assert torch.equal(scene.time_ids, truth.time_ids), name
    assert len(open_scene(tmp_path / "clip.mp4", frame_list="0:2", downsample=2)) == 2
    assert reader_name(tmp_path / "posed" / "images") == "video-file-datamodule"


def test_what_no_reader_takes_is_refused_with_what_they_do(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "one.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "gone": "gone does not exist; expected a folder with poses_bounds.npy",
        "notes.txt": "notes.txt is nothing that can be read; expected a folder with poses_b",
        "one.png": "one.png is a single picture; expected a folder",
        "empty": "empty is nothing that can be read",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_scene(tmp_path / name)
