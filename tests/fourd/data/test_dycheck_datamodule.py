"""DyCheck folders: the world's truth comes back with depth and masks; refusals."""

import json
import shutil

import numpy as np
import pytest
import threestudio
import torch
from PIL import Image

from custom.fourd.ops.camera import camera_rays
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.writers import write_dycheck
from tests.fixtures import world_reference as reference


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "world"
    scene = parse_caption("a red cube sliding next to a blue sphere")
    return folder, write_dycheck(folder, scene, n_times=6, size_px=32)


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written[0], tmp_path / "scene")
    return tmp_path / "scene"


def module(folder, **keys):
    return threestudio.find("dycheck-datamodule")({"dataroot": str(folder)} | keys)


def test_the_world_comes_back(written):
    folder, capture = written
    scene = module(folder).scene
    assert torch.equal(scene.frames, capture.frames())
    assert torch.allclose(scene.c2w, capture.c2w, atol=1e-5)
    assert torch.equal(scene.camera_ids, capture.camera_ids)
    assert torch.equal(scene.held_out, capture.camera_ids > 0)
    assert torch.allclose(scene.frame_times, capture.frame_times)
    assert (scene.near, scene.far) == pytest.approx(capture.bounds)
    # The file's world is twice as large and shifted.
    back = scene.c2w[3, :3, 3] @ scene.file_from_scene[:3, :3].T + scene.file_from_scene[:3, 3]
    camera = json.loads((folder / "camera" / "0_00003.json").read_text())
    assert back.tolist() == pytest.approx(camera["position"], abs=1e-5)


def test_depth_ends_on_the_surfaces_of_the_slow_reference(written):
    folder, capture = written
    scene = module(folder).scene
    assert not scene.depth[scene.held_out].any()
    rays_o, rays_d = camera_rays(scene.c2w, scene.intrinsics, 32, 32)
    for row in (0, 4):
        seen = scene.depth[row] > 0
        assert int(seen.sum()) > 60
        time = float(scene.frame_times[row])
        before, behind = (
            (rays_o + (scene.depth[..., None] + step) * rays_d)[row][seen] for step in (-1e-3, 1e-3)
        )
        assert bool((reference.occupant(capture.scene, time, before) < 0).all())
        inside = reference.occupant(capture.scene, time, behind) >= 0
        assert float(inside.float().mean()) > 0.97, "rays along a face leave it at once"


def test_masks_are_of_validation_frames(written):
    scene = module(written[0]).scene
    assert bool((scene.masks[~scene.held_out] == 255).all())
    seen = scene.masks[scene.held_out]
    assert set(seen.unique().tolist()) == {0, 255}
    assert 0.7 < float((seen > 0).float().mean()) < 1.0
    bare = module(written[0], use_masks=False, use_depth=False).scene
    assert bare.masks is None and bare.depth is None


def test_training_reads_the_train_split_alone(written):
    data = module(written[0], batch_size=32, frame_list="1:4", downsample=2)
    data.setup()
    scene = data.scene
    assert scene.times() == [1, 2, 3] and len(scene) == 9
    assert scene.frame_times[:3].tolist() == pytest.approx([0.2, 0.4, 0.6])
    assert scene.frames.shape[1:3] == scene.depth.shape[1:] == scene.masks.shape[1:] == (16, 16)
    batch = next(iter(data.train_dataloader()))
    assert bool((scene.camera_ids[batch["index"]] == 0).all())
    assert len(data.test_dataset) == 6 and data.test_dataset[0]["mask"].shape == (1, 16, 16, 1)


def test_a_hand_made_camera(folder):
    """Camera at (0, 0, -2) of a world whose y points down, looking along +z: OpenCV's own axes."""
    path = folder / "camera" / "0_00000.json"
    facts = json.loads(path.read_text())
    facts |= {"orientation": np.eye(3).tolist(), "position": [0.5, -0.25, -1.875]}
    facts |= {"focal_length": 40.0, "pixel_aspect_ratio": 1.5, "principal_point": [15.0, 17.0]}
    path.write_text(json.dumps(facts))
    scene = module(folder, downsample=2).scene
    # Right stays, up is -down, backward is -forward; (p - center) * scale with scale 0.5.
    assert torch.equal(scene.c2w[0, :3, :3], torch.diag(torch.tensor([1.0, -1.0, -1.0])))
    assert scene.c2w[0, :3, 3].tolist() == [0.0, 0.0, -1.0]
    assert scene.intrinsics[0].tolist() == [[20.0, 0.0, 7.5], [0.0, 30.0, 8.5], [0.0, 0.0, 1.0]]


def test_a_sequence_of_one_camera_has_no_validation(folder):
    (folder / "splits" / "val.json").unlink()
    scene = module(folder).scene
    assert len(scene) == 6 and not scene.held_out.any()


def camera_facts(folder, **facts):
    path = folder / "camera" / "0_00002.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def drop_key(folder):
    path = folder / "camera" / "0_00002.json"
    facts = json.loads(path.read_text())
    facts.pop("focal_length")
    path.write_text(json.dumps(facts))


def short_split(folder):
    path = folder / "splits" / "train.json"
    facts = json.loads(path.read_text())
    facts["time_ids"].pop()
    path.write_text(json.dumps(facts))


BROKEN = [
    (lambda f: (f / "camera" / "0_00002.json").unlink(), "0_00002.json is missing"),
    (drop_key, r"0_00002.json is no camera \(KeyError\('focal_length'\)\)"),
    (lambda f: camera_facts(f, position=[float("nan")] * 3), "0_00002.json: its pose holds NaN"),
    (
        lambda f: camera_facts(f, orientation=[[1, 0, 0], [0, 1, 1], [0, 0, 1]]),
        "0_00002.json: the rotation of its pose is not orthonormal",
    ),
    (lambda f: camera_facts(f, position=[0, 0]), r"position \(2,\); expected 3 x 3 and 3 numbers"),
    (lambda f: camera_facts(f, skew=0.1), "0_00002.json: its lens has skew or distortion"),
    (
        lambda f: camera_facts(f, radial_distortion=[0.1, 0, 0]),
        "0_00002.json: its lens has skew or distortion",
    ),
    (lambda f: (f / "rgb" / "1x" / "1_00003.png").unlink(), "1_00003.png is missing"),
    (short_split, "train.json has 6 frame_names, 6 camera_ids and 5 time_ids"),
    (lambda f: (f / "splits" / "train.json").unlink(), "train.json is missing"),
    (lambda f: (f / "scene.json").write_text("{}"), r"scene.json is no scene \(KeyError"),
    (
        lambda f: (f / "scene.json").write_text(
            '{"scale": 0, "center": [0, 0, 0], "near": 1, "far": 2}'
        ),
        "scene.json: scale is 0.0",
    ),
]


@pytest.mark.parametrize("damage, message", BROKEN, ids=[message[:30] for _, message in BROKEN])
def test_broken_folders_are_refused_at_the_door(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        module(folder)


def test_what_shows_only_in_the_pictures_is_refused_when_they_are_read(folder):
    Image.new("RGB", (24, 32)).save(folder / "rgb" / "1x" / "1_00003.png")
    with pytest.raises(ValueError, match="1_00003.png is 24 x 32 pixels; expected 32 x 32"):
        _ = module(folder).scene
    Image.new("RGB", (32, 32)).save(folder / "rgb" / "1x" / "1_00003.png")
    (folder / "depth" / "1x" / "0_00001.npy").unlink()
    with pytest.raises(ValueError, match="0_00001.npy is missing; set data.use_depth: false"):
        _ = module(folder).scene
    (folder / "covisible" / "1x" / "val" / "1_00003.png").unlink()
    with pytest.raises(ValueError, match="1_00003.png is missing; expected a picture"):
        _ = module(folder, use_depth=False).scene
