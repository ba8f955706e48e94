"""Figures and pictures of held-out frames, by hand."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from custom.fourd.data.ray_batches import frame_batch
from custom.fourd.renderers.scene import SceneImages
from custom.fourd.systems.reconstruction_evaluation import FrameScores
from tests.fixtures.video_systems import random_video_system, world_frames

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


# Pictures


@pytest.fixture(scope="module")
def frames():
    return world_frames(n_times=20, size_px=SIZE)


@pytest.fixture
def fitted(tmp_path):
    system = random_video_system().eval()
    system.set_save_dir(tmp_path)
    return system


def cells(path):
    """A sheet's cells, [rows columns SIZE SIZE 3], in [0, 1]."""
    with Image.open(path) as image:
        picture = torch.from_numpy(np.asarray(image.convert("RGB")).copy()) / 255
    rows, columns = (edge // SIZE for edge in picture.shape[:2])
    return picture.view(rows, SIZE, columns, SIZE, 3).transpose(1, 2)


def test_validation_shows_render_truth_and_depth_of_every_frame(fitted, frames, monkeypatch):
    logged = {}
    monkeypatch.setattr(fitted, "log", lambda name, value, **_: logged.update({name: value}))
    renders, figures = [], []
    for row in (0, 7, 19):
        batch = frame_batch(frames, row)
        fitted.validation_step(batch, row)
        renders.append(
            fitted.scene.render_rays(batch["rays_o"], batch["rays_d"], batch["frame_times"])
        )
        error = (renders[-1].rgb - frames.frames[row] / 255).square().mean()
        figures.append(float(-10 * error.log10()))
    fitted.on_validation_epoch_end()
    assert logged["val/psnr"] == pytest.approx(sum(figures) / 3, abs=1e-3)
    found = cells(f"{fitted.get_save_dir()}/it0-0.png")
    assert found.shape[:2] == (3, 3)
    rgb = torch.cat([render.rgb for render in renders]).clamp(0, 1)
    assert (rgb[0] - rgb[1]).abs().max() > 0.02, "each at its own time"
    # Savers round down, as the contract's do.
    torch.testing.assert_close(found[0], rgb.detach(), atol=1.01 / 255, rtol=0)
    truth = frames.frames[[0, 7, 19]] / 255
    torch.testing.assert_close(found[1], truth, atol=0.6 / 255, rtol=0)
    colours = found[2].reshape(-1, 3).unique(dim=0)
    assert len(colours) > 20, "near and far have colours of their own"
    fitted.on_validation_epoch_end()  # nothing is kept for a second picture


def test_the_sheet_spreads_over_all_frames(fitted, frames):
    fitted._begin_test()
    for row in range(20):
        fitted.test_step(frame_batch(frames, row), row)
    fitted.on_test_epoch_end()
    found = cells(f"{fitted.get_save_dir()}/it0-test-sheet.png")
    assert found.shape[:2] == (6, 8), "eight columns, twice render, truth and depth"
    shown = [round(place * 19 / 15) for place in range(16)]
    truth = torch.cat((found[1], found[4]))
    torch.testing.assert_close(truth, frames.frames[shown] / 255, atol=0.6 / 255, rtol=0)
    with open(f"{fitted.get_save_dir()}/metrics.json", encoding="utf-8") as file:
        metrics = json.load(file)
    assert (metrics["views"], metrics["height"], metrics["seconds"]) == (20, SIZE, None)
