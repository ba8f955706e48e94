"""Rendering in blocks: the same image and gradient, a shared budget, the base renderer's names."""

import pytest
import threestudio
import torch
from threestudio.systems.weights import match_state

from tests.fixtures.device_waits import WatchForWaits
from tests.fourd.renderers.test_mask_nerf_volume_renderer import (
    PLAIN,
    TIMES,
    build,
    count_gradient_samples,
    gradient,
    parts,
    rays,
    render,
    saved_bytes,
)

STABLE = "stable-nerf-volume-renderer"


def stable(shared=None, base=None, base_type="mask-nerf-volume-renderer", **config):
    shared = shared or parts()
    base = {"num_samples_per_ray": 24, **(base or {})}
    config = {"base_renderer_type": base_type, "base_renderer": base, **config}
    return threestudio.find(STABLE)(config, **shared).train()


@pytest.mark.parametrize("base_type", ["mask-nerf-volume-renderer", PLAIN])
@pytest.mark.parametrize("block_nums", [(3, 3), (1, 2), (20, 5)])
def test_images_and_gradients_are_those_of_the_plain_renderer(base_type, block_nums):
    shared = parts()
    plain = build(PLAIN, shared)
    blocks = stable(shared, base_type=base_type, block_nums=block_nums)
    expected, found = (render(r, frame_times=TIMES) for r in (plain, blocks))
    assert set(found) == set(expected)
    assert not expected["comp_rgb_bg"].std(0).allclose(torch.zeros(()))  # one draw per image
    for key in ("comp_rgb", "comp_rgb_fg", "comp_rgb_bg", "opacity", "depth", "z_variance"):
        assert torch.allclose(found[key], expected[key], atol=1e-6), key
    first, second = gradient(plain, output=expected), gradient(blocks, output=found)
    assert torch.allclose(second, first, rtol=1e-4, atol=1e-6 * first.abs().max())


def test_the_samples_are_the_same_in_another_order():
    shared = parts()
    expected = render(build(PLAIN, shared))
    found = render(stable(shared, {"train_max_nums": 30}))
    order = torch.argsort(found["ray_indices"], stable=True)
    assert torch.equal(found["ray_indices"][order], expected["ray_indices"])
    for key in ("weights", "t_points", "t_dirs", "points", "density", "features"):
        assert torch.allclose(found[key][order], expected[key], atol=1e-6), key


def test_the_budget_of_a_step_is_shared_by_the_blocks(monkeypatch):
    renderer = stable(base={"train_max_nums": 60, "train_max_nums_static": 18})
    counts = count_gradient_samples(renderer, monkeypatch)
    values = render(renderer, frame_times=TIMES, is_video=True)["comp_rgb"]
    assert counts == [20] * 9
    counts.clear()
    render(renderer, is_video=False)
    assert counts == [2] * 9
    counts.clear()
    unlimited = stable({"geometry": renderer.geometry, "material": renderer.material,
                        "background": renderer.background}, {"train_max_nums": 0})  # fmt: skip
    images = render(unlimited, frame_times=TIMES, is_video=True)["comp_rgb"]
    assert sum(counts) > 1000 and torch.allclose(images, values, atol=1e-6)
    assert renderer.base_renderer.cfg.train_max_nums == 60  # nothing is written into the config


def test_blocks_draw_different_samples():
    renderer = stable(base={"train_max_nums": 90})
    seen, choose = [], renderer.base_renderer._choose

    def spy(n_samples, count, device):
        seen.append(choose(n_samples, count, device).double() / n_samples)
        return choose(n_samples, count, device)

    renderer.base_renderer._choose = spy
    render(renderer)
    assert len(seen) == 9
    assert all(not torch.allclose(seen[0], other, atol=0.02) for other in seen[1:])


def test_the_graph_holds_less():
    shared, batch = parts(n_neurons=64), rays(2, 16, 16)
    full = saved_bytes(lambda: render(build(PLAIN, shared), batch))
    small = saved_bytes(lambda: render(stable(shared, {"train_max_nums": 90}), batch))
    assert small < 0.25 * full


def test_images_smaller_than_the_blocks_and_an_empty_scene():
    shared, batch = parts(), rays(2, 2, 1)
    plain, blocks = build(PLAIN, shared), stable(shared)
    assert torch.allclose(render(blocks, batch)["comp_rgb"], render(plain, batch)["comp_rgb"])
    for renderer in (plain, blocks):
        renderer.estimator.binaries.zero_()
    output = render(blocks)
    assert torch.equal(output["comp_rgb"], render(plain)["comp_rgb"])
    assert output["opacity"].abs().max() == 0 == output["weights"].abs().max()
    gradient(blocks, output=output)


@pytest.mark.parametrize("bg_color", [(3, 3), (3, 7, 8, 3)])
def test_a_given_background_is_taken(bg_color):
    shared, color = parts(), torch.rand(bg_color)
    expected = render(build(PLAIN, shared), bg_color=color)["comp_rgb"]
    assert torch.allclose(render(stable(shared), bg_color=color)["comp_rgb"], expected, atol=1e-6)


def test_a_clip_has_one_background():
    shared, clip = parts(), {"frame_times": TIMES, "is_video": True, "images_per_group": 3}
    plain, blocks = build(PLAIN, shared), stable(shared)
    seen = []
    for step in range(4):
        shared["background"].update_step(0, step)
        expected = render(plain, **clip)["comp_rgb_bg"]
        assert torch.equal(render(blocks, **clip)["comp_rgb_bg"], expected)
        seen.append(expected[:, 0, 0])
        assert torch.equal(seen[-1], seen[-1][:1].expand(3, -1))
    assert any(not torch.equal(seen[0], other) for other in seen[1:])


def test_evaluation_is_the_base_renderers():
    shared = parts()
    expected = render(build(PLAIN, shared).eval(), frame_times=TIMES)
    found = render(stable(shared, {"train_max_nums": 3}).eval(), frame_times=TIMES)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_occupancy_is_refreshed_once_per_step_and_over_times():
    shared = parts()
    plain, blocks = build(PLAIN, shared), stable(shared)
    asked, density = [], blocks.base_renderer._density

    def spy(points, times):
        asked.append(None if times is None else float(times.min()))
        return density(points, times)

    blocks.base_renderer._density = spy
    for step in range(2):
        plain.do_update_step(0, step)
        blocks.do_update_step(0, step)
        blocks.do_update_step(0, step)
    assert len(asked) == 4 and asked[0] < 0.25 <= asked[1] < 0.5 <= asked[2] < 0.75 <= asked[3]
    assert torch.equal(blocks.estimator.occs, plain.estimator.occs) and plain.estimator.occs.any()
    # A later step draws another jitter: the step arrived at the base renderer.
    plain.do_update_step(0, 5), blocks.do_update_step(0, 5)
    assert torch.allclose(render(blocks)["comp_rgb"], render(plain)["comp_rgb"], atol=1e-6)


def test_checkpoints_pass_between_the_renderers():
    plain, blocks = build(PLAIN), stable()
    assert set(plain.state_dict(prefix="renderer.")) == set(blocks.state_dict(prefix="renderer."))
    plain.estimator.occs.uniform_()
    holder = torch.nn.ModuleDict({"renderer": blocks})
    own = {f"renderer.{key}": value for key, value in plain.state_dict().items()}
    assert match_state(holder.state_dict(), own).problems == []
    holder.load_state_dict(own)
    assert torch.equal(blocks.estimator.occs, plain.estimator.occs)
    fresh = build(PLAIN)
    fresh.load_state_dict(blocks.state_dict())
    assert torch.equal(fresh.estimator.occs, plain.estimator.occs)


def test_a_checkpoint_of_upstreams_wrapper_fits():
    plain, blocks = build(PLAIN), stable()
    plain.estimator.occs.uniform_()
    upstream = {f"renderer.base_renderer.{k}": v for k, v in plain.state_dict().items()}
    own = {f"renderer.{key}": value for key, value in blocks.state_dict().items()}
    match = match_state(own, upstream)
    assert match.problems == match.dropped == match.fresh == []
    assert torch.equal(match.loadable["renderer.estimator.occs"], plain.estimator.occs)
    blocks.load_state_dict(
        {key.removeprefix("renderer."): value for key, value in upstream.items()}
    )
    assert torch.equal(blocks.estimator.occs, plain.estimator.occs)


def test_short_keys_reach_the_base_renderer():
    renderer = stable(base={"num_samples_per_ray": 512}, num_samples_per_ray=48, radius=2.0)
    assert renderer.base_renderer.cfg.num_samples_per_ray == 48
    assert renderer.bbox.tolist() == [[-2.0] * 3, [2.0] * 3]
    assert stable().base_renderer.cfg.radius == 1.0


def test_the_parts_can_be_replaced():
    renderer, other = stable(), parts()
    renderer.set_background(other["background"])
    assert renderer.base_renderer.background is other["background"]


def test_faults_are_named():
    with pytest.raises(ValueError, match="mode is 'patch'; expected 'interval'"):
        stable(mode="patch")
    with pytest.raises(ValueError, match=r"block_nums is \[3\]; expected two positive numbers"):
        stable(block_nums=[3])
    with pytest.raises(ValueError, match="base_renderer_type is empty; expected a renderer's"):
        stable(base_type="")


@pytest.mark.parametrize("base_type", ["mask-nerf-volume-renderer", PLAIN])
def test_blocks_of_fixed_lists_give_the_same_images_and_do_not_wait(base_type):
    shared = parts()
    plain = build(PLAIN, shared)
    blocks = stable(shared, {"sampler": "static"}, base_type, block_nums=(2, 3))
    arguments = {"frame_times": TIMES, "is_video": True, "num_frames": 3, "images_per_group": 3}
    for _ in range(2):
        expected, found = (render(r, **arguments) for r in (plain, blocks))
        for key in ("comp_rgb", "opacity", "depth", "z_variance"):
            assert torch.allclose(found[key], expected[key], atol=2e-6), key
    first, second = gradient(plain, output=expected), gradient(blocks, output=found)
    assert torch.allclose(second, first, rtol=1e-4, atol=1e-6 * first.abs().max())
    keep = ~found["is_padding"][:, 0]
    order = torch.argsort(found["ray_indices"][keep], stable=True)
    assert torch.equal(found["ray_indices"][keep][order], expected["ray_indices"])
    with WatchForWaits() as watch:
        gradient(blocks, output=render(blocks, **arguments))
    assert watch.waits == []
