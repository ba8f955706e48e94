"""A field from videos, end to end: 3 cameras, 4 frames, 32 pixels of a scene of the world."""

import json

import pytest
import threestudio
import torch
from PIL import Image
from threestudio.utils.checkpoint import load_checkpoint

import custom.fourd  # noqa: F401 - registers the names
from custom.fourd.data.camera_path import camera_path, transforms_json
from custom.fourd.metrics.image_quality import psnr
from custom.fourd.ops.camera import intrinsics_from_fovy, seen_share
from custom.fourd.renderers.scene import load_scene
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.writers import write_dynerf
from tests.fixtures.launched import launch, planned
from tests.fixtures.tiny_scenes import random_scene

CONFIG = "custom/configs/instruct4d_train.yaml"
STEPS = 40
TRAINING = [
    "data.batch_size=256", "system.renderer.num_samples_per_ray=32",
    "system.geometry.pos_encoding_config.n_levels=4", "trainer.val_check_interval=1000",
    "system.geometry.pos_encoding_config.log2_hashmap_size=10", "system.scheduler.args.gamma=1.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "world"
    return folder, write_dynerf(folder, parse_caption("a red cube sliding"), 3, 4, 32)


def fit(folder, videos, *overrides, steps=STEPS):
    return launch("--train", folder, f"data.dataroot={videos[0]}", f"trainer.max_steps={steps}",
                  *TRAINING, *overrides, config=CONFIG)  # fmt: skip


@pytest.fixture(scope="module")
def run(videos, tmp_path_factory):
    result = fit(tmp_path_factory.mktemp("run"), videos)
    assert result.status == 0, result.errors
    return result


@pytest.fixture(scope="module")
def cut(videos, tmp_path_factory):
    """A run in which places are closed or held still."""
    result = fit(
        tmp_path_factory.mktemp("cut"), videos, "system.min_seen_share=1.0",
        "system.min_moving_share=0.5", "system.geometry.pos_encoding_config.motion_cells=16",
        steps=20,
    )  # fmt: skip
    assert result.status == 0, result.errors
    return result


def test_places_where_nothing_changes_are_held_still(cut, run):
    """The checkpoint knows them: there and only there density is the same at all times."""
    geometry = load_scene(cut.checkpoint).geometry
    encoding = geometry.encoding.encoding
    assert 0.02 < encoding.moves.float().mean() < 0.9
    low, high = geometry.bbox
    points = low + encoding.motion_cell_centres * (high - low)
    density = [geometry.forward_density(points, torch.full((len(points),), t)) for t in (0.0, 0.7)]
    differs = (density[0] != density[1]).flatten()
    moves = encoding.moves.flatten()
    assert not differs[~moves].any() and differs[moves].float().mean() > 0.9
    assert load_scene(run.checkpoint).geometry.encoding.encoding.moves is None


def test_places_that_few_cameras_see_stay_empty(run, cut, videos):
    """The cameras see the whole box but its corners; near them something grows, unless closed."""
    capture = videos[1]
    grids = [load_scene(each.checkpoint).renderer.estimator for each in (run, cut)]
    rows = capture.camera_ids > 0
    fovy = torch.full((int(rows.sum()),), capture.fovy_rad)
    cameras = capture.c2w[rows], intrinsics_from_fovy(fovy, 32, 32)
    unseen = seen_share(grids[0].cell_centres, *cameras, 32, 32) < 1
    assert 0.01 < unseen.float().mean() < 0.5
    assert grids[0].binaries.view(-1)[unseen].any()
    assert not grids[1].binaries.view(-1)[unseen].any() and grids[1].binaries.any()


def losses(run) -> list[float]:
    (path,) = run.folder.glob("csv_logs/**/metrics.csv")
    names, *rows = (line.split(",") for line in path.read_text().splitlines())
    column = names.index("train/loss_rgb")
    return [float(row[column]) for row in rows if row[column]]


def test_the_loss_falls(run):
    values = losses(run)
    assert len(values) == STEPS
    assert sum(values[-5:]) < 0.5 * sum(values[:5])


def test_the_test_writes_pictures_video_and_figures(run):
    save = run.folder / "save"
    metrics = json.loads((save / "metrics.json").read_text())
    assert metrics["views"] == 4 and metrics["steps"] == STEPS and metrics["profile"] == "test"
    assert list(metrics["psnr_by_camera"]) == ["0"], "only the held-out camera"
    assert metrics["psnr_min"] <= metrics["psnr"] and metrics["psnr"] > 12
    assert (save / f"it{STEPS}-test.mp4").is_file()
    with Image.open(save / f"it{STEPS}-test-sheet.png") as sheet:
        assert sheet.size == (4 * 32, 3 * 32), "four times; render, truth and depth"
    assert len(list((save / f"it{STEPS}-test").glob("*.png"))) == 4


def test_the_checkpoint_describes_itself(run, videos):
    """Nothing but the file: the same figures come out, with depth in world units."""
    capture = videos[1]
    held_out = capture.camera_ids == 0
    scene = load_scene(run.checkpoint)
    fovy = torch.full((4,), capture.fovy_rad)
    images = scene.render(capture.c2w[held_out], fovy, 32, 32, capture.frame_times[held_out])
    metrics = json.loads((run.folder / "save" / "metrics.json").read_text())
    rgb, depth = capture.render()
    # The frames went through a video codec, near to lossless.
    found = psnr(images.rgb, rgb[held_out]).mean()
    assert float(found) == pytest.approx(metrics["psnr"], abs=0.3)
    near, far = capture.bounds
    seen = images.depth[images.alpha > 0.5]
    assert len(seen) and near < float(seen.min()) and float(seen.max()) < far
    assert load_checkpoint(run.checkpoint)["config"]["data"]["dataroot"] == str(videos[0])


def test_resuming_gives_the_same_bits(run, videos, tmp_path):
    """Occupancy, optimizer, rays and jitter all go on where they were."""
    half = fit(tmp_path, videos, steps=STEPS // 2 + 1)
    assert half.status == 0, half.errors
    done = fit(tmp_path / "on", videos, f"resume={half.checkpoint}")
    assert done.status == 0, done.errors
    # A resumed run goes on in its own folder.
    checkpoints = [c for c in (done.checkpoint, half.checkpoint) if c.is_file()]
    states = [load_checkpoint(path) for path in (run.checkpoint, checkpoints[0])]
    assert [state["global_step"] for state in states] == [STEPS, STEPS]
    one, other = (state["state_dict"] for state in states)
    assert set(one) == set(other)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_a_scene_of_ours_comes_in_as_exported(tmp_path):
    """Renders with `transforms.json`, as the exporter writes them, are the scene's own rays."""
    scene = random_scene()
    path = camera_path("orbit", 5, elevation_deg=15.0, distance=3.0, fovy_deg=40.0)
    images = scene.render(path.c2w, path.fovy, 16, 16, path.frame_times)
    names = [f"{index}.png" for index in range(5)]
    for name, rgb in zip(names, images.rgb, strict=True):
        Image.fromarray((rgb * 255).round().byte().numpy()).save(tmp_path / name)
    text = json.dumps(transforms_json(path, 16, 16, names))
    (tmp_path / "transforms.json").write_text(text, encoding="utf-8")
    keys = {"dataroot": str(tmp_path), "batch_size": 64}
    data = threestudio.find("transforms-datamodule")(keys)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    again = scene.render_rays(
        batch["rays_o"][:, None, None], batch["rays_d"][:, None, None], batch["frame_times"]
    )
    assert images.alpha.max() > 0.5
    assert float((again.rgb[:, 0, 0] - batch["rgb"]).abs().max()) < 0.51 / 255 + 1e-4


def system(**keys):
    config = planned(CONFIG, "test")["system"] | {"weights": None} | keys
    return threestudio.find("fourd-reconstruction-system")(config)


def test_variation_terms_are_there_when_weighed():
    fitted = system(loss={"lambda_rgb": 1.0, "lambda_tv_space": 0.1, "lambda_tv_time": 0.1})
    terms = fitted._variation()
    assert set(terms) == {"loss_tv_space", "loss_tv_time"}
    sum(terms.values()).backward()
    assert fitted.geometry.encoding.encoding.encoding_time.params.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"color_loss": "l1"}, "system.color_loss is 'l1'; expected one of mse, charbonnier"),
        ({"variation_time_step": 2.0}, "system.variation_time_step has the value 2.0"),
        ({"background": {"random_aug": True}}, "frames of a video have no alpha"),
        ({"min_seen_share": 2}, "system.min_seen_share has the value 2"),
        (
            {"min_seen_share": 0.5, "renderer": {"grid_prune": False}},
            "min_seen_share is 0.5, but the renderer keeps no occupancy grid",
        ),
        ({"min_moving_share": -1}, "system.min_moving_share has the value -1"),
        (
            {"min_moving_share": 0.5},
            "min_moving_share is 0.5, but the geometry has no cells .*motion_cells, 32 for example",
        ),
    ],
)
def test_keys_that_cannot_work_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        system(**keys)


def test_blocks_of_a_renderer_keep_a_grid_too():
    blocks = {"base_renderer": {"num_samples_per_ray": 8}}
    keys = {"min_seen_share": 0.5, "renderer_type": "stable-nerf-volume-renderer"}
    assert system(renderer=blocks, **keys).cfg.min_seen_share == 0.5
    blocks["base_renderer"]["grid_prune"] = False
    with pytest.raises(ValueError, match="keeps no occupancy grid"):
        system(renderer=blocks, **keys)


def test_rays_that_the_field_cannot_see_are_refused():
    fitted = system()
    rays = {"rays_o": torch.full((8, 3), 9.0), "rays_d": torch.eye(3)[[0] * 8], "near": 1.0,
            "far": 2.0}  # fmt: skip
    with pytest.raises(ValueError, match="0.0% of the training rays meet the scene's box"):
        fitted._check_rays(rays)
    with pytest.raises(ValueError, match="Set data.space=world"):
        fitted._check_rays(rays | {"world_rays_o": rays["rays_o"]})


def test_missing_videos_are_named(tmp_path):
    run = launch("--train", tmp_path, "data.dataroot=nowhere", config=CONFIG)
    assert run.status != 0 and "data.dataroot is 'nowhere', which does not exist" in run.errors


def test_the_system_is_the_base_of_all_that_fit_videos():
    from custom.fourd.systems.video_reconstruction import VideoReconstruction

    assert isinstance(system(), VideoReconstruction)
