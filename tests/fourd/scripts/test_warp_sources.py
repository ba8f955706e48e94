"""What the warping tools read: `warp_sources`."""

import pytest
import torch

from custom.fourd.data.open_scene import open_scene
from custom.fourd.scripts.warp_sources import (
    content_hash,
    named_rows,
    original,
    picked_times,
    read_edited,
    scene_depth,
)
from custom.fourd.world.capture import path_capture, rig_capture
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.writers import write_transforms, write_video

SCENE = parse_caption("a red cube sliding")


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    root = tmp_path_factory.mktemp("rig") / "posed"
    capture = rig_capture(SCENE, torch.tensor([0.0, 20.0]), 3, 24)
    write_transforms(root, capture)
    return root, capture, open_scene(root)


def test_views_and_times_are_found_by_their_ids(rig):
    _, _, scene = rig
    assert named_rows(scene, ["0", "1@2", "1"], None) == [0, 5, 3]
    assert named_rows(scene, ["0", "1@2"], 1) == [1, 5]
    assert picked_times(scene, None, None, None) == (0, 0, [1, 2])
    assert picked_times(scene, 1, 2, None) == (1, 2, [0, 1])
    assert picked_times(scene, 1, 2, [0]) == (1, 2, [0])
    for view in ("x", "1@", "@1", "1@y", "0.5"):
        with pytest.raises(ValueError, match="is neither CAMERA nor CAMERA@TIME"):
            named_rows(scene, [view], None)


def test_the_truth_of_a_rig_and_of_a_video_is_their_depth(rig, tmp_path):
    root, capture, scene = rig
    assert torch.allclose(scene_depth(root, scene, None, False), capture.render()[1], atol=1e-4)
    moving = path_capture(SCENE, 2, 32)
    write_video(tmp_path / "clip.mp4", moving)
    found = scene_depth(tmp_path / "clip.mp4", open_scene(tmp_path / "clip.mp4"), None, False)
    assert torch.allclose(found, moving.render()[1], atol=1e-4)
    half = open_scene(root, downsample=2)
    assert scene_depth(root, half, None, False).shape == (6, 12, 12)


def test_truth_of_other_cameras_is_refused(rig, tmp_path):
    root, _, _ = rig
    scene = open_scene(root)
    scene.intrinsics = scene.intrinsics * torch.tensor([2.0, 2.0, 1.0])[:, None]
    with pytest.raises(ValueError, match="world.json has another field of view than the cameras"):
        scene_depth(root, scene, None, False)


def test_pictures_are_floats_and_their_content_is_their_name(rig):
    root, capture, scene = rig
    image = original(scene, 4)
    assert torch.equal((image * 255).round().to(torch.uint8), capture.frames()[4])
    path = sorted((root / "images").glob("*.png"))[4]
    assert torch.equal(read_edited(path, scene), image)
    assert content_hash(image) == content_hash(image.clone()) != content_hash(image + 1e-6)
