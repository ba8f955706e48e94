"""Distributions, streams and matrices of random cameras."""

import math

import numpy as np
import pytest
import torch
from threestudio.data.camera_sampling import (
    CameraSample,
    ItemSpan,
    camera_batch,
    draw_normal,
    draw_uniform,
    place_cameras,
    sample_azimuth_deg,
    sample_elevation_deg,
    sample_light,
)
from threestudio.data.uncond import RandomCameraDataModuleConfig
from threestudio.utils.camera import camera_from_orbit, orbit_position
from threestudio.utils.ops import get_ray_directions
from threestudio.utils.rng import set_experiment_seed

N_DRAWS = 2000
# Kolmogorov-Smirnov bound at the level of 1 in 1000; the seed is fixed, so a pass stays a pass.
KS_BOUND = 1.95 / math.sqrt(N_DRAWS)


@pytest.fixture(autouse=True)
def fixed_seed():
    set_experiment_seed(0)


def many(step=0):
    return ItemSpan(step, first=0, count=N_DRAWS, total=N_DRAWS)


def ks_distance(samples, cdf):
    """Largest gap between the empirical and the expected distribution function."""
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    expected = cdf(ordered)
    steps = np.arange(1, len(ordered) + 1) / len(ordered)
    return max(np.abs(steps - expected).max(), np.abs(steps - 1 / len(ordered) - expected).max())


def normal_cdf(values):
    return np.array([0.5 * (1.0 + math.erf(value / math.sqrt(2.0))) for value in values])


def is_on_sphere(step):
    """Both laws map the same uniform draw of an item, so the map tells which law was chosen."""
    span = ItemSpan(step, 0, 1, 1)
    fraction = draw_uniform(span, "elevation", 0.0, 1.0).double()
    elevation_deg = sample_elevation_deg(span, (0.0, 90.0)).double()
    return bool((elevation_deg - 90.0 * fraction).abs() > 1e-3)


def step_with_law(on_sphere):
    """First step whose shared coin picks the wanted law of elevations."""
    return next(step for step in range(64) if is_on_sphere(step) == on_sphere)


@pytest.mark.parametrize("low, high", [(0.0, 30.0), (-10.0, 90.0), (-90.0, 90.0)])
def test_elevation_on_the_sphere_is_uniform_in_the_sine(low, high):
    step = step_with_law(on_sphere=True)
    elevation_deg = sample_elevation_deg(many(step), (low, high))
    sine_low, sine_high = np.sin(np.radians([low, high]))
    distance = ks_distance(
        elevation_deg, lambda v: (np.sin(np.radians(v)) - sine_low) / (sine_high - sine_low)
    )
    assert distance < KS_BOUND
    # The original's formula would reach 19.5 degrees only for a range of [0, 30].
    assert elevation_deg.max() > low + 0.95 * (high - low)
    assert low <= elevation_deg.min() and elevation_deg.max() <= high


def test_elevation_is_otherwise_uniform_in_degrees():
    elevation_deg = sample_elevation_deg(many(step_with_law(on_sphere=False)), (-10.0, 90.0))
    assert ks_distance(elevation_deg, lambda v: (v + 10.0) / 100.0) < KS_BOUND


def test_the_two_laws_are_equally_likely_and_shared_by_the_step():
    share = np.mean([is_on_sphere(step) for step in range(600)])
    assert abs(share - 0.5) < 0.06


def test_azimuth_stratified_puts_one_camera_in_each_part():
    azimuth_deg = sample_azimuth_deg(ItemSpan(3, 0, 36, 36), (-180.0, 180.0), stratified=True)
    assert torch.equal(torch.floor((azimuth_deg + 180.0) / 10.0), torch.arange(36.0))
    within = (azimuth_deg + 180.0) / 10.0 - torch.arange(36.0)
    assert ks_distance(within, lambda v: v) < 1.95 / 6.0


def test_azimuth_unstratified_is_uniform():
    azimuth_deg = sample_azimuth_deg(many(), (-180.0, 180.0), stratified=False)
    assert ks_distance(azimuth_deg, lambda v: (v + 180.0) / 360.0) < KS_BOUND


def test_uniform_and_normal_draws_follow_their_laws_and_streams():
    uniform = draw_uniform(many(), "distance", 1.0, 1.5)
    assert ks_distance(uniform, lambda v: (v - 1.0) / 0.5) < KS_BOUND
    normal = draw_normal(many(), "center", 0.2)
    for axis in range(3):
        assert ks_distance(normal[:, axis] / 0.2, normal_cdf) < KS_BOUND
    assert abs(np.corrcoef(uniform, draw_uniform(many(), "fovy", 0, 1))[0, 1]) < 0.07


def test_perturbations_shift_uniformly_and_look_aside_normally():
    cfg = RandomCameraDataModuleConfig(camera_perturb=0.1, center_perturb=0.2, up_perturb=0.02)
    angle = torch.zeros(N_DRAWS)
    cameras = place_cameras(many(), cfg, angle, angle, angle + 1.5, angle + 1.0)
    shift = cameras.position - torch.tensor([1.5, 0.0, 0.0])
    for axis in range(3):
        assert ks_distance(shift[:, axis], lambda v: (v + 0.1) / 0.2) < KS_BOUND
        assert ks_distance(cameras.center[:, axis] / 0.2, normal_cdf) < KS_BOUND
    tilt = (cameras.up - torch.tensor([0.0, 0.0, 1.0])) / 0.02
    assert ks_distance(tilt[:, 0], normal_cdf) < KS_BOUND
    assert torch.equal(cameras.distance, angle + 1.5)


def test_views_of_one_object_share_perturbations_and_light_noise():
    cfg = RandomCameraDataModuleConfig(light_distance_range=(1.0, 1.0))
    span = ItemSpan(0, 0, 2, 2)
    elevation_deg, azimuth_deg = torch.zeros(6), torch.tensor([0.0, 120, 240] * 2)
    cameras = place_cameras(
        span, cfg, elevation_deg, azimuth_deg, elevation_deg + 2, elevation_deg + 1
    )
    shift = (cameras.position - orbit_position(elevation_deg, azimuth_deg, 2.0)).view(2, 3, 3)
    assert torch.allclose(shift, shift[:, :1].expand(2, 3, 3), atol=1e-6)
    assert torch.equal(cameras.center.view(2, 3, 3)[:, 0], cameras.center.view(2, 3, 3)[:, 2])
    assert not torch.equal(cameras.center[0], cameras.center[3])
    noise = draw_normal(span, "light-direction", 1.0).repeat_interleave(3, dim=0)
    expected = torch.nn.functional.normalize(cameras.position + noise, dim=-1)
    assert torch.allclose(cameras.light_position, expected, atol=1e-6)


def test_magic3d_light_is_tilted_by_half_a_right_angle_to_a_right_angle():
    cfg = RandomCameraDataModuleConfig(
        light_sample_strategy="magic3d", light_distance_range=(0.8, 1.5)
    )
    position = orbit_position(torch.full((N_DRAWS,), 20.0), torch.linspace(0, 360, N_DRAWS), 1.2)
    light = sample_light(many(), cfg, position)
    radius = light.norm(dim=-1)
    assert ks_distance(radius, lambda v: (v - 0.8) / 0.7) < KS_BOUND
    towards_camera = torch.nn.functional.normalize(position, dim=-1)
    axial = (light / radius[:, None] * towards_camera).sum(dim=-1)
    elevation = torch.asin(axial.clamp(-1, 1))
    lowest = math.pi / 6
    assert ks_distance(elevation, lambda v: (v - lowest) / (math.pi / 3)) < KS_BOUND
    # All angles around the axis occur, not only half of them as in the original's range.
    poses = camera_from_orbit(20.0, torch.linspace(0, 360, N_DRAWS), 1.2)
    around = (poses[:, :3, :2].mT @ light[:, :, None]).squeeze(-1)
    azimuth = torch.atan2(around[:, 1], around[:, 0])
    assert ks_distance(azimuth, lambda v: (v + math.pi) / (2 * math.pi)) < KS_BOUND


def test_a_part_of_the_items_is_a_part_of_the_draw():
    for quantity in ("distance", "azimuth"):
        joint = draw_uniform(ItemSpan(5, 0, 8, 8), quantity, 0.0, 1.0)
        part = draw_uniform(ItemSpan(5, 4, 4, 8), quantity, 0.0, 1.0)
        assert torch.equal(joint[4:], part)
    joint = sample_azimuth_deg(ItemSpan(5, 0, 8, 8), (-180, 180), stratified=True)
    part = sample_azimuth_deg(ItemSpan(5, 4, 4, 8), (-180, 180), stratified=True)
    assert torch.equal(joint[4:], part)


def single_camera(elevation_deg, azimuth_deg, distance, fovy_rad):
    angles = [torch.tensor([float(v)]) for v in (elevation_deg, azimuth_deg, distance, fovy_rad)]
    position = orbit_position(*angles[:3])
    up = torch.tensor([[0.0, 0.0, 1.0]])
    return CameraSample(*angles, position, torch.zeros_like(position), up, position)


def test_rays_of_a_front_camera_worked_out_by_hand():
    """At fovy 90 degrees and 2 rows, the focal length is 1 pixel and pixels sit at +-1/2."""
    batch = camera_batch(single_camera(0, 0, 2, math.pi / 2), height=2, width=4, normalize=False)
    assert torch.allclose(batch["rays_o"], torch.tensor([2.0, 0.0, 0.0]).expand(1, 2, 4, 3))
    # Seen from +x, the image's right is +y and its top row is +z.
    expected = torch.tensor([-1.0, -1.5, 0.5])
    assert torch.allclose(batch["rays_d"][0, 0, 0], expected, atol=1e-6)
    assert torch.allclose(batch["rays_d"][0, 1, 3], torch.tensor([-1.0, 1.5, -0.5]), atol=1e-6)
    unit = camera_batch(single_camera(0, 0, 2, math.pi / 2), height=2, width=4)["rays_d"]
    assert torch.allclose(unit, torch.nn.functional.normalize(batch["rays_d"], dim=-1), atol=1e-6)


def test_projection_puts_ray_points_where_their_pixels_are():
    """P @ w2c of a point on the ray through pixel (i, j) is that pixel, with the row downward."""
    batch = camera_batch(single_camera(25, 130, 1.8, 0.8), height=6, width=9)
    points = batch["rays_o"] + 1.3 * batch["rays_d"]
    homogeneous = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
    clip = homogeneous.reshape(1, -1, 4) @ batch["mvp_mtx"].mT
    device = (clip[..., :2] / clip[..., 3:]).view(6, 9, 2)
    columns = (torch.arange(9) + 0.5) / 9 * 2 - 1
    rows = (torch.arange(6) + 0.5) / 6 * 2 - 1
    # The contract's projection negates y, so that its y grows downward like the rows.
    assert torch.allclose(device[..., 0], columns.expand(6, 9), atol=1e-5)
    assert torch.allclose(device[..., 1], rows[:, None].expand(6, 9), atol=1e-5)


def test_every_key_has_its_shape_and_the_inputs_are_left_alone():
    cfg = RandomCameraDataModuleConfig()
    angle = torch.tensor([10.0, 20.0, 30.0])
    cameras = place_cameras(ItemSpan(0, 0, 3, 3), cfg, angle, angle, angle / 10, angle / 30)
    directions = get_ray_directions(5, 7, 1.0)
    before = directions.clone()
    batch = camera_batch(cameras, 5, 7, True, directions)
    assert torch.equal(directions, before)
    shapes = {key: tuple(value.shape) for key, value in batch.items() if hasattr(value, "shape")}
    assert shapes == {
        "rays_o": (3, 5, 7, 3),
        "rays_d": (3, 5, 7, 3),
        "mvp_mtx": (3, 4, 4),
        "proj_mtx": (3, 4, 4),
        "c2w": (3, 4, 4),
        "camera_positions": (3, 3),
        "light_positions": (3, 3),
        "elevation": (3,),
        "azimuth": (3,),
        "camera_distances": (3,),
        "fovy": (3,),
    }
    assert (batch["height"], batch["width"]) == (5, 7)
