"""A scene from its checkpoint alone: the same pictures in a fresh process, no diffusion model."""

import copy
import json
import math
import subprocess
import sys

import pytest
import threestudio
import torch
from threestudio.utils.checkpoint import load_checkpoint, save_checkpoint

import custom.fourd  # noqa: F401 - registers the names
from custom.fourd.ops.camera import camera_from_orbit, camera_rays, intrinsics_from_fovy
from custom.fourd.renderers.scene import Scene, load_scene
from tests.fixtures.launched import ROOT, trained

C2W = camera_from_orbit(torch.tensor([10.0, 30.0]), torch.tensor([20.0, 200.0]), 3.0)
FOVY = torch.full((2,), math.radians(40))
SIZE = (9, 11)

FRESH = """
import json, sys
import torch
from custom.fourd.renderers.scene import load_scene
import custom.fourd
sys.path.insert(0, sys.argv[2])
given = torch.load(sys.argv[2] + "/views.pt", weights_only=True)
images = load_scene(sys.argv[1]).render(given["c2w"], given["fovy"], *given["size"])
torch.save(vars(images), sys.argv[2] + "/images.pt")
heavy = ("diffusers", "transformers", "pytorch_lightning")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


@pytest.fixture(scope="module")
def run():
    result = trained()
    assert result.status == 0, result.errors
    return result


@pytest.fixture(scope="module")
def scene(run):
    return load_scene(run.checkpoint)


@pytest.fixture
def checkpoint(run):
    return copy.deepcopy(load_checkpoint(run.checkpoint))


def same(first, second):
    names = ("rgb", "alpha", "depth")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


def test_a_fresh_process_renders_the_same_without_heavy_libraries(run, scene, tmp_path):
    torch.save({"c2w": C2W, "fovy": FOVY, "size": SIZE}, tmp_path / "views.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(run.checkpoint), str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    there = torch.load(tmp_path / "images.pt", weights_only=True)
    here = scene.render(C2W, FOVY, *SIZE)
    for name in ("rgb", "alpha", "depth"):
        torch.testing.assert_close(there[name], getattr(here, name), atol=1e-6, rtol=0)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_the_loaded_scene_is_the_trained_system_s(run, scene, checkpoint):
    system = threestudio.find("fourdfy-system")(checkpoint["config"]["system"])
    system.load_state_dict(checkpoint["state_dict"])
    system.do_update_step(0, 2, on_load_weights=True)
    assert same(system.scene.render(C2W, FOVY, *SIZE), scene.render(C2W, FOVY, *SIZE))


def test_pixels_are_means_of_their_rays(scene):
    """Three rays per axis are the means of an image of three times the size."""
    height, width = SIZE
    intrinsics = intrinsics_from_fovy(FOVY, height, width)
    times = torch.tensor([0.2, 0.8])
    smooth = scene.film(C2W, intrinsics, height, width, times, samples_per_axis=3)
    fine = scene.film(
        C2W, intrinsics_from_fovy(FOVY, 3 * height, 3 * width), 3 * height, 3 * width, times
    )

    def means(images):
        moved = images.movedim(-1, 1)
        return torch.nn.functional.avg_pool2d(moved, 3).movedim(1, -1)

    torch.testing.assert_close(smooth.alpha, means(fine.alpha), atol=1e-5, rtol=0)
    torch.testing.assert_close(smooth.rgb, means(fine.rgb), atol=1e-5, rtol=0)
    opaque = means(fine.alpha * fine.depth) / means(fine.alpha).clamp_min(1e-5)
    seen = smooth.alpha > 0.01
    torch.testing.assert_close(smooth.depth[seen], opaque[seen], atol=1e-3, rtol=1e-3)
    assert same(scene.film(C2W, intrinsics, height, width, times, samples_per_axis=1),
                scene.render(C2W, FOVY, height, width, times))  # fmt: skip


def test_the_renderer_s_config_says_how_many_rays(scene, monkeypatch):
    one = scene.render(C2W, FOVY, *SIZE)
    assert scene.samples_per_axis == 1
    monkeypatch.setattr(scene.renderer.cfg, "samples_per_axis", 2)
    intrinsics = intrinsics_from_fovy(FOVY, *SIZE)
    assert same(scene.render(C2W, FOVY, *SIZE),
                scene.film(C2W, intrinsics, *SIZE, samples_per_axis=2))  # fmt: skip
    assert not same(scene.render(C2W, FOVY, *SIZE), one)
    over = scene.render(C2W, FOVY, *SIZE, background=torch.tensor([0.0, 1.0, 0.0]))
    assert over.rgb[0, 0, 0].tolist() == pytest.approx([0, 1, 0], abs=1e-3)
    keys = {"samples_per_axis": 0}
    with pytest.raises(ValueError, match="renderer.samples_per_axis is 0; expected 1 or more"):
        threestudio.find("nerf-volume-renderer")(keys, None, None, None)


def test_shapes_ranges_and_repeatability(scene):
    images = scene.render(C2W, FOVY, *SIZE)
    assert images.rgb.shape == (2, 9, 11, 3)
    assert images.alpha.shape == images.depth.shape == (2, 9, 11, 1)
    for image in (images.rgb, images.alpha):
        assert image.min() >= 0 and image.max() <= 1
    assert same(images, scene.render(C2W, FOVY, *SIZE)), "no randomness"
    assert not images.rgb.requires_grad


def test_cameras_of_a_batch_do_not_know_of_each_other(scene):
    both = scene.render(C2W, FOVY, *SIZE)
    one = scene.render(C2W[1:], FOVY[1:], *SIZE)
    torch.testing.assert_close(one.rgb, both.rgb[1:], atol=1e-5, rtol=0)


def raw(scene):
    rays_o, rays_d = camera_rays(C2W, intrinsics_from_fovy(FOVY, *SIZE), *SIZE)
    with torch.no_grad():
        return scene.renderer(rays_o=rays_o, rays_d=rays_d, light_positions=C2W[:, :3, 3], c2w=C2W)


def test_a_given_background_replaces_the_scene_s_own(scene):
    colour = torch.tensor([0.2, 0.9, 0.4])
    images, out = scene.render(C2W, FOVY, *SIZE, background=colour), raw(scene)
    expected = out["comp_rgb_fg"] + (1 - out["opacity"]) * colour
    torch.testing.assert_close(images.rgb, expected.clamp(0, 1))
    own = scene.render(C2W, FOVY, *SIZE)
    torch.testing.assert_close(own.rgb, out["comp_rgb"].clamp(0, 1))
    assert not torch.equal(own.rgb, images.rgb) and torch.equal(own.alpha, images.alpha)


def test_depth_is_the_expected_distance_of_what_was_hit(scene):
    images, out = scene.render(C2W, FOVY, *SIZE), raw(scene)
    hit = out["opacity"] > 1e-3
    torch.testing.assert_close(images.depth[hit], (out["depth"] / out["opacity"])[hit])
    assert not images.depth[~hit].any()
    # The box [-1, 1]^3 seen from 3 away lies between 3 - sqrt(3) and 3 + sqrt(3).
    assert (images.depth[hit] > 1.2).all() and (images.depth[hit] < 4.8).all()


def test_modes_come_back_even_after_an_error(scene):
    scene.geometry.train()
    scene.renderer.eval()
    scene.render(C2W, FOVY, *SIZE)
    assert scene.geometry.training and not scene.renderer.training
    broken = Scene(scene.geometry, scene.material, scene.background, lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.render(C2W, FOVY, *SIZE)
    assert scene.geometry.training
    scene.geometry.eval()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.ckpt"):
        load_scene(tmp_path / "nothing.ckpt")


def test_a_file_without_config_needs_its_run_folder(run, scene, checkpoint, tmp_path):
    plain = {"state_dict": checkpoint["state_dict"], "global_step": 2}
    alone = tmp_path / "run" / "ckpts" / "last.ckpt"
    alone.parent.mkdir(parents=True)
    save_checkpoint(alone, plain)
    with pytest.raises(ValueError, match="carries no config and .*parsed.yaml does not exist"):
        load_scene(alone)
    (tmp_path / "run" / "configs").mkdir()
    parsed = (run.folder / "configs" / "parsed.yaml").read_text()
    (tmp_path / "run" / "configs" / "parsed.yaml").write_text(parsed)
    assert same(load_scene(alone).render(C2W, FOVY, *SIZE), scene.render(C2W, FOVY, *SIZE))


def test_weights_that_are_missing_are_named(checkpoint, tmp_path):
    del checkpoint["state_dict"]["geometry.density_network.layers.0.weight"]
    save_checkpoint(tmp_path / "cut.ckpt", checkpoint)
    with pytest.raises(ValueError, match="no weights for geometry.density_network.layers.0.weight"):
        load_scene(tmp_path / "cut.ckpt")
