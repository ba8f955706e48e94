"""Upstream's 4D-fy checkpoints through `system.weights`: the scene is a slow reference's scene.

The files are those of `tests.fixtures.upstream_checkpoint`, of random tiny-cuda-nn parameters; the
reference evaluates them by loops that know tiny-cuda-nn's indexing and nothing of the runtime.
"""

import copy
import logging

import numpy as np
import pytest
import threestudio
import torch
from omegaconf import OmegaConf
from threestudio.utils.camera import camera_from_orbit

import custom.fourd  # noqa: F401 - registers the names
from custom.fourd.ops.camera import camera_rays, intrinsics_from_fovy
from custom.fourd.renderers.scene import load_scene
from tests.fixtures.launched import launch, planned
from tests.fixtures.upstream_checkpoint import (
    GRID,
    TIME_GRID,
    upstream_state,
    write_upstream_checkpoint,
)
from tests.fixtures.upstream_scene import UpstreamScene

STEP = 10000
SIZE, SAMPLES = 3, 16
# Config, whether the scene deforms, whether upstream's renderer was a wrapper (its low_vram
# configs), the dtype of the grids, the scene time, and the blob that the config gives at STEP.
CASES = [
    ("fourdfy_stage_1", False, False, torch.float32, 0.0, 0.5),
    ("fourdfy_stage_2", False, True, torch.float16, 0.0, 0.5),
    ("fourdfy_stage_3", False, False, torch.float16, 0.3, 1.4),
    pytest.param(
        "fourdfy_stage_3_vc", False, True, torch.float32, 0.7, 0.5, marks=pytest.mark.slow
    ),
    ("fourdfy_stage_1_deformation", True, False, torch.float32, 0.0, 0.5),
    ("fourdfy_stage_3_deformation", True, True, torch.float32, 0.4, 0.5),
    pytest.param(
        "fourdfy_stage_3_vc_deformation",
        True,
        False,
        torch.float16,
        0.9,
        0.5,
        marks=pytest.mark.slow,
    ),
]


def system_config(config: str, weights) -> dict:
    """The system of a config on the grids of the file."""
    cfg = copy.deepcopy(planned(f"custom/configs/{config}.yaml", "test")["system"])
    encoding = cfg["geometry"]["pos_encoding_config"]
    encoding.update(GRID, skip_time_when_static=False)
    if "time_encoding_config" in encoding:
        encoding["time_encoding_config"].update(TIME_GRID)
    return {**cfg, "weights": str(weights)}


@pytest.mark.parametrize(("config", "deforms", "wrapped", "dtype", "time", "blob_std"), CASES)
def test_density_colour_and_image_are_the_reference_s(
    config, deforms, wrapped, dtype, time, blob_std, tmp_path
):
    state = upstream_state(deforms, wrapped, dtype=dtype)
    path = write_upstream_checkpoint(tmp_path / "last.ckpt", state, STEP)
    system = threestudio.find("fourdfy-system")(system_config(config, path)).eval()
    static = system.cfg.geometry.pos_encoding_config.static
    assert system.geometry.density_blob_std == pytest.approx(blob_std)
    expected = UpstreamScene(state, GRID, TIME_GRID if deforms else None, blob_std, static)
    check_points(system, expected, None if static else time)
    check_image(system, expected, None if static else time)


def check_points(system, expected, time):
    """Density and colour inside the box, where no small displacement leads out of it."""
    points = torch.rand((24, 3), generator=torch.Generator().manual_seed(5)) * 1.6 - 0.8
    with torch.no_grad():
        times = None if time is None else torch.full((24,), time)
        out = system.geometry(points, frame_times=times)
        colors = system.material(features=out["features"])
    pairs = [expected.density_and_color(point, time) for point in points.numpy()]
    densities = torch.tensor([density for density, _ in pairs])
    assert densities.std() > 0.1, "the scene must not be flat"
    assert torch.allclose(out["density"][:, 0].double(), densities, atol=2e-4)
    assert torch.allclose(colors.double(), torch.tensor(np.stack([c for _, c in pairs])), atol=1e-4)


def check_image(system, expected, time):
    c2w = camera_from_orbit(torch.tensor([20.0]), torch.tensor([35.0]), torch.tensor([3.0]))
    fovy, times = torch.tensor([0.35]), None if time is None else torch.tensor([time])
    image = system.scene.render(c2w, fovy, SIZE, SIZE, times, background=torch.zeros(3))
    rays_o, rays_d = camera_rays(c2w, intrinsics_from_fovy(fovy, SIZE, SIZE), SIZE, SIZE)
    rays = zip(rays_o.reshape(-1, 3).numpy(), rays_d.reshape(-1, 3).numpy(), strict=True)
    rendered = [expected.render_ray(*ray, time, SAMPLES) for ray in rays]
    rgb = torch.tensor(np.stack([color for color, _ in rendered]))
    alpha = torch.tensor([opacity for _, opacity in rendered]).double()
    assert alpha.max() > 0.3 and rgb.std() > 0.01
    assert torch.allclose(image.rgb.reshape(-1, 3).double(), rgb, atol=1e-3)
    assert torch.allclose(image.alpha.reshape(-1).double(), alpha, atol=1e-3)


@pytest.fixture
def upstream_file(tmp_path):
    return write_upstream_checkpoint(tmp_path / "last.ckpt", upstream_state(), STEP)


def lines(caplog, path) -> list[str]:
    return [r.getMessage() for r in caplog.records if str(path) in r.getMessage()]


def test_what_is_ignored_is_said_once(upstream_file, caplog):
    with caplog.at_level(logging.INFO):
        threestudio.find("fourdfy-system")(system_config("fourdfy_stage_1", upstream_file))
    assert lines(caplog, upstream_file) == [
        f"guidance of {upstream_file} is not part of this system and is ignored."
    ]


def test_what_the_file_lacks_starts_fresh_with_a_line(tmp_path, caplog):
    state = upstream_state(multi_view=False)
    kept = {k: v for k, v in state.items() if not k.startswith(("background.", "renderer."))}
    path = write_upstream_checkpoint(tmp_path / "last.ckpt", kept)
    with caplog.at_level(logging.INFO):
        system = threestudio.find("fourdfy-system")(system_config("fourdfy_stage_1", path))
    said = lines(caplog, path)
    assert f"background is not in {path} and starts fresh." in said
    assert all("starts fresh" in line for line in said)
    assert system.renderer.estimator.binaries.all(), "a fresh occupancy grid is full"


def test_the_occupancy_grid_is_the_file_s(upstream_file):
    system = threestudio.find("fourdfy-system")(system_config("fourdfy_stage_1", upstream_file))
    expected = upstream_state()["renderer.estimator.binaries"]
    assert torch.equal(system.renderer.estimator.binaries, expected)
    assert 0.5 < expected.float().mean() < 0.8


def test_a_wider_network_is_refused_with_its_keys(tmp_path):
    state = upstream_state()
    state["geometry.density_network.layers.0.weight"] = torch.zeros(128, 6)
    state["geometry.density_network.layers.2.weight"] = torch.zeros(1, 128)
    path = write_upstream_checkpoint(tmp_path / "last.ckpt", state)
    keys = (
        r"density_network\.layers\.0\.weight: shape \(128, 6\) in the file, \(64, 6\) here; "
        r".*layers\.2\.weight: shape.*upstream's have the sizes of profile=low_vram"
    )
    with pytest.raises(ValueError, match=rf"does not fit this system: .*{keys}"):
        threestudio.find("fourdfy-system")(system_config("fourdfy_stage_1", path))


def test_deformation_weights_are_no_weights_of_a_4d_grid(tmp_path):
    path = write_upstream_checkpoint(tmp_path / "last.ckpt", upstream_state(deforms=True))
    with pytest.raises(ValueError, match=r"encoding_time\.params: here, but not in the file"):
        threestudio.find("fourdfy-system")(system_config("fourdfy_stage_3", path))


def test_last_names_the_newest_trial(tmp_path):
    for stamp, seed in (("@20240101-000000", 1), ("@20240102-000000", 2)):
        write_upstream_checkpoint(
            tmp_path / f"a_red_cube{stamp}" / "ckpts" / "last.ckpt", upstream_state(seed=seed)
        )
    weights = tmp_path / "a red cubeLAST" / "ckpts" / "last.ckpt"
    system = threestudio.find("fourdfy-system")(system_config("fourdfy_stage_1", weights))
    expected = upstream_state(seed=2)["geometry.encoding.encoding.encoding.params"]
    assert torch.equal(system.geometry.encoding.encoding.encoding.params, expected)


@pytest.fixture
def upstream_trial(tmp_path):
    """A trial folder of upstream's: the checkpoint and the config that it was trained with."""
    path = tmp_path / "trial" / "ckpts" / "last.ckpt"
    write_upstream_checkpoint(path, upstream_state(), STEP)
    system = system_config("fourdfy_stage_1", path)
    (tmp_path / "trial" / "configs").mkdir()
    OmegaConf.save({"name": "fourdfy_stage_1", "system": {**system, "weights": None}},
                   tmp_path / "trial" / "configs" / "parsed.yaml")  # fmt: skip
    return path


def test_geometry_convert_from_takes_geometry_alone(upstream_trial):
    cfg = {**system_config("fourdfy_stage_1", ""), "weights": None}
    cfg["geometry_convert_from"] = str(upstream_trial).replace("trial", "triLAST", 1)
    cfg["geometry_convert_inherit_texture"] = True
    system = threestudio.find("fourdfy-system")(cfg)
    expected = UpstreamScene(upstream_state(), GRID, None, 0.5, True)
    point = np.array([0.2, -0.3, 0.1])
    out = system.geometry(torch.tensor(point, dtype=torch.float32)[None])
    density, _ = expected.density_and_color(point, 0.0)
    assert out["density"].item() == pytest.approx(density, abs=2e-4)
    assert system.renderer.estimator.binaries.all(), "the renderer is not converted"


def test_a_scene_is_loaded_from_an_upstream_trial(upstream_trial):
    scene = load_scene(upstream_trial)
    params = upstream_state()["geometry.encoding.encoding.encoding.params"]
    assert torch.equal(scene.geometry.encoding.encoding.encoding.params, params)
    assert torch.equal(scene.renderer.estimator.binaries,
                       upstream_state()["renderer.estimator.binaries"])  # fmt: skip


def test_the_launcher_renders_upstream_weights(upstream_file, tmp_path):
    overrides = [f"system.geometry.pos_encoding_config.{k}={v}" for k, v in GRID.items()]
    run = launch("--test", tmp_path, f"system.weights={upstream_file}", *overrides,
                 "data.single_view.n_test_views=1")  # fmt: skip
    assert run.status == 0, run.errors
    assert list((run.folder / "save").glob("it*-test/0.png"))
