"""Flows that are kept: found again by content, never by name; whole, or made again."""

import numpy as np
import pytest
import torch

from custom.fourd.data.flow_cache import CachedFlow
from custom.fourd.ops.optical_flow import DISFlow


class Counting(DISFlow):
    """DIS that counts how often it is asked."""

    calls = 0

    def estimate(self, a, b):
        self.calls += 1
        return super().estimate(a, b)


class Broken:
    identity = "broken"

    def estimate(self, a, b):
        return torch.full((2, *a.shape[:2]), float("nan"))


def pictures(seed=0):
    pair = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(pair, (40, 48), mode="bicubic", align_corners=False)
    return large.movedim(1, -1).clamp(0, 1)


def test_a_flow_is_estimated_once_and_returned_alike(tmp_path):
    a, b = pictures()
    estimator = Counting("fast")
    cache = CachedFlow(estimator, tmp_path / "flows")
    first = cache.estimate(a, b)
    assert torch.equal(cache.estimate(a, b), first) and estimator.calls == 1
    again = Counting("fast")
    assert torch.equal(CachedFlow(again, tmp_path / "flows").estimate(a.clone(), b), first)
    assert again.calls == 0
    exact = DISFlow("fast").estimate(a, b)
    assert torch.allclose(first, exact, rtol=2**-10, atol=1e-6) and first.dtype == torch.float32


def test_the_key_is_the_content_and_the_estimator(tmp_path):
    a, b = pictures()
    cache = CachedFlow(DISFlow("fast"), tmp_path)
    touched = a.clone()
    touched[3, 4, 1] += 1 / 255
    others = [
        cache.path(b, a),
        cache.path(touched, b),
        cache.path(a.reshape(48, 40, 3), b.reshape(48, 40, 3)),
        CachedFlow(DISFlow("medium"), tmp_path).path(a, b),
    ]
    assert len({cache.path(a, b), *others}) == 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(b""),
        lambda path: np.save(path, np.zeros((2, 3, 3), np.float16)),
    ],
)
def test_a_damaged_file_is_made_again(tmp_path, damage):
    a, b = pictures()
    cache = CachedFlow(Counting("fast"), tmp_path)
    first = cache.estimate(a, b)
    damage(cache.path(a, b))
    assert torch.equal(cache.estimate(a, b), first) and cache.estimator.calls == 2
    assert torch.equal(cache.estimate(a, b), first) and cache.estimator.calls == 2
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".npy"]


def test_what_is_not_finite_is_not_kept(tmp_path):
    a, b = pictures()
    with pytest.raises(ValueError, match="the flow by broken holds NaN or more than 65504 pixels"):
        CachedFlow(Broken(), tmp_path / "flows").estimate(a, b)
    assert not (tmp_path / "flows").exists()
