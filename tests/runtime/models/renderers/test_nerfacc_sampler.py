"""nerfacc as marcher: refused where it cannot serve; arguments and results mapped as they should.

The package computes on a GPU only, so that its mapping is tried here on the stand-in, whose public
functions have its arguments; tests/gpu compares the package itself.
"""

import sys
import types

import pytest
import torch
from threestudio.models.renderers.nerfacc_sampler import NerfaccSampler, require_nerfacc
from threestudio.models.renderers.ray_samplers import DynamicSampler, March
from threestudio.models.renderers.sampler_choice import SamplerChoice
from threestudio.models.renderers.volume_rendering import RayBatch
from threestudio.stand_ins import nerfacc as stand_in

from tests.runtime.models.renderers.test_nerf_volume_renderer import build
from tests.runtime.models.renderers.test_volume_rendering import BOX

STEP = 2 * 1.7321 / 24


def rays_from_outside(n=60):
    """Rays towards the box, some of which miss. The stand-in's steps start where it begins."""
    stream = torch.Generator().manual_seed(0)
    origins = torch.nn.functional.normalize(torch.randn(n, 3, generator=stream), dim=-1) * 4
    targets = torch.randn(n, 3, generator=stream)
    return origins, torch.nn.functional.normalize(targets - origins, dim=-1)


def march(sampler, occupied=None, far_plane=1e10, jitter=None):
    how = March(BOX, STEP, 24, occupied, 0.0, far_plane, 0)
    return sampler.march(RayBatch(*rays_from_outside(), 60, None), how, jitter)


@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("far_plane", [1e10, 4.1])
def test_marching_gives_the_samples_of_our_own(share, far_plane):
    occupied = None
    if share is not None:
        occupied = torch.rand(5, 5, 5, generator=torch.Generator().manual_seed(1)) < share
    expected = march(DynamicSampler(), occupied, far_plane)
    found = march(NerfaccSampler(stand_in), occupied, far_plane)
    assert found.ray_indices.dtype == torch.long
    assert torch.equal(found.ray_indices, expected.ray_indices)
    assert torch.allclose(found.t_mids, expected.t_mids, atol=1e-5)


def test_the_grid_is_ours_at_every_call():
    sampler = NerfaccSampler(stand_in)
    occupied = torch.zeros(4, 4, 4, dtype=torch.bool)
    assert march(sampler, occupied).n_samples == 0
    occupied[1:3, 1:3, 1:3] = True
    assert march(sampler, occupied).n_samples == march(DynamicSampler(), occupied).n_samples > 0


class Recorder:
    """A grid that remembers what it is asked for."""

    def __init__(self, box, resolution, levels):
        self.box, self.resolution, self.levels = box, resolution, levels
        self.binaries = torch.zeros(levels, resolution, resolution, resolution, dtype=torch.bool)

    def to(self, device):
        return self

    def sampling(self, rays_o, rays_d, **options):
        self.options = options
        return torch.zeros(1, dtype=torch.int32), torch.zeros(1), torch.ones(1)


def test_each_ray_has_a_plane_half_a_step_before_its_first_middle():
    sampler = NerfaccSampler(types.SimpleNamespace(OccGridEstimator=Recorder))
    jitter = torch.linspace(0, 0.99, 60)
    samples = march(sampler, jitter=jitter, far_plane=7.0)
    (grid,) = sampler._grids.values()
    assert grid.box.tolist() == [-1.0] * 3 + [1.0] * 3 and grid.binaries.all()
    ours = march(DynamicSampler(), jitter=jitter, far_plane=7.0)
    first = torch.full((60,), float("inf")).scatter_reduce(
        0, ours.ray_indices, ours.t_starts, "amin"
    )
    seen = first.isfinite()
    assert torch.allclose(grid.options["t_min"][seen], first[seen], atol=1e-5) and seen.any()
    assert grid.options["far_plane"] == 7.0 and grid.options["render_step_size"] == STEP
    assert "stratified" not in grid.options  # the jitter is ours
    assert samples.ray_indices.dtype == torch.long


def test_weights_and_sums_are_those_of_our_own():
    samples = march(DynamicSampler())
    densities = torch.rand(samples.n_samples, generator=torch.Generator().manual_seed(0)) * 4
    values = torch.randn(samples.n_samples, 3, generator=torch.Generator().manual_seed(1))
    results = []
    for sampler in (DynamicSampler(), NerfaccSampler(stand_in)):
        inputs = densities.clone().requires_grad_()
        weights = sampler.render_weights(inputs, samples, 60)
        image = sampler.accumulate_along_rays(weights, values, samples.ray_indices, 60)
        image.square().sum().backward()
        results.append((weights.detach(), image.detach(), inputs.grad))
    for ours, theirs in zip(*results):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_without_the_package_it_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # the package is nowhere
    with pytest.raises(ValueError, match="but the package nerfacc is not installed; expected it"):
        build({"sampler": "nerfacc"})


def package_folder(tmp_path, monkeypatch):
    """An installed package, as far as anyone asks without a GPU."""
    (tmp_path / "nerfacc").mkdir()
    (tmp_path / "nerfacc" / "__init__.py").write_text("__version__ = '0.5.3'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "nerfacc", stand_in)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused(tmp_path, monkeypatch):
    package_folder(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="there is no CUDA device, without which nerfacc marches"):
        require_nerfacc()


def test_rays_on_the_host_are_refused(tmp_path, monkeypatch):
    cfg = build().cfg
    cfg.sampler = "nerfacc"
    package_folder(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    choice = SamplerChoice(cfg)
    assert isinstance(choice.of(torch.device("cuda", 0), True), NerfaccSampler)
    for is_training in (True, False):
        with pytest.raises(ValueError, match="the rays are on cpu; expected them on a CUDA device"):
            choice.of(torch.device("cpu"), is_training)
