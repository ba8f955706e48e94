"""The renderer with a budget of gradients: the plain image, and the plain gradient on average."""

import functools

import pytest
import threestudio
import torch
from threestudio.models.renderers.volume_rendering import RaySamples
from threestudio.utils.ops import get_ray_directions, get_rays
from threestudio.utils.rng import set_experiment_seed

import custom.fourd  # noqa: F401 - registers the names
from tests.fixtures.device_waits import WatchForWaits

GEOMETRY = {
    "pos_encoding_config": {
        "otype": "HashGridSpatialTime",
        "n_levels": 3,
        "n_features_per_level": 2,
        "log2_hashmap_size": 8,
        "base_resolution": 4,
        "per_level_scale": 1.5,
        "static": False,
    },
    "mlp_network_config": {
        "otype": "VanillaMLP",
        "activation": "ReLU",
        "output_activation": "none",
        "n_neurons": 16,
        "n_hidden_layers": 1,
    },
}
MASK = "mask-nerf-volume-renderer"
PLAIN = "nerf-volume-renderer"


def parts(n_neurons=16):
    torch.manual_seed(0)
    network = {**GEOMETRY["mlp_network_config"], "n_neurons": n_neurons}
    geometry = threestudio.find("implicit-volume")({**GEOMETRY, "mlp_network_config": network})
    with torch.no_grad():
        for parameter in geometry.encoding.parameters():
            parameter.uniform_(-0.5, 0.5)
    material = threestudio.find("no-material")({"n_output_dims": 3, "color_activation": "sigmoid"})
    background = threestudio.find("solid-color-background")(
        {"color": [0.2, 0.5, 0.9], "learned": True, "random_aug": True}
    )
    return {"geometry": geometry, "material": material, "background": background}


def build(name=MASK, shared=None, **config):
    config = {"num_samples_per_ray": 24, **config}
    return threestudio.find(name)(config, **(shared or parts())).train()


def rays(n_images=3, height=7, width=8):
    c2w = torch.eye(4).repeat(n_images, 1, 1)
    c2w[:, 2, 3] = torch.linspace(2.3, 2.8, n_images)
    return get_rays(get_ray_directions(height, width, 9.0), c2w, keepdim=True)


def render(renderer, batch=None, **kwargs):
    rays_o, rays_d = batch or rays()
    return renderer(rays_o, rays_d, torch.zeros(len(rays_o), 3), **kwargs)


def gradient(renderer, output=None, **kwargs):
    """The gradient of a fixed function of all image outputs by all parameters, as one vector."""
    output = render(renderer, **kwargs) if output is None else output
    weight = torch.linspace(0.5, 1.5, output["comp_rgb"].numel()).view_as(output["comp_rgb"])
    loss = (output["comp_rgb"] * weight).sum() + output["depth"].square().sum()
    loss = loss + output["z_variance"].sum() - output["opacity"].log1p().sum()
    modules = (renderer.geometry, renderer.background)
    parameters = [p for module in modules for p in module.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(parameters, found, strict=True)
        ]
    )


def saved_bytes(function):
    """Bytes that the graph of what ``function`` returns keeps for its backward pass."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    assert output["comp_rgb"].requires_grad  # the graph lives while the storages are counted
    return sum(storages.values())


def count_gradient_samples(renderer, monkeypatch):
    """A list that grows by the number of samples of every call that keeps a graph."""
    counts, forward = [], type(renderer.geometry).forward

    @functools.wraps(forward)  # the renderer looks at the signature
    def counting(self, points, *args, **kwargs):
        if torch.is_grad_enabled():
            counts.append(points.shape[0])
        return forward(self, points, *args, **kwargs)

    monkeypatch.setattr(type(renderer.geometry), "forward", counting)
    return counts


TIMES = torch.tensor([0.1, 0.5, 0.9])


def test_values_are_those_of_the_plain_renderer():
    shared = parts()
    plain = render(build(PLAIN, shared), frame_times=TIMES)
    masked = render(build(MASK, shared, train_max_nums=10), frame_times=TIMES)
    assert set(plain) == set(masked)
    assert plain["weights"].shape[0] > 200
    for key, value in plain.items():
        assert torch.allclose(masked[key], value, atol=1e-6), key


def test_a_budget_that_suffices_changes_nothing():
    shared = parts()
    expected = gradient(build(PLAIN, shared))
    for budget in (0, 10**6):
        assert torch.equal(gradient(build(MASK, shared, train_max_nums=budget)), expected)


def by_the_definition(renderer, chosen, scale):
    """The gradient with the networks cut off, sample by sample, where they were not drawn."""
    forward = renderer._shade

    def shade(rays, samples, light_positions, batch):
        rows = []
        for index in range(samples.n_samples):
            one = samples.select(torch.tensor([index]))
            row = forward(rays, one, light_positions, batch)
            if index in chosen:
                row = {k: v.detach() + scale * (v - v.detach()) for k, v in row.items()}
            else:
                row = {k: v.detach() for k, v in row.items()}
            rows.append(row)
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}

    renderer._shade = shade
    result = gradient(renderer, output=render(renderer, rays(1, 3, 3)))
    del renderer._shade
    return result


@pytest.mark.parametrize("rescale", [True, False])
def test_the_gradient_is_that_of_the_drawn_samples(rescale):
    shared = parts()
    masked = build(MASK, shared, train_max_nums=7, rescale_gradients=rescale)
    output = render(masked, rays(1, 3, 3))
    n_samples = output["weights"].shape[0]
    chosen = set(masked._choose(n_samples, 7, torch.device("cpu")).tolist())
    assert len(chosen) == 7 < n_samples
    expected = by_the_definition(
        build(PLAIN, shared), chosen, n_samples / 7 if rescale else 1.0
    )
    found = gradient(masked, output=output)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_the_gradient_is_right_on_average():
    shared = parts()
    batch = rays(1, 4, 4)
    plain, masked = build(PLAIN, shared), build(MASK, shared, train_max_nums=40)
    jitter = torch.full((1, 4, 4), 0.5)
    expected = gradient(plain, output=render(plain, batch, ray_jitter=jitter))
    draws = []
    for step in range(150):
        masked._step = step
        draws.append(gradient(masked, output=render(masked, batch, ray_jitter=jitter)))
    draws = torch.stack(draws)
    error = (draws.mean(0) - expected).norm()
    # The mean of n draws errs by its standard deviation over sqrt(n); the sum over parameters of
    # the variances gives the expected squared norm.
    typical = (draws.var(0).sum() / len(draws)).sqrt()
    assert typical < 0.2 * expected.norm()  # or the next line would accept anything
    assert error < 1.5 * typical


def test_the_drawn_samples_differ_by_step_and_block_and_repeat():
    renderer = build()

    def draw(step, block):
        renderer._step, renderer._block = step, block
        return renderer._choose(1000, 100, torch.device("cpu"))

    assert torch.equal(draw(1, 0), draw(1, 0))
    assert not torch.equal(draw(1, 0), draw(2, 0)) and not torch.equal(draw(1, 0), draw(1, 1))
    assert draw(1, 0).unique().numel() == 100
    set_experiment_seed(1)
    try:
        other = draw(1, 0)
    finally:
        set_experiment_seed(0)
    assert not torch.equal(other, draw(1, 0))


def test_the_budget_counts_scene_times_and_knows_clips(monkeypatch):
    renderer = build(train_max_nums=20, train_max_nums_static=5)
    counts = count_gradient_samples(renderer, monkeypatch)
    render(renderer, frame_times=TIMES, is_video=True)
    render(renderer, frame_times=torch.tensor([0.3]), is_video=False)
    render(renderer)
    assert counts == [60, 5, 5]
    assert build(train_max_nums=20).gradient_budget(None, False) == 20
    assert build(train_max_nums=20).gradient_budget(TIMES, True, num_frames=2) == 40
    assert build(train_max_nums=20, train_max_nums_static=0).gradient_budget(None, False) is None


def test_the_graph_holds_less():
    shared, batch = parts(n_neurons=64), rays(2, 16, 16)
    plain, masked = build(PLAIN, shared), build(MASK, shared, train_max_nums=100)
    assert render(plain, batch)["weights"].shape[0] > 1500
    full = saved_bytes(lambda: render(plain, batch))
    small = saved_bytes(lambda: render(masked, batch))
    assert small < full / 4  # what is left are the sums along the rays


def test_evaluation_and_an_empty_scene_are_those_of_the_plain_renderer():
    shared = parts()
    plain, masked = build(PLAIN, shared), build(MASK, shared, train_max_nums=3)
    for renderer in (plain, masked):
        renderer.eval()
    assert torch.equal(render(masked)["comp_rgb"], render(plain)["comp_rgb"])
    for renderer in (plain, masked):
        renderer.train().estimator.binaries.zero_()
    output = render(masked)
    assert torch.equal(output["comp_rgb"], render(plain)["comp_rgb"])
    assert output["opacity"].abs().max() == 0
    output["comp_rgb"].sum().backward()


def test_a_checkpoint_of_the_plain_renderer_fits():
    plain, masked = build(PLAIN), build(MASK)
    plain.estimator.occs.uniform_()
    masked.load_state_dict(plain.state_dict())
    assert torch.equal(masked.estimator.occs, plain.estimator.occs)


def test_faults_are_named():
    with pytest.raises(ValueError, match="train_max_nums is -1; expected a number of samples"):
        build(train_max_nums=-1)
    with pytest.raises(ValueError, match="return_normal_perturb is true.*nerf-volume-renderer"):
        build(return_normal_perturb=True)


def test_upstreams_number_is_understood():
    from omegaconf import OmegaConf

    written = OmegaConf.create("train_max_nums: 2e6\ntrain_max_nums_static: 100000")
    renderer = build(**written)
    assert renderer.gradient_budget(None, True) == 2_000_000
    assert renderer.gradient_budget(None, False) == 100_000


class TestFixedLists:
    """The same budget of gradients over lists of fixed length, where padding is drawn last."""

    def test_images_and_a_budget_that_suffices(self):
        shared = parts()
        plain = build(PLAIN, shared)
        for budget in (10, 400, 10**6):
            masked = build(MASK, shared, train_max_nums=budget, sampler="static")
            expected, found = (render(r, frame_times=TIMES) for r in (plain, masked))
            for key in ("comp_rgb", "opacity", "depth", "z_variance"):
                assert torch.allclose(found[key], expected[key], atol=2e-6), key
            if budget * 3 > expected["weights"].shape[0]:
                first, second = gradient(plain, output=expected), gradient(masked, output=found)
                assert (first - second).norm() < 1e-4 * first.norm()

    @pytest.mark.parametrize("rescale", [True, False])
    def test_the_gradient_is_that_of_the_drawn_samples(self, rescale):
        shared, config = parts(), {"train_max_nums": 7, "rescale_gradients": rescale}
        masked = build(MASK, shared, sampler="static", **config)
        output = render(masked, rays(1, 3, 3))
        is_real = ~output["is_padding"][:, 0]
        samples = RaySamples(output["ray_indices"], torch.zeros(len(is_real)), is_real.float())
        chosen, rest, scale = masked._choose_of_list(samples, 7)
        assert torch.cat([chosen, rest]).sort().values.tolist() == list(range(len(is_real)))
        assert is_real[chosen].all() and scale.item() == pytest.approx(is_real.sum().item() / 7)
        ranks = set((is_real.cumsum(0) - 1)[chosen].tolist())
        expected = by_the_definition(
            build(PLAIN, shared), ranks, scale.item() if rescale else 1.0
        )
        found = gradient(masked, output=output)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())

    def test_a_step_does_not_wait(self):
        masked = build(train_max_nums=5, sampler="static")
        arguments = {"frame_times": TIMES, "is_video": True, "num_frames": 3}
        render(masked, **arguments)  # the first pass counts
        with WatchForWaits() as watch:
            output = render(masked, **arguments)
            gradient(masked, output=output)
        assert watch.waits == [] and "aten.sort.default" in watch.seen
