"""A scene trained by our own stages as cells: its renders, live and through a grid on disk."""

import math
import shutil

import pytest
import torch

from custom.fourd.data.grid_cells import GridCells, write_grid
from custom.fourd.data.pair_cells import orbit_cameras, scene_times
from custom.fourd.data.scene_cells import SceneCells
from custom.fourd.ops.camera import camera_from_orbit
from custom.fourd.renderers.scene import load_scene
from tests.fixtures.launched import (
    STAGE_1,
    launch,
    need_embedded_model,
    tiny_video_prior,
    trained,
)
from tests.fixtures.tiny_scenes import random_scene

STAGE_3 = "custom/configs/fourdfy_stage_3.yaml"
TIMES = scene_times(3, False)
CAMERAS = orbit_cameras([20.0], [0.0, 100.0], 3.0, 40.0)


@pytest.fixture(scope="module")
def checkpoint():
    run = trained(STAGE_3)
    assert run.status == 0, run.errors
    return run.checkpoint


def cells(path, size=(18, 14)):
    source = SceneCells(path, "mine", TIMES, CAMERAS, *size)
    source.prepare()
    return source


def assert_live_is_grid(checkpoint, folder):
    live = cells(checkpoint)
    write_grid(folder, live, {"kind": "scene"})
    grid, again = GridCells(folder, 18, 14), cells(checkpoint)
    assert grid.caption == live.caption == "a red cube next to a blue sphere bouncing"
    seen = []
    for camera_id in (1, 0):  # in another order than the grid's, by a scene loaded anew
        for time_id in (2, 0, 1):
            cell = again.read_cell(time_id, camera_id)
            assert torch.equal(cell, grid.read_cell(time_id, camera_id))
            seen.append(cell)
    assert not torch.equal(seen[0], seen[3])


def test_a_trained_scene_gives_the_same_pixels_live_and_through_a_grid(checkpoint, tmp_path):
    assert_live_is_grid(checkpoint, tmp_path / "grid")


@pytest.mark.slow
def test_so_does_one_trained_in_a_chain_of_stages(tmp_path):
    """Stages 1 and 3, as a user runs them."""
    need_embedded_model()
    video = [f"2:{override}" for override in tiny_video_prior()]
    run = launch("--train", tmp_path, *video, config=(STAGE_1, STAGE_3))
    assert run.status == 0, run.errors
    assert_live_is_grid(run.checkpoint, tmp_path / "grid")


def test_a_cell_is_the_scene_s_own_render(checkpoint):
    source = cells(checkpoint)
    c2w = camera_from_orbit(torch.tensor([20.0]), torch.tensor([100.0]), 3.0)
    fovy, grey = torch.tensor([math.radians(40)]), torch.full((3,), 0.4)
    images = load_scene(checkpoint).render(c2w, fovy, 18, 14, TIMES[2:], background=grey)
    values = source.read_cell(2, 1).float() / 255
    rgb = values[..., :3] + (1 - values[..., 3:]) * grey
    # Half a level of colour, and 0.4 of half a level of alpha.
    assert (rgb - images.rgb[0]).abs().max() <= 0.7 / 255 + 1e-5
    assert (values[..., 3:] - images.alpha[0]).abs().max() <= 0.5 / 255 + 1e-5


@pytest.fixture
def moving(tmp_path):
    path = tmp_path / "moving.safetensors"
    random_scene().save(path)
    return path


def test_an_exported_scene_moves_with_time_and_view(moving):
    source = cells(moving)
    first = source.read_cell(0, 0)
    assert not torch.equal(first, source.read_cell(1, 0))
    assert not torch.equal(first, source.read_cell(0, 1))
    assert torch.equal(first, source.read_cell(0, 0))
    # Its own background is blue; the cell is colour times alpha alone.
    assert bool((first[..., :3].amax(-1).int() <= first[..., 3].int() + 1).all())
    assert 10 < first[..., 3].float().mean() < 250


def test_words_of_the_scene_yield_to_given_ones(moving):
    source = SceneCells(moving, "mine", TIMES, CAMERAS, 4, 4)
    source.caption = "my own words"
    source.prepare()
    assert source.caption == "my own words"
    assert cells(moving).caption == "a <ball> & a cube"


def test_a_damaged_checkpoint_is_refused_when_it_is_loaded(moving, tmp_path):
    broken = tmp_path / "broken.safetensors"
    shutil.copy(moving, broken)
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"broken\.safetensors"):
        cells(broken)
