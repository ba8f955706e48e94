"""Where fixed cameras say that something moves, against the world's own motion."""

import pytest
import torch

from custom.fourd.data.dynerf_datamodule import DyNeRFDataModule
from custom.fourd.data.motion_hull import changing_pixels, has_fixed_cameras, moving_share
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.motion import object_poses
from custom.fourd.world.writers import write_dynerf


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """A small cube that slides past a sphere at rest."""
    folder = tmp_path_factory.mktemp("film")
    scene = parse_caption("a small green cube sliding next to a purple sphere")
    write_dynerf(folder, scene, 5, 6, 48)
    keys = {"dataroot": str(folder), "space": "world", "normalise": "none"}
    return scene, DyNeRFDataModule(keys).scene


def test_what_slides_may_move_and_what_rests_does_not(film):
    """The middle of the cube is green all the time, so only where its ends pass by changes."""
    scene, frames = film
    rotation, centre, scale = object_poses(scene, torch.linspace(0, 1, 6))[0]
    ends = centre[:, None] + scale[:, None, None] * torch.tensor([[0.0, 0.9, 0.0], [0, -0.9, 0]])
    assert (centre - centre[0]).norm(dim=-1).max() > 0.05, "the cube does move"
    assert float(moving_share(ends.flatten(0, 1), frames).min()) >= 0.5
    sphere = object_poses(scene, torch.zeros(1))[1][1]
    inside = sphere + torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.15], [0.0, 0.0, -0.15]])
    assert float(moving_share(inside, frames).max()) < 0.5


def test_what_no_camera_sees_may_move(film):
    behind = film[1].c2w[:1, :3, 3] * 3
    assert moving_share(behind, film[1]).tolist() == [1.0]


def test_slow_changes_count_and_noise_does_not(film):
    frames = film[1]
    camera = frames.cameras()[1]
    rows = frames.camera_rows(camera)
    kept = frames.frames[rows].clone()
    try:
        frames.frames[rows] = 128
        for step, row in enumerate(rows.tolist()):
            frames.frames[row, 10, 20] = 128 + 4 * step  # never 10/255 from frame to frame
            frames.frames[row, 30, 20] = 128 + 8 * (step % 2)  # a range of 8/255
        changes = changing_pixels(frames, camera, margin_px=1)
        assert changes.nonzero().amin(dim=0).tolist() == [9, 19]
        assert changes.nonzero().amax(dim=0).tolist() == [11, 21] and int(changes.sum()) == 9
    finally:
        frames.frames[rows] = kept


def test_a_camera_that_moves_is_refused(film):
    frames = film[1]
    row, kept = int(frames.train_rows()[1]), frames.c2w.clone()
    matrices = frames.intrinsics.clone()
    assert has_fixed_cameras(frames)
    try:
        frames.c2w[row, 0, 3] += 0.1
        assert not has_fixed_cameras(frames)
        with pytest.raises(ValueError, match="moves, so what changes .* expected fixed cameras"):
            moving_share(torch.zeros(1, 3), frames)
        frames.c2w.copy_(kept)
        frames.intrinsics[row, 0, 0] += 1.0
        assert not has_fixed_cameras(frames), "it zooms"
    finally:
        frames.c2w.copy_(kept)
        frames.intrinsics.copy_(matrices)
