"""Evaluation against the truth, on renders whose error is known."""

import math

import pytest
import torch

from custom.fourd.ops.camera import camera_from_orbit
from custom.fourd.renderers.scene import SceneImages
from custom.fourd.systems.world_evaluation import (
    TRUTH_SAMPLES_PER_AXIS,
    WorldEvaluation,
    scene_of_prompt,
)
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.render import render

SCENE = parse_caption("a red cube sliding")
C2W = camera_from_orbit(torch.tensor([10.0, 10.0]), torch.tensor([0.0, 120.0]), 3.0)
FOVY = torch.full((2,), math.radians(40))


def truth(frame_times=None):
    return render(SCENE, C2W, FOVY, 16, 16, frame_times, samples_per_axis=TRUTH_SAMPLES_PER_AXIS)


def images(rgb, alpha):
    return SceneImages(rgb, alpha, torch.zeros_like(alpha))


def test_prompts_of_the_world_have_a_truth():
    assert scene_of_prompt("a red cube sliding") == SCENE
    assert scene_of_prompt("a golden star") is None
    assert scene_of_prompt("a handmade of red cube") is None


def test_the_truth_scores_perfectly():
    true = truth()
    evaluation = WorldEvaluation(SCENE)
    returned = evaluation.add(images(true.rgb, true.alpha), C2W, FOVY)
    assert torch.equal(returned, true.rgb)
    summary = evaluation.summary()
    assert summary["psnr"] == summary["psnr_min"] == summary["psnr_object"] == 100
    assert summary["alpha_iou"] == summary["alpha_iou_min"] == 1
    assert summary["ssim"] == pytest.approx(1)


def test_an_empty_white_image_scores_as_white():
    true = truth()
    evaluation = WorldEvaluation(SCENE)
    evaluation.add(images(torch.ones_like(true.rgb), torch.zeros_like(true.alpha)), C2W, FOVY)
    summary = evaluation.summary()
    assert summary["psnr"] == summary["psnr_white"]
    assert summary["psnr_object"] == summary["psnr_object_white"] < summary["psnr"]
    assert summary["alpha_iou"] == 0
    error = (1 - true.rgb).square().mean(dim=(1, 2, 3))
    assert summary["psnr"] == pytest.approx(float((-10 * torch.log10(error)).mean()), abs=1e-4)


def test_views_are_averaged_and_the_worst_is_named():
    true = truth()
    off = true.rgb.clone()
    off[0] += 0.1
    off[1] += 0.01
    evaluation = WorldEvaluation(SCENE)
    for view in range(2):
        one = slice(view, view + 1)
        evaluation.add(images(off[one], true.alpha[one]), C2W[one], FOVY[one])
    summary = evaluation.summary()
    assert summary["psnr"] == pytest.approx(30, abs=1e-3)
    assert summary["psnr_min"] == pytest.approx(20, abs=1e-3)
    assert len(evaluation.values["psnr"]) == 2


def test_the_truth_is_that_of_the_scene_time():
    times = torch.tensor([0.25, 0.25])
    moved = truth(times)
    evaluation = WorldEvaluation(SCENE)
    evaluation.add(images(moved.rgb, moved.alpha), C2W, FOVY, times)
    assert evaluation.summary()["psnr"] == 100
    still = WorldEvaluation(SCENE)
    still.add(images(moved.rgb, moved.alpha), C2W, FOVY)
    assert still.summary()["psnr"] < 30
