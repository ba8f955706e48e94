"""One training step on rays of videos: whose time, which jitter, which terms; by hand."""

import pytest
import torch

from custom.fourd.losses.reconstruction import color_loss
from tests.fixtures.video_systems import random_video_system as system


def batch_of(n_rays=6):
    """Rays from three units away through the box, every one at a time of its own."""
    generator = torch.Generator().manual_seed(1)
    target = 0.4 * torch.randn(n_rays, 3, generator=generator)
    origin = torch.tensor([[3.0, 0.2, 0.4]]).expand(n_rays, 3)
    return {
        "rays_o": origin,
        "rays_d": torch.nn.functional.normalize(target - origin, dim=-1),
        "frame_times": torch.linspace(0, 1, n_rays),
        "rgb": torch.rand(n_rays, 3, generator=generator),
        "near": 1.0,
        "far": 5.0,
    }


def test_every_ray_shows_its_own_time():
    fitted, batch = system().eval(), batch_of()
    together = fitted(batch)["comp_rgb"][:, 0, 0]
    for index in range(len(together)):
        alone = {k: v[index : index + 1] for k, v in batch.items() if torch.is_tensor(v)}
        scene = fitted.scene.render_rays(
            alone["rays_o"][:, None, None], alone["rays_d"][:, None, None], alone["frame_times"]
        )
        torch.testing.assert_close(together[index], scene.rgb[0, 0, 0], atol=1e-5, rtol=0)
    still = fitted(batch | {"frame_times": torch.zeros(6)})["comp_rgb"][:, 0, 0]
    assert (still - together)[1:].abs().max() > 1e-3, "the field moves, or this shows nothing"


def test_samples_are_jittered_ray_by_ray_and_anew_at_every_step():
    fitted = system()
    first = fitted._jitter(64)
    assert first.shape == (64, 1, 1) and len(first.unique()) == 64
    assert torch.equal(first, fitted._jitter(64)), "a resumed step draws the same"
    fitted.set_resume_status(0, 7)
    assert not torch.equal(first, fitted._jitter(64))


def test_training_marches_with_the_jitter_of_the_step(monkeypatch):
    fitted, batch = system(), batch_of()
    monkeypatch.setattr(fitted, "_jitter", lambda count: torch.full((count, 1, 1), 0.2))
    one = fitted(batch)["comp_rgb"]
    assert torch.equal(one, fitted(batch)["comp_rgb"])
    monkeypatch.setattr(fitted, "_jitter", lambda count: torch.full((count, 1, 1), 0.7))
    assert not torch.equal(one, fitted(batch)["comp_rgb"])


def loss(monkeypatch, batch, out, **keys):
    """The loss of a step whose renders are known, and what was logged."""
    fitted, logged = system(**keys), {}
    monkeypatch.setattr(fitted, "forward", lambda batch: out)
    monkeypatch.setattr(fitted, "log", lambda name, value, **_: logged.update({name: value}))
    result = float(fitted.training_step(batch, 0)["loss"].detach())
    return result, {name: float(torch.as_tensor(value).detach()) for name, value in logged.items()}


def test_the_loss_is_that_of_the_colours_and_of_every_weighed_term(monkeypatch):
    batch = batch_of()
    rgb, opacity = batch["rgb"] + 0.1, torch.full((6, 1, 1, 1), 0.25)
    out = {"comp_rgb": rgb[:, None, None], "opacity": opacity}
    plain, logged = loss(monkeypatch, batch, out)
    assert plain == pytest.approx(0.01, rel=1e-4)
    assert logged["train/psnr"] == pytest.approx(20, abs=1e-3)
    forgiving, _ = loss(monkeypatch, batch, out, color_loss="charbonnier")
    assert forgiving == pytest.approx(float(color_loss(rgb, batch["rgb"], "charbonnier")))
    weights = {"lambda_rgb": 2.0, "lambda_sparsity": 3.0}
    sparse, logged = loss(monkeypatch, batch, out, loss=weights)
    assert sparse == pytest.approx(0.02 + 3 * logged["train/loss_sparsity"], rel=1e-4)
    assert logged["train/loss_sparsity"] == pytest.approx(0.25, abs=0.03)
    weights = {"lambda_rgb": 1.0, "lambda_tv_surface": 6.0}
    out["depth"] = torch.full((6, 1, 1, 1), 0.25 * 3)
    out["opacity"] = torch.full((6, 1, 1, 1), 0.9)
    uneven, logged = loss(monkeypatch, batch, out, loss=weights)
    term = logged["train/loss_tv_surface"]
    assert term > 0 and uneven == pytest.approx(0.01 + 6 * term, rel=1e-4)
    weights = {"lambda_rgb": 1.0, "lambda_tv_space": 4.0, "lambda_tv_time": 5.0}
    restless, logged = loss(monkeypatch, batch, out, loss=weights)
    terms = 4 * logged["train/loss_tv_space"] + 5 * logged["train/loss_tv_time"]
    assert terms > 0 and restless == pytest.approx(0.01 + terms, rel=1e-4)


def test_a_pixel_is_compared_with_the_mean_of_its_rays(monkeypatch):
    """Rays of one pixel may differ, as long as their mean is right."""
    batch = batch_of() | {"rays_per_pixel": 3}
    batch["rgb"] = batch["rgb"][:2]
    spread = torch.tensor([-0.3, 0.1, 0.2])[None, :, None]
    rays = (batch["rgb"][:, None] + spread + 0.1).flatten(0, 1)
    out = {"comp_rgb": rays[:, None, None], "opacity": torch.ones(6, 1, 1, 1)}
    assert loss(monkeypatch, batch, out)[0] == pytest.approx(0.01, rel=1e-4)


def test_variation_looks_around_the_whole_box_at_all_times(monkeypatch):
    """Pairs of points are near each other and inside; times fill [0, 1]."""
    fitted = system(loss={"lambda_rgb": 1.0, "lambda_tv_space": 1.0, "lambda_tv_time": 1.0})
    seen = []
    original = fitted.geometry.forward

    def watch(points, **keys):
        seen.append((points, keys["frame_times"]))
        return original(points, **keys)

    monkeypatch.setattr(fitted.geometry, "forward", watch)
    fitted._variation()
    (moved, times), (points, _), (later, later_times), (same, _) = seen
    assert float(points.abs().max()) <= 1 and float(points.std()) == pytest.approx(0.577, abs=0.03)
    assert float(moved.abs().max()) <= 1
    assert float((moved - points).abs().max()) == pytest.approx(0.02, abs=0.002)
    assert float(times.mean()) == pytest.approx(0.5, abs=0.03) and float(times.std()) > 0.25
    assert torch.equal(later, same)
    torch.testing.assert_close((later_times - times).abs(), torch.full_like(times, 0.05))


def test_surfaces_are_compared_with_what_is_beside_them(monkeypatch):
    """Where rays end, at their times; rays that meet nothing do not count, and nothing is moved."""
    fitted, batch = system(loss={"lambda_rgb": 1.0, "lambda_tv_surface": 1.0}), batch_of(40)
    depth = torch.linspace(2.6, 3.2, 40).requires_grad_()
    opacity = torch.full((40,), 0.8)
    opacity[::2] = 0.4
    ends = batch["rays_o"] + batch["rays_d"] * (depth.detach() / opacity)[:, None]
    depth_of_rays = (depth * 1.0).view(40, 1, 1, 1)
    seen = []

    def values(points, times, viewdirs):
        seen.append((points, times, viewdirs))
        beside, later = len(seen) > 1, times[:, None]
        alphas = 0.2 + 0.4 * later if beside else torch.full_like(later, 0.5)
        return alphas, (later * beside + 0 * points).requires_grad_()

    monkeypatch.setattr(fitted, "_opacity_and_colour", values)
    out = {"opacity": opacity.view(40, 1, 1, 1), "depth": depth_of_rays}
    loss = fitted._surface_variation(batch, out)
    (points, times, dirs), (beside, same, _) = seen
    order = times.argsort()
    assert torch.equal(times[order], batch["frame_times"]) and torch.equal(times, same)
    torch.testing.assert_close(points[order], ends.clamp(-1, 1))
    torch.testing.assert_close(dirs[order], batch["rays_d"])
    assert 0.01 < float((beside - points).abs().max()) <= 0.02 + 1e-6
    # Twenty pairs, which differ by their time, and each is as solid as both of its places.
    hits = batch["frame_times"][1::2]
    weights = 0.5 * (0.2 + 0.4 * hits)
    assert float(loss.detach()) == pytest.approx(float((weights * hits).sum() / weights.sum()))
    loss.backward()
    assert depth.grad is None


def test_empty_space_has_no_colour_and_a_solid_is_as_good_as_a_denser_one(monkeypatch):
    fitted = system()
    points, times = torch.rand(32, 3) - 0.5, torch.rand(32)
    found = {}
    for name, density in (("empty", 0.0), ("thin", 15.0), ("solid", 1e4), ("denser", 1e5)):
        out = {"density": torch.full((32, 1), density), "features": torch.rand(32, 3)}
        monkeypatch.setattr(fitted.geometry, "forward", lambda *_, out=out, **__: out)
        found[name] = fitted._values(points, times)
    assert bool((found["empty"] == 0).all())
    # A thirtieth of a box of edge 2 at density 15 lets exp(-1) through.
    torch.testing.assert_close(found["thin"][:, 0], torch.full((32,), 1 - 2.718281828**-1))
    assert torch.equal(found["solid"][:, 0], found["denser"][:, 0])


def test_rays_are_checked_by_how_many_meet_the_box():
    fitted, batch = system(), batch_of(40)
    away = batch | {"rays_d": -batch["rays_d"]}
    with pytest.raises(ValueError, match="0.0% of the training rays"):
        fitted._check_rays(away)
    mixed = {**away, "rays_d": torch.cat((batch["rays_d"][:2], away["rays_d"][2:]))}
    fitted._check_rays(mixed)  # 5 % are enough: patches of a batch may look past the scene
    fitted._check_rays(away)  # and only the first batch is looked at
