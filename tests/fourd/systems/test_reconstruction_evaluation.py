"""Figures of held-out frames, by hand."""

import math

import pytest
import torch

from custom.fourd.renderers.scene import SceneImages
from custom.fourd.systems.reconstruction_evaluation import FrameScores

SIZE = 12


def images(value, depth=2.0, alpha=1.0):
    ones = torch.ones(1, SIZE, SIZE, 1)
    return SceneImages(ones.expand(-1, -1, -1, 3) * value, ones * alpha, ones * depth)


def frame(value, camera=0, **more):
    return {"rgb": torch.full((1, SIZE, SIZE, 3), value), "camera_id": camera, **more}


def test_means_by_camera_and_the_best_still_picture():
    scores = FrameScores()
    for render, truth, camera in ((0.5, 0.6, 0), (0.5, 0.4, 0), (0.5, 0.51, 3)):
        scores.add(images(render), frame(truth, camera))
    found = scores.summary()
    assert found["psnr"] == pytest.approx((20 + 20 + 40) / 3, abs=1e-3)
    assert found["psnr_min"] == pytest.approx(20, abs=1e-3)
    assert found["psnr_by_camera"] == pytest.approx({"0": 20.0, "3": 40.0}, abs=1e-3)
    # Camera 0's mean frame, 0.5, is 0.1 off twice; camera 3 has one frame, which is its mean.
    assert found["psnr_best_static"] == pytest.approx((20 + 20 + 100) / 3, abs=1e-3)
    assert "depth_error" not in found


def test_only_pixels_that_may_be_compared_count():
    mask = torch.zeros(1, SIZE, SIZE, 1)
    mask[:, :, :6] = 1
    truth = frame(0.6, mask=mask)
    truth["rgb"][:, :, 6:] = 0.0
    scores = FrameScores()
    scores.add(images(0.5), truth)
    assert scores.summary()["psnr"] == pytest.approx(20, abs=1e-3)


def test_depth_is_compared_where_truth_and_render_are():
    depth = torch.zeros(1, SIZE, SIZE, 1)
    depth[:, 0] = 2.5
    scores = FrameScores()
    scores.add(images(0.5, depth=2.0), frame(0.5, depth=depth))
    assert scores.summary()["depth_error"] == pytest.approx(0.2)
    scores.add(images(0.5, alpha=0.1), frame(0.5, depth=depth))
    assert math.isnan(scores.values["depth_error"][1])
    assert scores.summary()["depth_error"] == pytest.approx(0.2), "an empty render has no depth"
