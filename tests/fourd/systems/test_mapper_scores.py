"""Figures of methods, and whether images follow what was asked, on scenes of the world."""

import pytest

from custom.fourd.data.pair_places import pair_places
from custom.fourd.data.pair_sampling import KINDS, PairChoice
from custom.fourd.systems.mapper_scores import PairScores, spread
from tests.fixtures.mapper_scenes import scene_truth


def pairs_of(truth, rows):
    """A batch of (kind, i, j, a, b)."""
    choice = PairChoice.of_rows([(0, KINDS.index(kind), *rest) for kind, *rest in rows])
    cond, cond_alpha = truth.images([(i, a) for _, i, _, a, _ in rows])
    target, target_alpha = truth.images([(j, b) for _, _, j, _, b in rows])
    return {
        **pair_places([truth.source], choice),
        "cond_rgb": cond, "cond_alpha": cond_alpha,
        "target_rgb": target, "target_alpha": target_alpha,
        "pair_kind": choice.kind, "scene_index": choice.scene,
        "index_j": choice.frame_j, "index_b": choice.camera_b,
    }  # fmt: skip


ROWS = [("time", 0, 2, 1, 1), ("time", 0, 4, 1, 1), ("view", 2, 2, 0, 1), ("both", 0, 6, 1, 3)]


@pytest.fixture(scope="module")
def truth():
    return scene_truth("a red cube sliding")


def test_the_truth_has_no_error_and_a_copy_has_all_of_it(truth):
    batch, scores = pairs_of(truth, ROWS), PairScores()
    for method, images in (("ours", batch["target_rgb"]), ("copy", batch["cond_rgb"])):
        scores.add(images, batch, method)
        scores.follow(images, batch, [truth], method)
    control = scores.control()
    assert control["time_error_frames"] == control["angle_error_deg"] == 0
    assert control["time_correlation"] == pytest.approx(1.0)
    assert control["view_correlation"] == pytest.approx(1.0)
    summary = scores.summary()
    assert summary["time"]["pairs"] == 2 and summary["time"]["copy_time_error_frames"] > 0
    assert summary["view"]["copy_angle_error_deg"] == 90
    assert summary["view"]["copy_time_error_frames"] >= 0
    assert summary["time"]["psnr"] > 90 > summary["time"]["copy_psnr"]
    assert summary["time"]["ssim_masked"] > summary["time"]["copy_ssim_masked"]
    assert len(scores.shown) == 4


def test_errors_are_of_the_pairs_whose_control_varies(truth):
    """Images of one time too late: an error of one frame, whatever the view."""
    batch, scores = pairs_of(truth, ROWS[:1] + ROWS[3:]), PairScores()
    late, _ = truth.images([(3, 1), (7, 3)])
    scores.follow(late, batch, [truth])
    assert scores.control()["time_error_frames"] == 1
    assert scores.control()["angle_error_deg"] == 0
    assert "time_error_frames" in scores.values["ours"]["both"]
    asked = scores.asked["ours"]["time"]
    assert [abs(recovered - requested) for requested, recovered, _ in asked] == [0.125, 0.125]
    assert [period for *_, period in asked] == [1.0, 1.0], "a slide returns"
    assert [row[:2] for row in scores.asked["ours"]["view"]] == [(270.0, 270.0)]


def test_a_still_scene_of_one_camera_has_no_such_figures():
    still = scene_truth("a red cube sliding", n_times=1, n_views=1)
    batch = pairs_of(still, [("identity", 0, 0, 0, 0)])
    scores = PairScores()
    scores.add(batch["cond_rgb"], batch)
    scores.follow(batch["cond_rgb"], batch, [still])
    assert scores.control() == {} and scores.summary()["identity"]["psnr"] == 100


def test_values_are_spread_evenly():
    assert spread([1, 2, 3, 4], 2) == [1, 3]
    assert spread([1, 2], 5) == [1, 2] and spread([], 3) == []
    assert spread(list(range(16)), 4) == [0, 4, 8, 12]
