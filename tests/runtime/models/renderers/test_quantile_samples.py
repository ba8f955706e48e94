"""Rendering with samples that a density chose, against the closed form of a sheet."""

import math
from dataclasses import dataclass

import pytest
import threestudio
import torch
from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.utils.ops import get_ray_directions, get_rays

OPTICAL_DEPTH = 3.0
PROPOSAL = {
    "estimator": "proposal",
    "num_samples_per_ray": 16,
    "num_samples_per_ray_proposal": 32,
    "proposal_network_config": {
        "n_input_dims": 3,
        "n_output_dims": 1,
        "encoding_config": {"otype": "Frequency", "n_frequencies": 3},
        "network_config": {"otype": "VanillaMLP", "n_neurons": 32, "n_hidden_layers": 2},
    },
    "prop_optimizer_config": {"name": "Adam", "args": {"lr": 0.01}},
}
IMPORTANCE = {
    "estimator": "importance",
    "num_samples_per_ray": 16,
    "num_samples_per_ray_importance": 32,
}


class Sheet(BaseImplicitGeometry):
    """A thin wall across y, a Gaussian of optical depth 3 head on, which moves with the time."""

    @dataclass
    class Config(BaseImplicitGeometry.Config):
        thickness: float = 0.012

    cfg: Config

    def forward_density(self, points, frame_times=None):
        away = points[:, 1:2] - (0.0 if frame_times is None else 0.4 * frame_times[:, None])
        peak = OPTICAL_DEPTH / (self.cfg.thickness * math.sqrt(2 * math.pi))
        return peak * torch.exp(-0.5 * (away / self.cfg.thickness) ** 2)

    def forward(self, points, output_normal=False, frame_times=None):
        density = self.forward_density(points, frame_times)
        return {"density": density, "features": points}


def build(unbounded=False, thickness=0.012, **config):
    geometry = Sheet({"thickness": thickness})
    geometry.unbounded = unbounded
    material = threestudio.find("no-material")({"color_activation": "none"})
    background = threestudio.find("solid-color-background")({})
    return threestudio.find("nerf-volume-renderer")(
        {"prune_alpha_threshold": False, **config},
        geometry=geometry,
        material=material,
        background=background,
    ).train()


def rays(size=7, distance=2.0, n_images=1):
    """A camera on +y that looks along -y, x to its left."""
    c2w = torch.tensor([[-1.0, 0, 0, 0], [0, 0, 1, distance], [0, 1, 0, 0], [0, 0, 0, 1]])
    directions = get_ray_directions(size, size, size)
    return get_rays(directions, c2w.expand(n_images, 4, 4), keepdim=True)


def render(renderer, rays_o, rays_d, **kwargs):
    return renderer(rays_o, rays_d, torch.zeros(rays_o.shape[0], 3), **kwargs)


def errors(renderer, frame_times=None, n_draws=3):
    """Mean errors of opacity and of depth; in closed form, the sheet is thin for the depth."""
    rays_o, rays_d = rays(n_images=1 if frame_times is None else len(frame_times))
    slant = -rays_d[..., 1:2]
    opacity = 1 - torch.exp(-OPTICAL_DEPTH / slant)
    place = torch.zeros(1) if frame_times is None else 0.4 * frame_times
    depth = opacity * (2.0 - place.view(-1, 1, 1, 1)) / slant
    found = []
    for step in range(n_draws):
        renderer._step = step
        with torch.no_grad():
            output = render(renderer, rays_o, rays_d, frame_times=frame_times)
        pair = output["opacity"] - opacity, output["depth"] - depth
        found.append(torch.stack([error.abs().mean() for error in pair]))
    return torch.stack(found).mean(0).tolist()


class TestImportance:
    def test_far_better_than_equal_steps_with_as_many_samples(self):
        even = errors(build(num_samples_per_ray=83))  # of which 48 are in the box, head on
        chosen = errors(build(**IMPORTANCE))
        assert chosen[0] < even[0] / 10 and chosen[1] < even[1] / 3
        assert chosen[0] < 0.002 and chosen[1] < 0.02

    def test_counts_and_ends(self):
        output = render(build(**IMPORTANCE), *rays())
        assert (output["ray_indices"].bincount() == 48).all()
        starts = output["t_points"][:, 0] - output["t_intervals"][:, 0] / 2
        starts, lengths = starts.view(-1, 48), output["t_intervals"].view(-1, 48)
        assert torch.allclose(starts[:, 1:], (starts + lengths)[:, :-1], atol=1e-5), "no gap"
        # The middle ray enters and leaves the box at 1 and 3.
        assert starts[24, 0].item() == pytest.approx(1.0, abs=1e-5)
        assert lengths[24].sum().item() == pytest.approx(2.0, abs=1e-5)

    def test_each_image_has_its_time(self):
        opacity, depth = errors(build(**IMPORTANCE), torch.tensor([0.0, 1.0]))
        assert opacity < 0.002 and depth < 0.02

    def test_evaluation_in_pieces_is_the_same(self):
        whole, pieces = (
            build(**IMPORTANCE),
            build(**IMPORTANCE, ray_chunk_size=7, eval_chunk_size=99),
        )
        first, second = (
            render(renderer.eval(), *rays())["comp_rgb"] for renderer in (whole, pieces)
        )
        assert torch.allclose(first, second, atol=1e-6)

    def test_rays_that_miss_and_rays_that_all_miss(self):
        rays_o, rays_d = rays()
        mixed = rays_d.clone()
        mixed[0, 0] = -mixed[0, 0]
        output = render(build(**IMPORTANCE), rays_o, mixed)
        assert not output["opacity"][0, 0].any() and output["opacity"][0, 3, 3] > 0.9
        assert output["ray_indices"].min() == 7
        assert not render(build(**IMPORTANCE), rays_o, -rays_d)["opacity"].any()

    def test_unbounded_rays_go_from_plane_to_plane(self):
        renderer = build(True, thickness=0.1, **IMPORTANCE, near_plane=0.5, far_plane=9.0)
        output = render(renderer, *rays())
        lengths = output["t_intervals"].view(49, 48).sum(-1)
        assert torch.allclose(lengths, torch.full((49,), 8.5), atol=1e-4)
        assert output["opacity"][0, 3, 3] > 0.9


class TestProposal:
    def test_it_learns_to_bound_the_weights(self, monkeypatch):
        renderer = build(thickness=0.05, **PROPOSAL)
        losses = []
        learn = renderer.prop_net.learn
        monkeypatch.setattr(
            renderer.prop_net, "learn", lambda x: (losses.append(x.item()), learn(x))
        )
        for step in range(50):
            renderer.do_update_step(0, step)
            output = render(renderer, *rays())
        assert sum(losses[-5:]) < sum(losses[:5]) / 4
        even = errors(build(thickness=0.05, num_samples_per_ray=28))  # 16 in the box
        assert errors(renderer)[0] < even[0] / 2
        assert (output["ray_indices"].bincount() == 16).all()

    def test_only_training_with_a_graph_teaches(self):
        renderer = build(**PROPOSAL)
        before = [parameter.clone() for parameter in renderer.prop_net.parameters()]
        with torch.no_grad():
            render(renderer, *rays())
        render(renderer.eval(), *rays())
        assert all(torch.equal(a, b) for a, b in zip(before, renderer.prop_net.parameters()))
        render(renderer.train(), *rays())
        assert not all(torch.equal(a, b) for a, b in zip(before, renderer.prop_net.parameters()))
        assert {name.split(".")[0] for name in renderer.state_dict()} == {"bbox", "prop_net"}

    def test_rays_that_all_miss_teach_nothing(self):
        renderer = build(**PROPOSAL)
        rays_o, rays_d = rays()
        before = [parameter.clone() for parameter in renderer.prop_net.parameters()]
        assert not render(renderer, rays_o, -rays_d)["opacity"].any()
        assert all(torch.equal(a, b) for a, b in zip(before, renderer.prop_net.parameters()))


class TestInASystem:
    """What a system does with a part that trains itself."""

    @pytest.fixture
    def system(self):
        from threestudio.systems.base import BaseSystem

        class Small(BaseSystem):
            strict_optimizer_groups = True

            def configure(self):
                self.renderer = build(thickness=0.05, **PROPOSAL)
                self.tint = torch.nn.Parameter(torch.zeros(3))

        return Small({"optimizer": {"name": "Adam", "params": {"tint": {"lr": 0.1}}}})

    def test_its_optimizer_leaves_the_network_alone(self, system):
        optimizer = system.configure_optimizers()["optimizer"]  # strict, and yet not refused
        assert [p is system.tint for group in optimizer.param_groups for p in group["params"]] == [
            True
        ]
        system.cfg.optimizer = {"name": "Adam"}
        (group,) = system.configure_optimizers()["optimizer"].param_groups
        assert len(group["params"]) == 1

    def test_a_checkpoint_goes_on_to_the_same_bits(self, system, tmp_path):
        from threestudio.utils.checkpoint import load_checkpoint, save_checkpoint

        def steps(first, last):
            for step in range(first, last):
                system.renderer.do_update_step(0, step)
                render(system.renderer, *rays())
            return [p.clone() for p in system.renderer.prop_net.parameters()]

        steps(0, 2)
        checkpoint = {"state_dict": system.state_dict()}
        system.on_save_checkpoint(checkpoint)
        save_checkpoint(tmp_path / "last.ckpt", checkpoint)
        straight = steps(2, 4)
        stored = load_checkpoint(tmp_path / "last.ckpt")
        system.renderer = build(thickness=0.05, **PROPOSAL)
        system.on_load_checkpoint(stored)
        system.load_state_dict(stored["state_dict"])
        resumed = system.renderer.prop_net.parameters()
        assert not all(torch.equal(a, b) for a, b in zip(straight, resumed)), "it has yet to learn"
        assert all(torch.equal(a, b) for a, b in zip(straight, steps(2, 4)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"estimator": "grid"}, "estimator is 'grid'; expected one of occgrid, importance, propo"),
        ({"num_samples_per_ray": 0}, "num_samples_per_ray is 0; expected at least 1"),
        ({**IMPORTANCE, "num_samples_per_ray_importance": 0}, "ray_importance is 0; expected at l"),
        ({**IMPORTANCE, "unbounded": True}, "far_plane is 1e[+]10; expected near_plane < far_plan"),
    ],
)
def test_refusals(config, message):
    with pytest.raises(ValueError, match=message):
        build(**config)
