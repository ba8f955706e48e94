"""Image batches become flat rays that know their image and time."""

import pytest
import torch
from threestudio.models.renderers.image_rays import check_image_rays, flat_rays


def batch(b=2, h=3, w=4):
    rays = torch.arange(b * h * w * 3.0).view(b, h, w, 3)
    return rays, rays + 0.5, torch.zeros(b, 3)


def test_rays_follow_each_other_row_by_row():
    rays_o, rays_d, lights = batch()
    times = check_image_rays(rays_o, rays_d, lights, torch.tensor([0.25, 0.75]))
    rays = flat_rays(rays_o, rays_d, times)
    assert rays.image_size == 12 and torch.equal(rays.origins[12 + 4 + 1], rays_o[1, 1, 1])
    assert torch.equal(rays.directions[5], rays_d[0, 1, 1])
    assert rays.frame_times.tolist() == [0.25, 0.75]


def test_times_are_one_per_image_in_the_rays_type():
    rays_o, rays_d, lights = batch()
    times = check_image_rays(rays_o, rays_d, lights, torch.tensor(0.5, dtype=torch.float64))
    assert times.tolist() == [0.5, 0.5] and times.dtype == torch.float32
    assert check_image_rays(rays_o, rays_d, lights, None) is None


def test_other_shapes_are_refused():
    rays_o, rays_d, lights = batch()
    with pytest.raises(ValueError, match=r"rays_o has shape \(24, 3\).*expected both \(B, H, W, 3"):
        check_image_rays(rays_o.view(-1, 3), rays_d.view(-1, 3), lights, None)
    with pytest.raises(ValueError, match=r"light_positions has shape \(3, 3\); expected \(2, 3\)"):
        check_image_rays(rays_o, rays_d, torch.zeros(3, 3), None)
    with pytest.raises(ValueError, match=r"frame_times has shape \(3,\); expected 2 values"):
        check_image_rays(rays_o, rays_d, lights, torch.zeros(3))
