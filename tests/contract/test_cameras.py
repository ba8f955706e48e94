"""The camera convention and the random cameras: sections 4.2 and 4.3, checked by hand."""

import math

import pytest
import threestudio
import torch
from threestudio.data.uncond import (
    RandomCameraDataModuleConfig,
    RandomCameraDataset,
    RandomCameraIterableDataset,
)
from threestudio.utils.config import parse_structured
from threestudio.utils.ops import get_mvp_matrix, get_projection_matrix

STILL = {"camera_perturb": 0.0, "center_perturb": 0.0, "up_perturb": 0.0}
DEFAULTS = {
    "height": 64, "width": 64, "batch_size": 1, "resolution_milestones": [], "eval_height": 512,
    "eval_width": 512, "eval_batch_size": 1, "n_val_views": 1, "n_test_views": 120,
    "elevation_range": (-10, 90), "azimuth_range": (-180, 180), "camera_distance_range": (1, 1.5),
    "fovy_range": (40, 70), "camera_perturb": 0.1, "center_perturb": 0.2, "up_perturb": 0.02,
    "light_position_perturb": 1.0, "light_distance_range": (0.8, 1.5), "eval_elevation_deg": 15.0,
    "eval_camera_distance": 1.5, "eval_fovy_deg": 70.0, "light_sample_strategy": "dreamfusion",
    "batch_uniform_azimuth": True, "progressive_until": 0, "rays_d_normalize": True,
}  # fmt: skip


def config(**given):
    return parse_structured(RandomCameraDataModuleConfig, {"height": 4, "width": 6, **given})


def batches(cfg, steps):
    """What the endless dataset collates for the first steps."""
    dataset = RandomCameraIterableDataset(cfg)
    stream = iter(dataset)
    made = []
    for step in range(steps):
        dataset.update_step(0, step)
        made.append(dataset.collate(next(stream)))
    return made


def many(key, cfg, steps):
    return torch.cat([batch[key] for batch in batches(cfg, steps)])


def eval_view(index=0, split="test", **given):
    dataset = RandomCameraDataset(config(eval_height=4, eval_width=6, **given), split)
    return dataset.collate([dataset[index]])


def test_defaults():
    cfg = parse_structured(RandomCameraDataModuleConfig, {})
    got = {key: cfg[key] for key in DEFAULTS}
    assert {
        k: tuple(v) if isinstance(DEFAULTS[k], tuple) else v for k, v in got.items()
    } == DEFAULTS


def test_the_front_camera_by_hand():
    """Elevation 0, azimuth 0, distance 2: at (2, 0, 0), right is +y, up is +z."""
    view = eval_view(eval_elevation_deg=0, eval_camera_distance=2.0, eval_fovy_deg=90.0)
    expected = torch.tensor([[0.0, 0, 1, 2], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    assert torch.allclose(view["c2w"][0], expected, atol=1e-6)
    # H = 4, fovy = 90: focal = 2; the first pixel is 2.5 to the left and 1.5 up of the centre.
    first = torch.tensor([-2.0, -2.5, 1.5])
    assert torch.allclose(view["rays_d"][0, 0, 0], first / first.norm(), atol=1e-6)
    assert torch.allclose(view["rays_o"][0], torch.tensor([2.0, 0.0, 0.0]).expand(4, 6, 3))
    # near 0.01, far 100, aspect 6 / 4, y negated.
    projection = torch.zeros(4, 4)
    projection[0, 0], projection[1, 1] = 4 / 6, -1.0
    projection[2, 2], projection[2, 3] = -100.01 / 99.99, -2 / 99.99
    projection[3, 2] = -1.0
    assert torch.allclose(view["proj_mtx"][0], projection, atol=1e-5)
    world_to_camera = torch.linalg.inv(expected)
    assert torch.allclose(view["mvp_mtx"][0], projection @ world_to_camera, atol=1e-4)


@pytest.mark.parametrize(
    ("elevation", "azimuth", "position"),
    [(0, 90, (0, 1, 0)), (30, 0, (3**0.5 / 2, 0, 0.5)), (60, 180, (-0.5, 0, 3**0.5 / 2))],
)
def test_positions_go_from_x_to_y_and_up(elevation, azimuth, position):
    views = RandomCameraDataset(
        config(eval_elevation_deg=elevation, eval_camera_distance=2.0, n_test_views=361), "test"
    )
    view = views.collate([views[azimuth]])
    assert view["azimuth"].item() == pytest.approx(azimuth, abs=1e-3)
    expected = 2 * torch.tensor([position], dtype=torch.float32)
    assert torch.allclose(view["camera_positions"], expected, atol=1e-4)
    # The line of sight leads to the origin, and the horizon is level.
    assert torch.allclose(view["c2w"][0, :3, 2], expected[0] / 2, atol=1e-4)
    assert view["c2w"][0, 2, 0].abs() < 1e-6 and view["c2w"][0, 2, 1] > 0


def test_points_of_a_ray_project_to_its_pixel():
    (batch,) = batches(config(batch_size=2), 1)
    world = batch["rays_o"] + 1.3 * batch["rays_d"]
    clip = torch.einsum("bij,bhwj->bhwi", batch["mvp_mtx"], torch.cat(
        [world, torch.ones_like(world[..., :1])], dim=-1))  # fmt: skip
    ndc = clip[..., :2] / clip[..., 3:]
    columns = (torch.arange(6) + 0.5) / 6 * 2 - 1
    rows = (torch.arange(4) + 0.5) / 4 * 2 - 1
    assert torch.allclose(ndc[..., 0], columns.expand(2, 4, 6), atol=1e-4)
    # The negated row makes the first row of an image the smallest y.
    assert torch.allclose(ndc[..., 1], rows[:, None].expand(2, 4, 6), atol=1e-4)


def test_projection_helpers_agree_with_linear_algebra():
    fovy = torch.tensor([0.7, 1.1, 1.3])
    projection = get_projection_matrix(fovy, 1.5, 0.01, 100.0)
    assert torch.allclose(projection[:, 1, 1], -1 / torch.tan(fovy / 2))
    c2w = torch.cat([batch["c2w"] for batch in batches(config(), 3)])
    assert torch.allclose(
        get_mvp_matrix(c2w, projection), projection @ torch.linalg.inv(c2w), atol=1e-5
    )


def test_training_batches_have_the_contracts_keys():
    (batch,) = batches(config(batch_size=3), 1)
    shapes = {
        "rays_o": (3, 4, 6, 3), "rays_d": (3, 4, 6, 3), "mvp_mtx": (3, 4, 4), "c2w": (3, 4, 4),
        "proj_mtx": (3, 4, 4), "camera_positions": (3, 3), "light_positions": (3, 3),
        "elevation": (3,), "azimuth": (3,), "camera_distances": (3,), "fovy": (3,),
    }  # fmt: skip
    assert {key: tuple(batch[key].shape) for key in shapes} == shapes
    assert (batch["height"], batch["width"]) == (4, 6)
    assert torch.allclose(batch["rays_d"].norm(dim=-1), torch.ones(3, 4, 6), atol=1e-6)


def test_evaluation_views_turn_once_and_carry_their_light():
    val = [eval_view(k, "val", n_val_views=4)["azimuth"].item() for k in range(4)]
    assert val == pytest.approx([0, 90, 180, 270])
    test = [eval_view(k, "test", n_test_views=5)["azimuth"].item() for k in range(5)]
    assert test == pytest.approx([0, 90, 180, 270, 360])
    view = eval_view(3, n_test_views=5)
    assert view["index"].tolist() == [3] and (view["height"], view["width"]) == (4, 6)
    assert torch.equal(view["light_positions"], view["camera_positions"])
    assert view["elevation"].item() == 15.0 and view["camera_distances"].item() == 1.5
    assert view["fovy"].item() == pytest.approx(math.radians(70))


def test_angles_and_sizes_follow_their_laws():
    found = batches(config(batch_size=16, elevation_range=[-10, 80], **STILL), 24)
    elevation, distance, fovy = (
        torch.cat([batch[key] for batch in found])
        for key in ("elevation", "camera_distances", "fovy")
    )
    assert elevation.min() >= -10.001 and elevation.max() <= 80.001
    # Uniform in degrees the mean is 35, uniform on the sphere 30.3; a coin per batch chooses.
    assert elevation.mean() == pytest.approx(33, abs=6)
    assert distance.min() >= 1 and distance.max() <= 1.5
    assert distance.mean() == pytest.approx(1.25, abs=0.03)
    fovy = torch.rad2deg(fovy)
    assert fovy.min() >= 39.99 and fovy.max() <= 70.01 and fovy.mean() == pytest.approx(55, abs=2)


def test_azimuths_of_a_batch_are_spread_evenly():
    for batch in batches(config(batch_size=4, azimuth_range=[-180, 180]), 5):
        parts = torch.floor((batch["azimuth"] + 180) / 90)
        assert parts.tolist() == [0, 1, 2, 3]
    free = many("azimuth", config(batch_size=4, batch_uniform_azimuth=False), 8)
    assert not torch.equal(torch.floor((free + 180) / 90).view(-1, 4)[:, 0], torch.zeros(8))


def test_perturbation_is_uniform_per_axis_and_leaves_the_distance():
    quiet = {**STILL, "camera_perturb": 0.1}
    found = batches(config(batch_size=4, **quiet), 5)
    for batch in found:
        theta, phi = torch.deg2rad(batch["elevation"]), torch.deg2rad(batch["azimuth"])
        ideal = batch["camera_distances"][:, None] * torch.stack(
            [theta.cos() * phi.cos(), theta.cos() * phi.sin(), theta.sin()], dim=-1)  # fmt: skip
        assert (batch["camera_positions"] - ideal).abs().max() <= 0.1 + 1e-5
        assert torch.equal(batch["camera_positions"], batch["c2w"][:, :3, 3])
    rotations = torch.cat([batch["c2w"][:, :3, :3] for batch in found])
    assert torch.allclose(rotations @ rotations.mT, torch.eye(3).expand_as(rotations), atol=1e-5)


@pytest.mark.parametrize("strategy", ["dreamfusion", "magic3d"])
def test_lights_lie_at_their_distance(strategy):
    cfg = config(batch_size=4, light_sample_strategy=strategy, **STILL)
    found = batches(cfg, 8)
    lights = torch.cat([batch["light_positions"] for batch in found])
    distance = lights.norm(dim=-1)
    assert distance.min() >= 0.8 - 1e-4 and distance.max() <= 1.5 + 1e-4
    if strategy == "magic3d":
        # Elevated by 30 to 90 degrees over the plane that faces the camera.
        towards = torch.cat([batch["c2w"][:, :3, 2] for batch in found])
        sine = (lights / distance[:, None] * towards).sum(-1)
        assert sine.min() >= 0.5 - 1e-4


def test_resolution_changes_at_its_milestones():
    cfg = config(height=[4, 8], width=[6, 12], batch_size=[2, 1], resolution_milestones=[3])
    shapes = [tuple(batch["rays_d"].shape) for batch in batches(cfg, 5)]
    assert shapes == [(2, 4, 6, 3)] * 3 + [(1, 8, 12, 3)] * 2


def test_views_widen_from_the_front():
    cfg = config(batch_size=8, progressive_until=9, eval_elevation_deg=20.0, azimuth_range=[0, 180])
    found = batches(cfg, 12)
    for step in (0, 5, 11):
        share = min(1.0, step / 10)
        # Eight azimuths, one in each eighth of the range.
        assert 180 * share * 7 / 8 - 1e-3 <= found[step]["azimuth"].max() <= 180 * share + 1e-3
        low, high = 20 + share * (-10 - 20), 20 + share * (90 - 20)
        assert low - 1e-3 <= found[step]["elevation"].min()
        assert found[step]["elevation"].max() <= high + 1e-3


def test_the_data_module_serves_all_loops_in_this_process():
    sizes = {"height": 2, "width": 2, "eval_height": 2, "eval_width": 2}
    module = threestudio.find("random-camera-datamodule")(
        {**sizes, "n_val_views": 2, "n_test_views": 3}
    )
    module.setup()
    train = module.train_dataloader()
    assert train.num_workers == 0 and train.batch_size is None
    assert next(iter(train))["rays_o"].shape == (1, 2, 2, 3)
    loaders = (module.val_dataloader(), module.test_dataloader(), module.predict_dataloader())
    assert [len(loader) for loader in loaders] == [2, 3, 3]
