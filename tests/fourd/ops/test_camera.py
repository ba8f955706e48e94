"""Intrinsics, rays, projections and evaluation paths."""

import math

import pytest
import torch
from threestudio.utils.ops import get_ray_directions, get_rays

from custom.fourd.ops import camera
from custom.fourd.ops.camera import (
    camera_from_orbit,
    camera_rays,
    intrinsics_from_fovy,
    invert_pose,
    motion_smooth_path,
    multiview_azimuths,
    ndc_distance,
    ndc_rays,
    pixel_centres,
    pixel_rays,
    points_from_depth,
    project_points,
    relative_distance,
    seen_share,
    stop_and_sweep_path,
    turntable,
    turntable_azimuths,
)


def random_cameras(batch, seed=0):
    stream = torch.Generator().manual_seed(seed)
    draw = torch.rand(4, batch, generator=stream, dtype=torch.float64)
    c2w = camera_from_orbit(170 * draw[0] - 85, 360 * draw[1], 1 + draw[2])
    return c2w, 0.3 + draw[3]


def test_intrinsics_worked_out_by_hand():
    """A right angle over 6 rows puts the image plane 3 pixels away."""
    intrinsics = intrinsics_from_fovy(math.pi / 2, height=6, width=8)
    expected = torch.tensor([[3.0, 0.0, 4.0], [0.0, 3.0, 3.0], [0.0, 0.0, 1.0]])
    assert torch.allclose(intrinsics, expected, atol=1e-6)
    assert intrinsics_from_fovy(torch.full((2, 3), 0.5), 4, 4).shape == (2, 3, 3, 3)
    assert intrinsics_from_fovy(1, 4, 4).is_floating_point()


def test_an_empty_image_is_refused():
    with pytest.raises(ValueError, match="The image is 0 x 8 pixels; expected at least 1 x 1"):
        intrinsics_from_fovy(0.5, 0, 8)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_rays_equal_the_contracts(batch):
    c2w, fovy_rad = random_cameras(batch)
    rays_o, rays_d = camera_rays(c2w, intrinsics_from_fovy(fovy_rad, 5, 7), 5, 7)
    for index in range(batch):
        focal_px = 0.5 * 5 / math.tan(0.5 * float(fovy_rad[index]))
        directions = get_ray_directions(5, 7, focal_px).double()
        expected_o, expected_d = get_rays(directions, c2w[index], keepdim=True)
        # The contract's camera directions are single precision.
        assert torch.allclose(rays_o[index], expected_o, atol=1e-12)
        assert torch.allclose(rays_d[index], expected_d, atol=1e-6)


def test_rays_have_unit_length_and_any_leading_shape():
    c2w, fovy_rad = random_cameras(6)
    intrinsics = intrinsics_from_fovy(fovy_rad, 4, 3)
    rays_o, rays_d = camera_rays(c2w.view(2, 3, 4, 4), intrinsics.view(2, 3, 3, 3), 4, 3)
    assert rays_o.shape == rays_d.shape == (2, 3, 4, 3, 3)
    assert torch.allclose(rays_d.norm(dim=-1), torch.ones(2, 3, 4, 3, dtype=torch.float64))
    flat = camera_rays(c2w, intrinsics, 4, 3)[1]
    assert torch.equal(rays_d.reshape(6, 4, 3, 3), flat)


def test_top_left_pixel_looks_up_and_left():
    c2w = camera_from_orbit(0.0, 0.0, 2.0)
    _, rays_d = camera_rays(c2w, intrinsics_from_fovy(0.8, 8, 8), 8, 8)
    # Seen from the front, the left is -y and up is +z.
    assert rays_d[0, 0, 1] < 0 < rays_d[0, 0, 2]
    assert rays_d[-1, -1, 2] < 0 < rays_d[-1, -1, 1]


@pytest.mark.parametrize("batch", [1, 3])
def test_projection_inverts_unprojection(batch):
    c2w, fovy_rad = random_cameras(batch, seed=3)
    intrinsics = intrinsics_from_fovy(fovy_rad, 5, 7)
    rays_o, rays_d = camera_rays(c2w, intrinsics, 5, 7)
    stream = torch.Generator().manual_seed(1)
    depth = 0.5 + torch.rand(batch, 5, 7, 1, generator=stream, dtype=torch.float64)
    points = points_from_depth(rays_o, rays_d, depth)
    pixels, z_depth = project_points(points.view(batch, 35, 3), c2w, intrinsics)
    rows, columns = torch.meshgrid(torch.arange(5) + 0.5, torch.arange(7) + 0.5, indexing="ij")
    expected = torch.stack([columns, rows], dim=-1).double().view(1, 35, 2).expand(batch, 35, 2)
    assert torch.allclose(pixels, expected, atol=1e-9)
    forward = -c2w[:, None, :3, 2]
    along = depth.view(batch, 35) * (rays_d.view(batch, 35, 3) * forward).sum(dim=-1)
    assert torch.allclose(z_depth, along, atol=1e-12)


def test_points_behind_the_camera_have_negative_depth():
    c2w = camera_from_orbit(0.0, 0.0, 2.0)
    points = torch.tensor([[0.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    pixels, z_depth = project_points(points, c2w, intrinsics_from_fovy(0.8, 8, 6))
    assert z_depth.tolist() == pytest.approx([2.0, -3.0])
    assert pixels[0].tolist() == pytest.approx([3.0, 4.0])


def test_projection_is_differentiable():
    c2w, fovy_rad = random_cameras(1, seed=5)
    intrinsics = intrinsics_from_fovy(fovy_rad, 5, 7)
    points = torch.tensor([[[0.1, 0.2, -0.1]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: project_points(p, c2w, intrinsics), (points,))


@pytest.mark.parametrize("batch", [1, 3])
def test_inverse_pose_undoes_the_pose(batch):
    c2w, _ = random_cameras(batch, seed=2)
    identity = torch.eye(4, dtype=torch.float64).expand(batch, 4, 4)
    assert torch.allclose(invert_pose(c2w) @ c2w, identity, atol=1e-12)
    assert torch.allclose(invert_pose(c2w), torch.linalg.inv(c2w), atol=1e-12)


def test_relative_distance_keeps_the_visible_half_height():
    fovy_rad = torch.tensor([0.3, 0.7, 1.2])
    distance = relative_distance(torch.tensor([0.9, 0.9, 0.9]), fovy_rad)
    half_height = distance * torch.tan(0.5 * fovy_rad)
    assert torch.allclose(half_height, torch.full((3,), 0.9))


def test_views_of_a_group_are_a_quarter_turn_apart():
    assert multiview_azimuths(4, start_deg=10.0).tolist() == [10.0, 100.0, 190.0, 280.0]
    assert multiview_azimuths(2, span_deg=90.0).tolist() == [0.0, 45.0]
    with pytest.raises(ValueError, match="n_view is 0; expected at least 1 view"):
        multiview_azimuths(0)


def test_turntable_with_and_without_its_repeated_view():
    assert turntable_azimuths(4).tolist() == [0.0, 90.0, 180.0, 270.0]
    assert turntable_azimuths(5, repeat_first=True).tolist() == [0.0, 90.0, 180.0, 270.0, 360.0]
    poses = turntable(3, elevation_deg=20.0, distance=1.5)
    expected = camera_from_orbit(20.0, torch.tensor([0.0, 120.0, 240.0]), 1.5)
    assert torch.allclose(poses, expected, atol=1e-6)
    with pytest.raises(ValueError, match="n_views is 0; expected at least 1 view"):
        turntable_azimuths(0)


def test_motion_smooth_is_the_published_path():
    """64 times: 16 frames still, 15 turning, four times over; the clip plays twice, 2 short."""
    azimuth_deg, frame_times = motion_smooth_path(64)
    assert len(azimuth_deg) == len(frame_times) == 124
    for stop, start in enumerate((360.0, 270.0, 180.0, 90.0)):
        section = azimuth_deg[31 * stop : 31 * (stop + 1)]
        assert section[:16].tolist() == [start] * 16
        assert section[16].item() == pytest.approx(start - 6.0)
        assert section[30].item() == pytest.approx(start - 90.0)
    clip = torch.linspace(0, 1, 64)[:62]
    assert torch.equal(frame_times, torch.cat([clip, clip]))


def test_motion_smooth_full_keeps_every_view_and_time():
    azimuth_deg, frame_times = motion_smooth_path(16, drop_repeats=False)
    assert azimuth_deg[:8].tolist() == [360.0] * 5 + [330.0, 300.0, 270.0]
    assert torch.equal(frame_times, torch.linspace(0, 1, 16).repeat(2))
    assert len(azimuth_deg) == 32


@pytest.mark.parametrize("n_times, n_stops", [(4, 2), (6, 2), (8, 4), (64, 4), (36, 6)])
@pytest.mark.parametrize("drop_repeats", [True, False])
def test_every_view_of_a_path_has_a_time(n_times, n_stops, drop_repeats):
    azimuth_deg, frame_times = motion_smooth_path(n_times, n_stops, drop_repeats)
    assert azimuth_deg.shape == frame_times.shape
    assert 0.0 <= frame_times.min() and frame_times.max() <= 1.0


@pytest.mark.parametrize("n_times, n_stops", [(10, 4), (9, 3), (2, 4)])
def test_uneven_paths_are_refused(n_times, n_stops):
    with pytest.raises(ValueError, match=f"{n_times} times cannot be shared by {n_stops} stops"):
        motion_smooth_path(n_times, n_stops)


def test_stop_and_sweep_plays_whole_clips():
    azimuth_deg, frame_times = stop_and_sweep_path(3, n_stops=2, sweep_factor=2)
    sweep = [0.0, 18.0, 36.0, 54.0, 72.0, 90.0]
    second = [90.0, 108.0, 126.0, 144.0, 162.0, 180.0]
    assert azimuth_deg.tolist() == pytest.approx([0.0] * 3 + sweep + [90.0] * 3 + second)
    assert torch.equal(frame_times, torch.tensor([0.0, 0.5, 1.0]).repeat(6))


def test_everything_promised_is_there():
    assert all(hasattr(camera, name) for name in camera.__all__)


def test_rays_of_single_pixels_are_those_of_the_image():
    """One ray per camera, each with its own pose, against the whole image of each camera."""
    c2w, fovy_rad = random_cameras(4)
    intrinsics = intrinsics_from_fovy(fovy_rad, 5, 7)
    rays_o, rays_d = camera_rays(c2w, intrinsics, 5, 7)
    rows, columns = torch.tensor([0, 4, 2, 3]), torch.tensor([6, 0, 3, 1])
    pixels = torch.stack([columns, rows], dim=-1)[:, None] + 0.5
    some_o, some_d = pixel_rays(pixels.double(), c2w, intrinsics)
    at = torch.arange(4)
    assert torch.allclose(some_d[:, 0], rays_d[at, rows, columns], atol=1e-14)
    assert torch.equal(some_o[:, 0], rays_o[at, rows, columns])
    centres = pixel_centres(5, 7, c2w)
    assert centres.shape == (5, 7, 2) and centres[4, 0].tolist() == [0.5, 4.5]


def test_ndc_of_points_worked_out_by_hand():
    """At f = W = 4 and z = -2, x = 1 is the image's right edge: 2 f x / (W |z|) = 1."""
    rays_o, rays_d = torch.zeros(1, 3), torch.tensor([[0.5, 0.0, -1.0]])
    origin, direction = ndc_rays(rays_o, rays_d, torch.tensor([[2.0, 2.0]]), near=1.0)
    assert torch.allclose(origin, torch.tensor([[1.0, 0.0, -1.0]]))
    # The ray stays on the image's edge, and z = -2 lies at 1 - 2 / 2 = 0, halfway to infinity.
    assert torch.allclose(origin + 0.5 * direction, torch.tensor([[1.0, 0.0, 0.0]]))


def test_ndc_rays_run_through_the_images_of_their_points():
    stream = torch.Generator().manual_seed(1)
    rays_o = torch.rand(50, 3, generator=stream, dtype=torch.float64) - 0.5
    rays_d = torch.rand(50, 3, generator=stream, dtype=torch.float64) - 0.5
    rays_d = torch.nn.functional.normalize(rays_d - torch.tensor([0, 0, 1.0]), dim=-1)
    scale = torch.tensor([2.5, 3.0], dtype=torch.float64).expand(50, 2)
    near = 0.8
    origins, directions = ndc_rays(rays_o, rays_d, scale, near)
    parameter = torch.rand(50, 1, generator=stream, dtype=torch.float64)
    distance = ndc_distance(parameter, rays_o, rays_d, near)
    points = rays_o + distance * rays_d
    z = points[:, 2:]
    expected = torch.cat([-scale * points[:, :2] / z, 1 + 2 * near / z], dim=-1)
    assert torch.allclose(origins + parameter * directions, expected, atol=1e-12)
    # Parameter 1 is the far plane of the image of infinity.
    assert torch.allclose((origins + directions)[:, 2], torch.ones(50, dtype=torch.float64))


def test_the_share_of_cameras_that_see_a_point():
    """Two cameras on the z axis, 2 away on either side, that see 45 degrees to each edge."""
    c2w = camera_from_orbit(torch.zeros(3), torch.tensor([0.0, 180.0, 180.0]), 2.0)
    intrinsics = intrinsics_from_fovy(torch.full((3,), math.pi / 2), 10, 10)
    towards_first = c2w[0, :3, 3] / 2
    aside = torch.linalg.cross(towards_first, c2w[0, :3, 1])
    points = torch.stack(
        [
            torch.zeros(3),
            1.9 * towards_first,  # right before one lens
            1.5 * towards_first + 0.6 * aside,  # beside the first one's image
            2.5 * towards_first,  # behind the first
            3.0 * aside,
        ]
    )
    shares = seen_share(points, c2w, intrinsics, 10, 10)
    assert shares.tolist() == [1.0, 1.0, 0.5, 0.5, 0.0]
