"""Grids small enough to reason about, and the back ends that every law is checked on."""

import pytest
import torch
from threestudio.kernels import GridLayout, cpu_backend

# Levels 0 and 1 are dense in 3D (4^3 = 64 and 6^3 = 216 vertices), levels 2 and 3 hashed.
SMALL = {"n_levels": 4, "log2_hashmap_size": 8, "base_resolution": 4, "per_level_scale": 1.5}


@pytest.fixture
def small_layout():
    """Layout factory: ``small_layout(3)``, with config keys to override."""

    def make(n_input_dims: int, **overrides) -> GridLayout:
        return GridLayout.from_config(n_input_dims, {**SMALL, **overrides})

    return make


@pytest.fixture(params=["torch", "cpu"])
def backend(request, small_layout) -> str:
    """Each back end that runs on CPU tensors; "cpu" is skipped where it cannot be built."""
    if request.param == "cpu":
        reason = cpu_backend.unavailable_reason(small_layout(3), torch.float64)
        if reason:
            pytest.skip(reason)
    return request.param


@pytest.fixture
def draw():
    """Seeded draws: ``draw.uniform(shape)``, ``draw.normal(shape)``, double precision."""

    class Draw:
        generator = torch.Generator().manual_seed(7)

        def uniform(self, *shape, low=0.0, high=1.0):
            unit = torch.rand(shape, generator=self.generator, dtype=torch.float64)
            return low + (high - low) * unit

        def normal(self, *shape):
            return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    return Draw()
