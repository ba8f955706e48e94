"""Sums along rays by hand, whoever makes them."""

import math

import pytest
import torch
from threestudio.models.renderers.compositing import composite_samples, per_sample_outputs
from threestudio.models.renderers.ray_samplers import DynamicSampler, StaticSampler
from threestudio.models.renderers.volume_rendering import RaySamples

HALF = math.log(2.0)


def case(repeats):
    """Ray 0 sees two samples that each hide half, ray 1 nothing, ray 2 one; some repeated."""
    rays = torch.tensor([0, 0, 2])
    t_starts = torch.tensor([1.0, 2.0, 4.0])
    samples = RaySamples(rays, t_starts, t_starts + 1)
    values = {
        "density": torch.full((3, 1), HALF),
        "rgb": torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]),
        "normal": torch.tensor([[0, 0, 1.0], [0, 0, 3.0], [1.0, 0, 0]]),
        "displacement": torch.tensor([[4.0, 0, 0], [8.0, 0, 0], [2.0, 2, 2]]),
    }
    if repeats:
        order = torch.tensor([0, 0, 1, 2, 2, 2])
        samples = samples.select(order)
        is_repeat = torch.tensor([False, True, False, False, True, True])
        mids = samples.t_mids
        samples.t_starts = torch.where(is_repeat, mids, samples.t_starts)
        samples.t_ends = torch.where(is_repeat, mids, samples.t_ends)
        values = {key: value[order] for key, value in values.items()}
    return samples, values


@pytest.mark.parametrize("repeats", [False, True])
def test_one_image_by_hand(repeats):
    samples, values = case(repeats)
    sampler = StaticSampler(0, False) if repeats else DynamicSampler()
    out = composite_samples(samples, values, 3, sampler, True, True)
    assert out["comp_rgb_fg"].flatten().tolist() == pytest.approx(
        [0.5, 0.25, 0, 0, 0, 0, 0, 0, 0.5]
    )
    assert out["opacity"][:, 0].tolist() == pytest.approx([0.75, 0.0, 0.5])
    assert out["depth"][:, 0].tolist() == pytest.approx([0.5 * 1.5 + 0.25 * 2.5, 0, 0.5 * 4.5])
    # Ray 0: w' = 2/3, 1/3 at 1.5 and 2.5: variance 2/9. Ray 2 hides just half, too little.
    assert out["z_variance"][:, 0].tolist() == pytest.approx([2 / 9, 0.0, 0.0])
    assert out["deformation"][:, 0].tolist() == pytest.approx([4.0, 0.0, 1.0])
    normals = torch.tensor([[0.375, 0.375, 0.75], [0, 0, 0], [0.5, 0.25, 0.25]])
    assert torch.allclose(out["comp_normal"], normals, atol=1e-6)
    assert values["weights"].sum().item() == pytest.approx(1.25)


def test_the_variance_of_thin_rays_counts_as_none():
    samples, values = case(False)
    values["density"] = values["density"] / 4
    out = composite_samples(samples, values, 3, DynamicSampler(), False, False)
    assert out["opacity"][0].item() == pytest.approx(1 - 2**-0.5) and not out["z_variance"].any()


@pytest.mark.parametrize("with_normal, with_displacement", [(False, False), (True, False)])
def test_only_what_is_asked_for(with_normal, with_displacement):
    samples, values = case(False)
    out = composite_samples(samples, values, 3, DynamicSampler(), with_normal, with_displacement)
    assert ("comp_normal" in out) == with_normal and "deformation" not in out


def test_what_training_gets_of_each_sample():
    samples, values = case(True)
    composite_samples(samples, values, 3, StaticSampler(0, False), False, False)
    out = per_sample_outputs(samples, values, is_static=True)
    assert out["is_padding"][:, 0].tolist() == [False, True, False, False, True, True]
    assert out["t_intervals"][:, 0].tolist() == [1, 0, 1, 1, 0, 0]
    assert out["weights"][:, 0].tolist() == pytest.approx([0.5, 0, 0.25, 0.5, 0, 0])
    assert "rgb" not in out and out["ray_indices"] is samples.ray_indices
    assert "is_padding" not in per_sample_outputs(samples, values, is_static=False)
