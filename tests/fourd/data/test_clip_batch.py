"""Cameras to frames: who is repeated, in which order, and what stays."""

import pytest
import torch

from custom.fourd.data.clip_batch import clip_batch, image_batch

TIMES = torch.tensor([0.1, 0.4, 0.7])


def cameras(n):
    """As many cameras as there are colour channels, so that a lazy rule would take one for both."""
    stream = torch.Generator().manual_seed(0)
    return {
        "rays_o": torch.randn(n, 2, 2, 3, generator=stream),
        "rays_d": torch.randn(n, 2, 2, 3, generator=stream),
        "light_positions": torch.randn(n, 3, generator=stream),
        "azimuth": torch.arange(n) * 10.0,
        "bg_color": torch.tensor([0.1, 0.2, 0.3]),
        "frame_times": TIMES,
        "frame_times_video": TIMES,
        "height": 2,
        "is_video": True,
        "train_dynamic_camera": False,
    }


def test_each_camera_stands_once_for_each_time_and_frames_are_neighbours():
    batch = cameras(3)
    frames = clip_batch(batch, TIMES)
    assert frames["azimuth"].tolist() == [0, 0, 0, 10, 10, 10, 20, 20, 20]
    torch.testing.assert_close(frames["frame_times"], TIMES.repeat(3))
    for key in ("rays_o", "rays_d", "light_positions"):
        for frame in range(9):
            assert torch.equal(frames[key][frame], batch[key][frame // 3]), key
    assert frames["bg_color"].tolist() == batch["bg_color"].tolist()
    assert frames["frame_times_video"] is TIMES and frames["height"] == 2
    assert frames["num_frames"] == frames["images_per_group"] == 3
    assert batch["azimuth"].shape == (3,) and "num_frames" not in batch


def test_moving_cameras_are_the_frames():
    batch = cameras(6) | {"train_dynamic_camera": True}
    frames = clip_batch(batch, TIMES)
    assert torch.equal(frames["rays_o"], batch["rays_o"]) and frames["num_frames"] == 3
    torch.testing.assert_close(frames["frame_times"], TIMES.repeat(2))
    with pytest.raises(ValueError, match="4 moving cameras; expected a multiple of its 3"):
        clip_batch(cameras(4) | {"train_dynamic_camera": True}, TIMES)


def test_images_show_one_time():
    images = image_batch(cameras(4), 0.25)
    assert images["frame_times"].tolist() == [0.25] * 4 and images["num_frames"] == 1
    assert images["azimuth"].shape == (4,)
