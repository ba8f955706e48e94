"""Rendering with lists of fixed length against rendering with lists of any length."""

import pytest
import threestudio
import torch
from threestudio.models.renderers.ray_samplers import DynamicSampler, StaticSampler
from threestudio.models.renderers.volume_rendering import RaySamples

from tests.fixtures.device_waits import WatchForWaits
from tests.runtime.models.renderers.test_nerf_volume_renderer import (
    Ball,
    TimelessBall,
    build,
    orbit_rays,
    render,
)

IMAGES = ("comp_rgb", "comp_rgb_fg", "opacity", "depth", "z_variance")
PROPOSAL = {
    "estimator": "proposal",
    "num_samples_per_ray": 8,
    "num_samples_per_ray_proposal": 6,
    "proposal_network_config": {
        "encoding_config": {"otype": "Frequency", "n_frequencies": 2},
        "network_config": {"otype": "VanillaMLP", "n_neurons": 8, "n_hidden_layers": 1},
    },
    "prop_optimizer_config": {"name": "SGD", "args": {"lr": 0.1}},
}


class Gem(Ball):
    """The ball, whose cells are asked at random times while a blob moves through."""

    def forward_density(self, points, frame_times=None):
        times = 0.0 if frame_times is None else frame_times[..., None]
        moved = points - (times - 0.5) * torch.tensor([0.5, 0.0, 0.0])
        return self.scale * torch.sigmoid(20 * (0.4 - moved.norm(dim=-1, keepdim=True)))


def outcome(renderer, **kwargs):
    """Outputs, and the gradient of something of all images by all parameters."""
    output = render(renderer, **kwargs)
    loss = (output["comp_rgb"] * output["depth"]).sum() + output["z_variance"].sum()
    modules = (renderer.geometry, renderer.background)
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    return output, torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def pair(geometry=None, **config):
    """Two renderers of one scene: with lists of any length, and of fixed length."""
    geometry = geometry or Gem({})
    built = [build({**config, "sampler": s}, geometry) for s in ("dynamic", "static")]
    for renderer in built:
        renderer.background.register_parameter("env", None)
        for step in (0, 16):
            renderer.do_update_step(0, step)
    return built


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prune_alpha_threshold": True},
        {"grid_prune": False, "randomized": False},
        {"grid_prune": False, "prune_alpha_threshold": True, "ray_chunk_size": 5},
        {"estimator": "importance", "num_samples_per_ray_importance": 6},
    ],
)
def test_images_and_gradients_are_the_same(config):
    dynamic, static = pair(**config)
    rays_o, rays_d = orbit_rays(2, 8, distance=1.9, fov_deg=70.0)  # the corners see nothing
    for _ in range(2):
        arguments = {"rays": (rays_o, rays_d), "frame_times": torch.tensor([0.2, 0.9])}
        (first, gradient), (second, fixed) = (
            outcome(dynamic, **arguments),
            outcome(static, **arguments),
        )
        assert first["opacity"].max() > 0.5
        for key in IMAGES:
            assert torch.allclose(first[key], second[key], atol=2e-6), key
        assert (gradient - fixed).norm() <= 1e-5 * gradient.norm()
        keep = ~second["is_padding"][:, 0]
        if "estimator" not in config:
            assert torch.equal(second["ray_indices"][keep], first["ray_indices"])
            assert torch.allclose(second["points"][keep], first["points"], atol=1e-6)
        assert set(second) - set(first) == {"is_padding"}


def test_gradients_reach_a_hash_grid_alike():
    geometry = threestudio.find("implicit-volume")(
        {
            "pos_encoding_config": {"otype": "HashGrid", "n_levels": 3, "log2_hashmap_size": 8,
                                    "n_features_per_level": 2, "base_resolution": 4,
                                    "per_level_scale": 1.5},
            "mlp_network_config": {"otype": "VanillaMLP", "n_neurons": 8, "n_hidden_layers": 1},
            "normal_type": None,
        }
    )  # fmt: skip
    dynamic, static = pair(geometry, prune_alpha_threshold=True)
    (_, gradient), (_, fixed) = outcome(dynamic), outcome(static)
    assert gradient.count_nonzero() > 100
    assert (gradient - fixed).norm() <= 1e-5 * gradient.norm()


class TestNothingToSee:
    @pytest.mark.parametrize("prune", [False, True])
    def test_an_empty_grid_and_rays_that_miss(self, prune):
        static = build({"sampler": "static", "prune_alpha_threshold": prune}, Gem({}))
        rays_o, rays_d = orbit_rays()
        missed = render(static, (rays_o, -rays_d))
        static.estimator.binaries.zero_()
        for output in (missed, render(static)):
            assert not output["opacity"].any() and not output["weights"].any()
            assert output["is_padding"].all() and len(output["weights"]) > 0
            output["comp_rgb"].sum().backward()
        assert static.geometry.scale.grad == 0

    def test_what_appears_later_is_seen(self):
        static = build({"sampler": "static"}, Gem({}))
        static.estimator.binaries.zero_()
        render(static)
        static.estimator.binaries.fill_(True)
        render(static)  # too short a list
        dropped = static._samplers.static.samples.dropped.item()
        assert dropped > 0
        expected = render(build({"sampler": "dynamic"}, Gem({})))
        assert torch.allclose(render(static)["comp_rgb"], expected["comp_rgb"], atol=2e-6)
        assert static._samplers.static.samples.dropped.item() == dropped


class TestShortLists:
    def test_the_budget_bounds_the_samples_and_images_stay_close(self):
        dynamic, _ = pair(num_samples_per_ray=96)
        static = build({"sample_budget": 200, "num_samples_per_ray": 96}, Gem({}))
        for step in (0, 16):
            static.do_update_step(0, step)
        whole, coarse = render(dynamic), render(static)
        n, budget = len(whole["weights"]), static._samplers.static.samples
        assert len(coarse["weights"]) == 200 < n
        assert budget.dropped.item() == n - 200
        # Every ray is sampled 200 / n times as finely: no image is darker, none has holes.
        assert (whole["opacity"] - coarse["opacity"]).abs().max() < 0.1
        assert (whole["opacity"] - coarse["opacity"]).abs().mean() < 0.01
        coarse["comp_rgb"].sum().backward()
        assert static.geometry.scale.grad.isfinite()

    def test_the_first_pass_has_a_larger_budget(self):
        static = build({"sample_budget": 200, "prune_alpha_threshold": True}, Gem({}))
        output = render(static)
        sampler = static._samplers.static
        assert len(output["weights"]) == 200
        assert sampler.first_pass.limit == 1600 and sampler.samples.limit == 200


class TestNoWaits:
    @pytest.mark.parametrize(
        "config",
        [
            {},
            {"prune_alpha_threshold": True},
            {"sample_budget": 100, "prune_alpha_threshold": True},
            {"estimator": "importance", "num_samples_per_ray_importance": 6},
            {"return_normal_perturb": True},
            PROPOSAL,
        ],
    )
    def test_nothing_in_a_step_depends_on_data(self, config):
        material = threestudio.find("no-material")({"requires_normal": True})
        static = build({"sampler": "static", **config}, Gem({}), {"random_aug": True}, material)
        times = torch.tensor([0.2, 0.9])
        if "sample_budget" not in config:
            render(static, frame_times=times)  # the first pass counts
        with WatchForWaits() as watch:
            for step in (16, 512):
                static.do_update_step(0, step)
                static.background.do_update_step(0, step)
                outcome(static, frame_times=times)
        assert watch.waits == []
        assert {"aten.cumsum.default", "aten.scatter_.src", "aten.index_add.default"} & watch.seen
        assert "aten.sigmoid_backward.default" in watch.seen  # the backward pass was watched

    def test_the_dynamic_lists_do_wait(self):
        dynamic = build({"sampler": "dynamic", "prune_alpha_threshold": True}, Gem({}))
        with WatchForWaits() as watch:
            outcome(dynamic)
        assert watch.waits.count("aten.nonzero.default") >= 3
        assert "aten._local_scalar_dense.default" in watch.waits

    def test_everything_a_step_draws_goes_to_the_device_asynchronously(self):
        """On a device without values: what reads one fails, and copies are seen."""
        static = build({"sampler": "static", "sample_budget": 100, "prune_alpha_threshold": True,
                        "return_normal_perturb": True}, OnAnyDevice({}),
                       {"random_aug": True},
                       threestudio.find("no-material")({"requires_normal": True}))  # fmt: skip
        rays_o, rays_d = (rays.to("meta") for rays in orbit_rays())
        for part in (static, static.geometry, static.background):
            part.to("meta")
        lights = torch.zeros(2, 3, device="meta")
        with WatchForWaits() as watch:
            for step in (0, 16, 512):
                static.do_update_step(0, step)
                output = static(rays_o, rays_d, lights, frame_times=torch.zeros(2))
                output["comp_rgb"].sum().backward()
        assert watch.waits == [] and output["comp_rgb"].is_meta
        # Jitter, background and times of each of three steps, and the cells' points.
        assert len(watch.copies) > 3 * 3


class OnAnyDevice(Ball):
    """A ball without anything that depends on where it is."""

    def forward_density(self, points, frame_times=None):
        return self.scale * torch.sigmoid(0.5 - points.norm(dim=-1, keepdim=True))


class TestWeights:
    def test_whatever_a_repeat_is_asked_its_weight_is_zero(self):
        rays = torch.tensor([0, 0, 0, 1])
        samples = RaySamples(rays, torch.tensor([0.0, 1, 1, 0]), torch.tensor([1.0, 1, 2, 1]))
        densities = torch.tensor([1.0, float("inf"), 2.0, 3.0], requires_grad=True)
        weights = StaticSampler(0, False).render_weights(densities, samples, 2)
        real = samples.select(torch.tensor([0, 2, 3]))
        expected = DynamicSampler().render_weights(densities[[0, 2, 3]], real, 2)
        assert weights[1] == 0 and torch.allclose(weights[[0, 2, 3]], expected)
        weights.sum().backward()
        assert densities.grad[1] == 0 and densities.grad.isfinite().all()


def test_evaluation_is_that_of_the_dynamic_lists():
    static, dynamic = build({"sampler": "static"}, TimelessBall({})), build({}, TimelessBall({}))
    first, second = render(static.eval()), render(dynamic.eval())
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_proposal_network_learns_the_same_from_either():
    rays = orbit_rays(2, 8, distance=1.9, fov_deg=100.0)
    states = []
    for sampler in ("dynamic", "static"):
        renderer = build({**PROPOSAL, "sampler": sampler}, Gem({}))
        output = render(renderer, rays)
        hits = output["ray_indices"].unique().numel()
        assert (hits < 128) == (sampler == "dynamic")  # some rays see nothing
        states.append(torch.cat([p.flatten() for p in renderer.prop_net.parameters()]))
    fresh = torch.cat([p.flatten() for p in build(PROPOSAL, Gem({})).prop_net.parameters()])
    assert torch.allclose(*states, rtol=1e-5, atol=1e-7) and not torch.equal(states[0], fresh)
