"""Grids of time x view: which cells they have, and what is known of them."""

import cv2
import pytest
import torch

from custom.fourd.systems.mapper_grid import GridOptions, check_options, planned_grids
from tests.fixtures.mapper_scenes import CFG, Shades, plan_of, scene_truth


@pytest.fixture(scope="module")
def truth():
    return scene_truth("a red cube sliding")


def test_a_scene_gives_times_views_and_their_truth(truth):
    plan = plan_of(truth, n_times=4, n_views=2, source_azimuth_deg=80.0, source_time=0.3)
    assert plan.times.tolist() == [0, 0.25, 0.5, 0.75]
    assert plan.views["azimuth"].tolist() == [0, 180]
    assert float(plan.source_view["azimuth"]) == 90 and plan.source_time == 0.25
    source, _ = truth.images([(2, 1)])
    assert torch.equal(plan.image, source[0])
    cell, _ = truth.images([(6, 2)])
    assert plan.truth.shape == (4, 2, 16, 16, 3)
    assert torch.equal(plan.truth[3, 1], cell[0])


def test_cells_that_the_scene_does_not_have_have_no_truth(truth):
    plan = plan_of(truth, times=[0.1, 0.2], azimuths_deg=[0, 90])
    assert plan.times.tolist() == pytest.approx([0.1, 0.2]) and plan.truth is None
    known = plan_of(truth, times=[0.5], azimuths_deg=[450.0, -90.0])
    assert known.truth is not None and known.views["azimuth"].tolist() == [450.0, -90.0]


def test_what_is_not_controlled_has_one_row_or_column(truth):
    only_time = plan_of(truth, Shades(follows_view=False), source_azimuth_deg=180.0)
    assert only_time.views["azimuth"].tolist() == [180.0] and len(only_time.times) == 8
    only_view = plan_of(truth, Shades(follows_time=False), source_time=0.5)
    assert only_view.times.tolist() == [0.5] and len(only_view.views["azimuth"]) == 4


def test_a_scene_of_one_camera_is_turned_around():
    plan = plan_of(scene_truth(n_views=1), n_views=3)
    assert plan.views["azimuth"].tolist() == [0, 120, 240] and plan.truth is None


def test_a_picture_needs_no_scene(tmp_path):
    red = torch.zeros(8, 8, 3).numpy()
    red[..., 2] = 255
    cv2.imwrite(str(tmp_path / "cup.png"), red)
    options = GridOptions(image=str(tmp_path / "cup.png"), caption="a cup", n_times=2, n_views=3)
    (plan,) = planned_grids(options, [], CFG, Shades())
    assert plan.name == "cup" and plan.caption == "a cup" and plan.truth is None
    assert plan.image.shape == (16, 16, 3)
    assert torch.allclose(plan.image, torch.tensor([1.0, 0.0, 0.0]))
    assert plan.times.tolist() == [0, 0.5]
    assert plan.views["azimuth"].tolist() == [0, 120, 240]
    assert float(plan.source_view["elevation"]) == 15


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"n_times": -1}, "system.grid.n_times is -1; expected 0 or more"),
        ({"times": [0.5, 2]}, "has the time 2; expected scene times in"),
        ({"prompts": []}, "system.grid.prompts is empty"),
        ({"prompts": ["{colour}"]}, "system.grid.prompts holds '{colour}'"),
        ({"image": "nowhere.png"}, "system.grid.image is 'nowhere.png', and there is no such"),
    ],
)
def test_options_that_cannot_work_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        check_options(GridOptions(**keys))
