"""The volume renderer against a loop over rays and samples, and its laws."""

import math
from dataclasses import dataclass

import pytest
import threestudio
import torch
from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.utils.ops import get_ray_directions, get_rays
from threestudio.utils.rng import set_experiment_seed

SMALL_GEOMETRY = {
    "pos_encoding_config": {
        "otype": "HashGrid",
        "n_levels": 4,
        "n_features_per_level": 2,
        "log2_hashmap_size": 10,
        "base_resolution": 4,
        "per_level_scale": 1.5,
    },
    "mlp_network_config": {
        "otype": "VanillaMLP",
        "activation": "ReLU",
        "output_activation": "none",
        "n_neurons": 16,
        "n_hidden_layers": 1,
    },
    "density_blob_scale": 20.0,
}


class Ball(BaseImplicitGeometry):
    """A soft ball of known density and colour; with ``moving`` it exists near time 0.9 only."""

    @dataclass
    class Config(BaseImplicitGeometry.Config):
        moving: bool = False

    cfg: Config

    def configure(self):
        super().configure()
        self.scale = torch.nn.Parameter(torch.tensor(6.0))
        self.tint = torch.nn.Parameter(torch.tensor([1.0, -0.5, 0.3]))
        self.asked_times = []

    @property
    def is_dynamic(self):
        return self.cfg.moving

    def forward_density(self, points, frame_times=None):
        density = self.scale * torch.sigmoid(20 * (0.5 - points.norm(dim=-1, keepdim=True)))
        if self.cfg.moving:
            self.asked_times.append(frame_times)
            times = torch.zeros(points.shape[:-1]) if frame_times is None else frame_times
            density = density * ((times - 0.9).abs() < 0.1).float()[..., None]
        return density

    def forward(self, points, output_normal=False, frame_times=None):
        output = {
            "density": self.forward_density(points, frame_times),
            "features": self.tint + points,
        }
        if output_normal:
            normal = torch.nn.functional.normalize(points, dim=-1)
            output.update(normal=normal, shading_normal=normal)
        return output


class TimelessBall(BaseImplicitGeometry):
    """A foreign geometry, written before scene time was an argument."""

    def forward(self, points, output_normal=False):
        return {"density": self.forward_density(points), "features": torch.zeros_like(points)}

    def forward_density(self, points):
        return 5.0 * (points.norm(dim=-1, keepdim=True) < 0.5).float()


def build(renderer=None, geometry=None, background=None, material=None):
    torch.manual_seed(0)
    if geometry is None:
        geometry = threestudio.find("implicit-volume")(SMALL_GEOMETRY)
    material = material or threestudio.find("no-material")({})
    background = threestudio.find("solid-color-background")(background or {"color": [1, 0.5, 0]})
    config = {"num_samples_per_ray": 24, "prune_alpha_threshold": False, **(renderer or {})}
    return threestudio.find("nerf-volume-renderer")(
        config, geometry=geometry, material=material, background=background
    ).train()


def orbit_rays(batch_size=2, size=6, distance=2.5, fov_deg=45.0):
    c2w = []
    for k in range(batch_size):
        angle = 2 * math.pi * k / batch_size + 0.3
        back = torch.tensor([math.cos(angle), math.sin(angle), 0.0])
        right = torch.tensor([-math.sin(angle), math.cos(angle), 0.0])
        pose = torch.eye(4)
        pose[:3] = torch.stack([right, torch.tensor([0.0, 0, 1]), back, back * distance], dim=1)
        c2w.append(pose)
    focal = size / (2 * math.tan(math.radians(fov_deg) / 2))
    return get_rays(get_ray_directions(size, size, focal), torch.stack(c2w), keepdim=True)


def render(renderer, rays=None, **kwargs):
    rays_o, rays_d = rays or orbit_rays()
    return renderer(rays_o, rays_d, torch.zeros(rays_o.shape[0], 3), **kwargs)


def render_by_loop(renderer, rays_o, rays_d):
    """Images of a `Ball` in double precision, one ray and one sample at a time."""
    ball, step = renderer.geometry, renderer.render_step_size
    rows = []
    for o, d in zip(rays_o.reshape(-1, 3).double(), rays_d.reshape(-1, 3).double()):
        near = torch.minimum((-1 - o) / d, (1 - o) / d).amax().clamp(min=0)
        far = torch.maximum((-1 - o) / d, (1 - o) / d).amin()
        trans, rgb, opacity, depth, terms = 1.0, 0.0, 0.0, 0.0, []
        for k in range(renderer.cfg.num_samples_per_ray):
            t_mid = near + (k + 0.5) * step
            if t_mid >= far:
                break
            point = o + t_mid * d
            alpha = 1 - torch.exp(-ball.forward_density(point)[0] * step)
            weight = trans * alpha
            rgb = rgb + weight * torch.sigmoid(ball.tint + point)
            opacity, depth = opacity + weight, depth + weight * t_mid
            terms.append((weight, t_mid))
            trans = trans * (1 - alpha)
        total = torch.as_tensor(opacity).clamp(min=1e-5)
        z_variance = sum(w / total * (t - depth / total) ** 2 for w, t in terms)
        if not terms:
            rows.append(torch.zeros(6, dtype=torch.float64))
            continue
        z_variance = z_variance if opacity > 0.5 else torch.zeros(())
        rows.append(torch.cat([rgb, torch.stack([opacity, depth, z_variance.double()])]))
    return torch.stack(rows)


class TestAgainstLoop:
    def test_images_and_gradients(self):
        renderer = build({"randomized": False}, geometry=Ball({}))
        rays_o, rays_d = orbit_rays()
        output = render(renderer, (rays_o, rays_d))
        ours = torch.cat(
            [output[k] for k in ("comp_rgb_fg", "opacity", "depth", "z_variance")], dim=-1
        ).view(-1, 6)
        mix = torch.linspace(-1, 1, ours.numel()).view_as(ours)
        our_grads = torch.autograd.grad((ours * mix).sum(), list(renderer.geometry.parameters()))
        loop = render_by_loop(renderer, rays_o, rays_d)
        loop_grads = torch.autograd.grad((loop * mix).sum(), list(renderer.geometry.parameters()))
        assert (loop[:, 3] > 0.5).any() and (loop[:, 3] < 0.1).any()
        assert torch.allclose(ours.double(), loop, atol=2e-5)
        for mine, theirs in zip(our_grads, loop_grads):
            assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4)

    def test_composition_with_the_background(self):
        output = render(build(geometry=Ball({})))
        background = torch.tensor([1.0, 0.5, 0.0])
        assert torch.allclose(
            output["comp_rgb"],
            output["comp_rgb_fg"] + background * (1 - output["opacity"]),
            atol=1e-6,
        )


class TestSkipping:
    def outputs_and_grads(self, renderer, **kwargs):
        output = render(renderer, **kwargs)
        loss = (output["comp_rgb"] * output["depth"]).sum() + output["z_variance"].sum()
        parameters = list(renderer.geometry.parameters())
        return output, torch.autograd.grad(loss, parameters)

    def test_a_full_grid_equals_dense_rendering(self):
        sparse, sparse_grads = self.outputs_and_grads(build())
        dense, dense_grads = self.outputs_and_grads(build({"grid_prune": False}))
        assert sparse["ray_indices"].shape == dense["ray_indices"].shape
        for key in ("comp_rgb", "opacity", "depth", "z_variance"):
            assert torch.allclose(sparse[key], dense[key], atol=1e-6)
        for mine, theirs in zip(sparse_grads, dense_grads):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)

    def test_a_right_grid_saves_work_and_changes_nothing(self):
        full, right = build(geometry=TimelessBall({})), build(geometry=TimelessBall({}))
        grid = right.estimator
        centres = (torch.stack(torch.meshgrid(*[torch.arange(32)] * 3, indexing="ij"), -1) + 0.5)
        grid.binaries.copy_(((centres / 16 - 1).norm(dim=-1) < 0.6)[None])
        dense, sparse = render(full), render(right)
        assert sparse["ray_indices"].numel() < dense["ray_indices"].numel() / 4
        assert torch.allclose(sparse["comp_rgb"], dense["comp_rgb"], atol=1e-6)

    def test_the_alpha_cut_drops_thin_and_hidden_samples_only(self):
        ball = Ball({})
        with torch.no_grad():
            ball.scale.fill_(60.0)
        whole = render(build(geometry=ball))
        cut_renderer = build({"prune_alpha_threshold": True}, geometry=ball)
        cut_renderer.estimator.occs.fill_(1.0)
        cut = render(cut_renderer)
        assert cut["ray_indices"].numel() < whole["ray_indices"].numel() / 3
        # Dropped: alpha < 0.01 per sample, over some ten of them at most, and 1e-4 behind.
        assert (cut["comp_rgb"] - whole["comp_rgb"]).abs().max() < 0.05
        assert (cut["weights"] > 0).all()

    def test_nothing_survives(self):
        renderer = build(background={"color": [0.2, 0.4, 0.6], "learned": True})
        renderer.estimator.binaries.zero_()
        output = render(renderer)
        assert torch.allclose(output["comp_rgb"], torch.tensor([0.2, 0.4, 0.6]).expand(2, 6, 6, 3))
        assert output["weights"].shape == (1, 1) and output["weights"].item() == 0
        (output["comp_rgb"].sum() + output["z_variance"].sum()).backward()
        for parameter in renderer.geometry.parameters():
            assert parameter.grad is not None and not parameter.grad.any()
        assert renderer.background.env_color.grad.abs().sum() > 0

    def test_rays_that_all_miss(self):
        rays_o, rays_d = orbit_rays()
        for mode in (True, False):
            output = render(build().train(mode), (rays_o, -rays_d))
            assert not output["opacity"].any() and not output["depth"].any()

    @pytest.mark.parametrize("training", [True, False])
    def test_chunks_change_nothing(self, training):
        whole = render(build().train(training))
        pieces = render(build({"ray_chunk_size": 5, "eval_chunk_size": 17}).train(training))
        for key in ("comp_rgb", "opacity", "depth", "z_variance"):
            assert torch.allclose(whole[key], pieces[key], atol=1e-6)


class TestOutputs:
    def test_keys_and_shapes_in_training(self):
        output = render(build())
        images = {"comp_rgb": 3, "comp_rgb_fg": 3, "comp_rgb_bg": 3}
        images |= {"opacity": 1, "depth": 1, "z_variance": 1}
        n = output["ray_indices"].shape[0]
        samples = {"weights": 1, "t_points": 1, "t_intervals": 1, "t_dirs": 3, "points": 3}
        samples |= {"density": 1, "features": 3}
        assert set(output) == {*images, *samples, "ray_indices"}
        assert all(output[key].shape == (2, 6, 6, size) for key, size in images.items())
        assert all(output[key].shape == (n, size) for key, size in samples.items())
        assert output["ray_indices"].dtype == torch.long

    def test_samples_are_consistent(self):
        rays_o, rays_d = orbit_rays()
        output = render(build(), (rays_o, rays_d))
        rows = output["ray_indices"]
        points = rays_o.reshape(-1, 3)[rows] + output["t_points"] * rays_d.reshape(-1, 3)[rows]
        assert torch.allclose(output["points"], points, atol=1e-5)
        assert torch.equal(output["t_dirs"], rays_d.reshape(-1, 3)[rows])
        opacity = torch.zeros(72).index_add(0, rows, output["weights"][:, 0])
        assert torch.allclose(output["opacity"].view(-1), opacity, atol=1e-6)
        assert torch.allclose(
            output["t_intervals"], torch.full_like(output["t_intervals"], 2 * 1.732 / 24), atol=1e-6
        )

    def test_evaluation_gives_images_only_and_jitters_nothing(self):
        renderer = build().eval()
        first, second = render(renderer), render(renderer)
        assert "weights" not in first and torch.equal(first["comp_rgb"], second["comp_rgb"])
        assert not renderer.randomized and renderer.train().randomized

    def test_comp_normal_faces_outward_in_display_range(self):
        material = threestudio.find("no-material")({"requires_normal": True})
        renderer = build(geometry=Ball({}), material=material)
        assert "comp_normal" not in render(renderer)
        renderer.cfg.return_comp_normal = True
        assert "comp_normal" in render(renderer)
        with torch.no_grad():
            renderer.geometry.scale.fill_(60.0)
        rays_o, rays_d = orbit_rays(1, 7)
        output = render(renderer.eval(), (rays_o, rays_d))
        centre = output["comp_normal"][0, 3, 3] / output["opacity"][0, 3, 3] * 2 - 1
        assert torch.allclose(centre, -rays_d[0, 3, 3], atol=0.02)
        assert output["comp_normal"][0, 0, 0].abs().max() < 1e-2  # background

    def test_normal_perturb(self):
        material = threestudio.find("no-material")({"requires_normal": True})
        output = render(build({"return_normal_perturb": True}, Ball({}), material=material))
        difference = output["normal_perturb"] - output["normal"]
        assert 0 < difference.abs().mean() < 0.1

    def test_background_shapes(self):
        renderer = build(geometry=Ball({}))
        per_image = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
        flat = render(renderer, bg_color=per_image)
        full = render(renderer, bg_color=per_image[:, None, None].expand(2, 6, 6, 3))
        assert torch.equal(flat["comp_rgb"], full["comp_rgb"])
        assert torch.allclose(flat["comp_rgb"][1, 0, 0], per_image[1], atol=1e-3)

    def test_planes_cut_the_scene(self):
        rays_o, rays_d = orbit_rays(1, 7)
        whole = render(build(geometry=Ball({})).eval(), (rays_o, rays_d))
        # The camera stands at 2.5 and the ball reaches from about 2 to 3 along the middle ray.
        for config in ({"far_plane": 1.8}, {"near_plane": 3.4}):
            cut = render(build(config, geometry=Ball({})).eval(), (rays_o, rays_d))
            assert cut["opacity"].max() < 0.05 < 0.5 < whole["opacity"].max()
        behind = render(build({"near_plane": 2.5}, geometry=Ball({})).eval(), (rays_o, rays_d))
        depth = behind["depth"][0, 3, 3] / behind["opacity"][0, 3, 3]
        assert 2.5 < depth.item() < 3.1

    def test_half_precision_fields_give_full_precision_images(self):
        class HalfBall(Ball):
            def forward(self, *args, **kwargs):
                output = super().forward(*args, **kwargs)
                return {key: value.half() for key, value in output.items()}

        full, half = render(build(geometry=Ball({}))), render(build(geometry=HalfBall({})))
        assert half["comp_rgb"].dtype == half["opacity"].dtype == torch.float32
        assert torch.allclose(full["comp_rgb"], half["comp_rgb"], atol=5e-3)

    def test_four_channels_for_latents(self):
        geometry = threestudio.find("implicit-volume")({**SMALL_GEOMETRY, "n_feature_dims": 4})
        material = threestudio.find("no-material")({"n_output_dims": 4, "color_activation": "none"})
        background = {"n_output_dims": 4, "color": [0.0, 0.0, 0.0, 1.0]}
        output = render(build(geometry=geometry, material=material, background=background))
        assert output["comp_rgb"].shape[-1] == 4


class TestRandomness:
    def test_jitter_is_a_function_of_seed_step_and_image(self):
        def t_points(step, images=slice(None), seed=0):
            set_experiment_seed(seed)
            renderer = build(geometry=TimelessBall({}))
            renderer._step = step
            rays_o, rays_d = orbit_rays()
            output = render(renderer, (rays_o[images], rays_d[images]))
            set_experiment_seed(0)
            return output["t_points"], output["ray_indices"]

        first, rays = t_points(3)
        torch.manual_seed(5)
        assert torch.equal(first, t_points(3)[0])
        assert not torch.equal(first[:20], t_points(4)[0][:20])
        assert not torch.equal(first[:20], t_points(3, seed=1)[0][:20])
        # The first image alone is jittered as within the batch.
        alone, alone_rays = t_points(3, slice(0, 1))
        assert torch.equal(alone, first[rays < 36]) and torch.equal(alone_rays, rays[rays < 36])


class TestTimes:
    def test_each_image_has_its_own_time(self):
        renderer = build(geometry=Ball({"moving": True}))
        output = render(renderer, frame_times=torch.tensor([0.1, 0.9]))
        assert output["opacity"][0].max() < 1e-6 < 0.5 < output["opacity"][1].max()
        renderer.cfg.ray_chunk_size = 7  # evaluation in slices that cross from image to image
        evaluated = render(renderer.eval(), frame_times=torch.tensor([0.9, 0.1]))
        assert evaluated["opacity"][0].max() > 0.5 > evaluated["opacity"][1].max()

    def test_one_time_serves_all_images(self):
        renderer = build(geometry=Ball({"moving": True}))
        one = render(renderer, frame_times=torch.tensor(0.9))
        each = render(renderer, frame_times=torch.tensor([0.9, 0.9]))
        assert torch.equal(one["comp_rgb"], each["comp_rgb"])

    def test_density_at_another_time_stays_occupied(self):
        renderer = build(geometry=Ball({"moving": True}))
        for step in range(64):
            renderer.do_update_step(0, step)
            if step % 8 == 0:
                render(renderer, frame_times=torch.tensor([0.1, 0.1]))
        occupied = renderer.estimator.binaries[0]
        assert occupied[16, 16, 16] and not occupied[0, 0, 0]
        assert 0.1 < occupied.float().mean() < 0.25  # density * step > 0.01 below radius 0.72
        assert render(renderer, frame_times=torch.tensor([0.9, 0.9]))["opacity"].max() > 0.5

    def test_static_geometry_is_asked_at_no_particular_time(self):
        renderer = build({"occupancy_times": 1}, geometry=Ball({"moving": True}))
        renderer.do_update_step(0, 0)
        assert renderer.geometry.asked_times == [None]

    def test_a_geometry_without_times_is_called_without_them(self):
        renderer = build({"occupancy_times": 3}, geometry=TimelessBall({}))
        renderer.do_update_step(0, 0)
        assert render(renderer, frame_times=torch.tensor([0.2, 0.7]))["opacity"].max() > 0.5


class TestOccupancyUpdate:
    def test_does_not_depend_on_what_was_rendered(self):
        def grid(with_renders):
            renderer = build(geometry=Ball({"moving": True}))
            for step in range(33):
                renderer.do_update_step(0, step)
                if with_renders:
                    render(renderer, frame_times=torch.tensor([0.3, step / 33]))
            return renderer.estimator.occs

        assert torch.equal(grid(False), grid(True))

    def test_once_per_interval_however_often_it_is_called(self):
        renderer = build({"occupancy_update_interval": 4})
        history = []
        for step in range(9):
            renderer.do_update_step(0, step)
            renderer.do_update_step(0, step)
            history.append(renderer.estimator.occs.clone())
        changed = [i for i in range(1, 9) if not torch.equal(history[i], history[i - 1])]
        assert changed == [4, 8]

    def test_a_second_visit_in_a_step_does_not_decay_again(self):
        renderer = build({"occupancy_update_interval": 1}, geometry=Ball({}))
        renderer.do_update_step(0, 0)
        before = renderer.estimator.occs.clone()
        with torch.no_grad():
            renderer.geometry.scale.zero_()
        for _ in range(3):
            renderer.do_update_step(0, 1)
        assert torch.allclose(renderer.estimator.occs, 0.95 * before)

    def test_not_in_evaluation_and_not_while_loading(self):
        for renderer, loading in ((build().eval(), False), (build(), True)):
            renderer.do_update_step(0, 0, on_load_weights=loading)
            assert renderer.estimator.binaries.all() and not renderer.estimator.occs.any()

    def test_a_restored_run_is_the_same_run(self):
        def advance(renderer, steps):
            for step in steps:
                renderer.do_update_step(0, step)
            return renderer

        config = {"occupancy_update_interval": 2, "occupancy_warmup_steps": 4}
        through = advance(build(config), range(12))
        stopped = advance(build(config), range(7))
        resumed = build(config)
        resumed.load_state_dict(stopped.state_dict())
        advance(resumed, range(7, 12))
        assert torch.equal(through.estimator.occs, resumed.estimator.occs)
        assert torch.equal(through.estimator.binaries, resumed.estimator.binaries)

    def test_state_keys_are_those_of_upstream(self):
        assert set(build().state_dict()) == {
            "bbox",
            "estimator.aabbs",
            "estimator.binaries",
            "estimator.occs",
            "estimator.resolution",
        }


class TestErrors:
    def test_sample_count(self):
        with pytest.raises(ValueError, match="num_samples_per_ray is 0"):
            build({"num_samples_per_ray": 0})

    def test_shapes(self):
        rays_o, rays_d = orbit_rays()
        with pytest.raises(ValueError, match=r"expected both \(B, H, W, 3\)"):
            render(build(), (rays_o.reshape(-1, 3), rays_d.reshape(-1, 3)))
        with pytest.raises(ValueError, match=r"frame_times has shape \(3,\); expected 2 values"):
            render(build(), frame_times=torch.zeros(3))
        with pytest.raises(ValueError, match=r"light_positions has shape \(1, 3\)"):
            build()(rays_o, rays_d, torch.zeros(1, 3))


class Drift(Ball):
    """The ball, with every point displaced by its own position and the time."""

    def forward(self, points, output_normal=False, frame_times=None):
        output = super().forward(points, output_normal, frame_times)
        return output | {"displacement": points * frame_times[..., None]}


def test_the_displacement_is_rendered_with_the_weights_of_the_image():
    renderer = build(geometry=Drift({}))
    output = render(renderer, frame_times=torch.tensor([0.5, 1.0]))
    assert output["deformation"].shape == (2, 6, 6, 3)
    rays_o, rays_d = orbit_rays()
    summed = output["depth"] * rays_d + output["opacity"] * rays_o  # sum of w position
    times = torch.tensor([0.5, 1.0])[:, None, None, None]
    torch.testing.assert_close(output["deformation"], summed * times, atol=1e-4, rtol=1e-4)
    assert output["deformation"].abs().max() > 0.05
    output["deformation"].sum().backward()
    assert renderer.geometry.scale.grad != 0
    assert "deformation" not in render(renderer.eval(), frame_times=torch.tensor([0.5, 1.0]))
    assert "deformation" not in render(build(geometry=Ball({})))


def test_the_frames_of_a_clip_have_one_background():
    renderer = build(background={"random_aug": True, "random_aug_prob": 1.0})
    colors = [
        render(renderer, is_video=clip, images_per_group=2)["comp_rgb_bg"][:, 0, 0]
        for clip in (True, False)
    ]
    assert torch.equal(colors[0][0], colors[0][1])
    assert not torch.equal(colors[1][0], colors[1][1])
