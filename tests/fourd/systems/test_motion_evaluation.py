"""The grid of cameras and times, and figures whose values are known."""

import json
import math

import pytest
import torch

from custom.fourd.renderers.scene import SceneImages
from custom.fourd.systems.motion_evaluation import (
    Clips,
    ViewTimeGrid,
    film,
    motion_metrics,
    motion_words,
)
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.render import render

GRID = ViewTimeGrid.around(4, 3, 16)


def test_the_grid_is_views_by_times():
    c2w, fovy, times = GRID.cameras()
    assert GRID.shape == (4, 3) and GRID.azimuths_deg == (22.5, 112.5, 202.5, 292.5)
    assert times.tolist() == [0, 0.5, 1] * 4
    assert fovy.tolist() == pytest.approx([math.radians(40)] * 12)
    position = c2w[:, :3, 3]
    assert torch.allclose(position.norm(dim=1), torch.tensor(3.0))
    azimuths = torch.atan2(position[:, 1], position[:, 0]).rad2deg() % 360
    assert azimuths.view(4, 3)[:, 0].tolist() == pytest.approx([22.5, 112.5, 202.5, 292.5])
    assert torch.allclose(position[:, 2], 3 * torch.tensor(15.0).deg2rad().sin())
    assert (c2w.view(4, 3, 4, 4) == c2w.view(4, 3, 4, 4)[:, :1]).all(), "a camera stands still"


@pytest.mark.parametrize(
    ("counts", "named"),
    [((0, 2, 8), "0 azimuths"), ((1, 1, 8), "1 times"), ((1, 2, 0), "0 pixels")],
)
def test_impossible_grids_are_refused(counts, named):
    with pytest.raises(ValueError, match=f"the grid has {named}; expected at least"):
        ViewTimeGrid.around(*counts)


def test_film_takes_each_camera_at_each_time():
    world = parse_caption("a red cube sliding")
    clips = film(world, GRID)
    assert clips.rgb.shape == (4, 3, 16, 16, 3) and clips.alpha.shape == (4, 3, 16, 16, 1)
    c2w, fovy, times = GRID.cameras()
    one = slice(7, 8)  # the third camera's second time
    expected = render(world, c2w[one], fovy[one], 16, 16, times[one], samples_per_axis=3)
    assert torch.equal(clips.rgb[2, 1], expected.rgb[0])


def test_film_of_a_trained_scene_is_over_white():
    """A stand-in that records what it is asked for; real scenes are in test_fourdfy_evaluation."""
    asked = []

    class Recorder:
        def render(self, c2w, fovy, height, width, frame_times, background):
            asked.append((len(c2w), height, width, frame_times.tolist(), background.tolist()))
            shade = frame_times[:, None, None, None].expand(-1, height, width, 3)
            return SceneImages(shade, shade[..., :1], shade[..., :1])

    clips = film(Recorder(), GRID)
    assert [count for count, *_ in asked] == [4, 4, 4]
    assert asked[0] == (4, 16, 16, [0, 0.5, 1, 0], [1, 1, 1])
    assert clips.rgb[:, :, 0, 0, 0].tolist() == [[0, 0.5, 1]] * 4


def test_words_of_a_scene():
    assert motion_words(parse_caption("a red cube")) == []
    both = parse_caption("a red cube bouncing next to a blue sphere spinning")
    assert motion_words(both) == ["bouncing", "spinning"]
    same = parse_caption("a red cube bouncing next to a blue sphere bouncing")
    assert motion_words(same) == ["bouncing"]


def test_figures_of_the_truth_itself():
    world = parse_caption("a red cube bouncing next to a blue sphere spinning")
    grid = ViewTimeGrid.around(4, 5, 16)
    truth = film(world, grid)
    found = motion_metrics(world, truth, truth)
    assert found["psnr_grid"] == 100 and 10 < found["psnr_best_static"] < 30
    assert found["motion_correlation"] == found["motion_amplitude_ratio"] == pytest.approx(1)
    assert found["motion"].keys() == {"bouncing", "spinning"}


def test_figures_of_a_still_scene():
    world = parse_caption("a red cube sliding")
    grid = ViewTimeGrid.around(2, 5, 16)
    truth = film(world, grid)
    still = Clips(*(part[:, :1].expand_as(part) for part in (truth.rgb, truth.alpha)))
    found = motion_metrics(world, still, truth)
    assert found["motion"] == {"sliding": {"correlation": 0, "amplitude_ratio": 0}}
    mean = Clips(truth.rgb.mean(1, keepdim=True).expand_as(truth.rgb), still.alpha)
    assert motion_metrics(world, mean, truth)["psnr_grid"] == found["psnr_best_static"]


def test_a_caption_at_rest_has_no_figures_of_motion_and_json_can_say_so():
    world = parse_caption("a red cube")
    truth = film(world, ViewTimeGrid.around(1, 2, 8))
    found = motion_metrics(world, truth, truth)
    assert found["motion"] == {} and found["motion_correlation"] is None
    assert found["psnr_best_static"] == 100
    json.dumps(found, allow_nan=False)


def test_a_motion_that_no_camera_sees_is_null():
    """A spinning sphere's area is constant; its word measures the image, not the area."""
    world = parse_caption("a red sphere growing")
    truth = film(world, ViewTimeGrid.around(1, 2, 8))
    still = Clips(*(part[:, :1].expand_as(part) for part in (truth.rgb, truth.alpha)))
    found = motion_metrics(world, truth, still)
    assert found["motion"] == {"growing": {"correlation": None, "amplitude_ratio": None}}
    assert found["motion_amplitude_ratio"] is None
    json.dumps(found, allow_nan=False)
