"""Cells of the world against the exact renderer."""

import pytest
import torch

from custom.fourd.data.pair_cells import orbit_cameras, scene_times
from custom.fourd.data.world_cells import WorldCells
from custom.fourd.world.grammar import CaptionError, parse_caption
from custom.fourd.world.render import render

CAPTION = "a red cube spinning on top of a blue sphere"


def cells(caption=CAPTION, size=(20, 28)):
    cameras = orbit_cameras([15.0, 40.0], [0.0, 75.0], 3.0, 40.0)
    return WorldCells(caption, "scene", scene_times(4, False), cameras, *size)


@pytest.mark.parametrize("time_id, camera_id", [(0, 0), (1, 3), (3, 2)])
def test_a_cell_is_the_exact_renderer_s_picture(time_id, camera_id):
    source = cells()
    cell = source.read_cell(time_id, camera_id)
    camera = {key: value[camera_id : camera_id + 1] for key, value in vars(source.cameras).items()}
    for level in (0.0, 1.0, 0.3):
        background = torch.full((3,), level)
        truth = render(
            parse_caption(CAPTION), camera["c2w"], camera["fovy"], 20, 28,
            torch.tensor([time_id / 4]), background,
        )  # fmt: skip
        values = cell.float() / 255
        rgb = values[..., :3] + (1 - values[..., 3:]) * level
        # Half a level of rounding in the colour and, times the background, in alpha.
        assert (rgb - truth.rgb[0]).abs().max() <= (0.5 + 0.5 * level) / 255 + 1e-6
        assert (values[..., 3:] - truth.alpha[0]).abs().max() <= 0.5 / 255 + 1e-6
    assert 0.05 < values[..., 3].mean() < 0.6


def test_colour_never_exceeds_alpha():
    cell = cells("a yellow sphere").read_cell(0, 0)
    assert bool((cell[..., :3].amax(-1) <= cell[..., 3]).all()) and cell.shape == (20, 28, 4)


def test_other_sentences_are_refused_by_the_word():
    with pytest.raises(CaptionError, match="'zebra' in 'a red zebra' is not a word of the world"):
        cells("a red zebra")
