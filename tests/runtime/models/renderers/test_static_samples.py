"""Lists of fixed length: the rule by hand, the samples against those of lists of any length."""

import pytest
import torch
from threestudio.models.renderers.sample_budget import SampleBudget
from threestudio.models.renderers.static_samples import Places, march_rays_static, select_static
from threestudio.models.renderers.volume_rendering import RaySamples, march_rays

from tests.fixtures.device_waits import WatchForWaits
from tests.runtime.models.renderers.test_volume_rendering import BOX, LargestTensor, random_rays

STEP = 2 * 1.7321 / 24


class TestPlaces:
    @pytest.mark.parametrize("wanted", [0, 1, 2, 5, 7, 12, 1000])
    @pytest.mark.parametrize("capacity", [1, 2, 5, 8, 12])
    def test_place_j_holds_sample_floor_of_j_n_over_c(self, wanted, capacity):
        places = Places(torch.tensor(wanted), capacity)
        entries, is_first = places.entries()
        of_samples = places.of_samples(torch.arange(wanted)).tolist()
        held = {entry: sample for sample, entry in enumerate(of_samples) if entry != capacity}
        if wanted == 0:
            assert entries.tolist() == [0] * capacity and not is_first.any()
            return
        assert [held[entry] for entry in entries.tolist()] == [
            j * wanted // capacity for j in range(capacity)
        ]
        assert is_first.sum() == min(wanted, capacity) == len(held)
        assert places.stretch.item() == pytest.approx(max(1.0, wanted / capacity))

    def test_counts_beyond_32_bits(self):
        wanted, capacity = 3 * 10**9, 10**7
        places = Places(torch.tensor(wanted), capacity)
        ranks = torch.tensor([0, 1, 299, 300, 301, wanted - 300, wanted - 1])
        expected = [0, capacity, capacity, 1, capacity, capacity - 1, capacity]
        assert places.of_samples(ranks).tolist() == expected


def march_both(share=0.3, n=60, chunk=0, limit=0, jittered=True, step=STEP, n_steps=24):
    stream = torch.Generator().manual_seed(1)
    occupied = None
    if share is not None:
        occupied = torch.rand(5, 5, 5, generator=stream) < share
    jitter = torch.rand(n, generator=stream) if jittered else None
    rays, budget = random_rays(n), SampleBudget(limit)
    dynamic = march_rays(*rays, BOX, step, n_steps, jitter=jitter, occupied=occupied)
    static = march_rays_static(
        *rays, BOX, step, n_steps, budget, jitter=jitter, occupied=occupied, ray_chunk_size=chunk
    )
    return dynamic, static, budget


class TestMarch:
    @pytest.mark.parametrize("share", [None, 0.02, 0.3, 1.0])
    @pytest.mark.parametrize("chunk", [0, 1, 7, 1000])
    def test_the_samples_are_those_of_the_dynamic_list(self, share, chunk):
        dynamic, static, _ = march_both(share, chunk=chunk, jittered=share != 1.0)
        assert static.n_samples > dynamic.n_samples > 0
        real = static.select((~static.is_padding).nonzero()[:, 0])
        for name in ("ray_indices", "t_starts", "t_ends"):
            assert torch.equal(getattr(real, name), getattr(dynamic, name)), name

    def test_repeats_lie_where_samples_do_in_order(self):
        dynamic, static, _ = march_both()
        places = {(int(r), float(t)) for r, t in zip(dynamic.ray_indices, dynamic.t_mids)}
        found = [(int(r), float(t)) for r, t in zip(static.ray_indices, static.t_mids)]
        assert set(found) == places and found == sorted(found)
        assert torch.equal(static.t_starts[static.is_padding], static.t_ends[static.is_padding])

    @pytest.mark.parametrize("limit", [1, 7, 50])
    def test_a_short_list_takes_every_so_manyth_sample_and_lengthens_it(self, limit):
        dynamic, static, budget = march_both(limit=limit)
        n = dynamic.n_samples
        assert static.n_samples == limit < n and budget.dropped.item() == n - limit
        taken = torch.tensor([j * n // limit for j in range(limit)])
        assert torch.equal(static.ray_indices, dynamic.ray_indices[taken])
        assert torch.allclose(static.t_mids, dynamic.t_mids[taken], atol=1e-6)
        lengths = static.t_ends - static.t_starts
        assert torch.allclose(lengths, torch.full_like(lengths, STEP * n / limit), rtol=1e-5)

    def test_a_short_list_keeps_the_depth_of_every_ray_to_a_sample(self):
        dynamic, static, _ = march_both(share=1.0, limit=120)
        n_rays, stretch = 60, dynamic.n_samples / 120
        sums = [
            torch.zeros(n_rays).index_add(0, s.ray_indices, s.t_ends - s.t_starts)
            for s in (dynamic, static)
        ]
        assert (sums[0] - sums[1]).abs().max() < STEP * (stretch + 1)

    def test_a_list_of_just_the_right_length_has_no_repeats(self):
        dynamic, _, _ = march_both()
        _, static, budget = march_both(limit=dynamic.n_samples)
        assert not static.is_padding.any() and budget.dropped.item() == 0
        assert torch.equal(static.t_starts, dynamic.t_starts)

    def test_nothing_to_see(self):
        dynamic, static, budget = march_both(share=0.0)
        assert dynamic.n_samples == 0 < static.n_samples
        assert static.is_padding.all() and not static.t_starts.any() and budget.dropped == 0
        origins, directions = random_rays(5)
        away = march_rays_static(origins * 9, origins, BOX, STEP, 24, SampleBudget(3))
        assert away.is_padding.all() and away.n_samples == 3
        lost = march_rays_static(
            origins * float("nan"), directions, BOX, STEP, 24, SampleBudget(3),
            occupied=torch.ones(4, 4, 4, dtype=torch.bool),
        )  # fmt: skip
        assert lost.is_padding.all() and torch.isfinite(lost.t_starts).all()

    def test_no_rays(self):
        none = torch.zeros(0, 3)
        samples = march_rays_static(none, none, BOX, STEP, 24, SampleBudget())
        assert samples.n_samples == 0 and samples.ray_indices.dtype == torch.long

    def test_one_sample(self):
        origin, towards = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[0.0, 0.0, -1.0]])
        one = march_rays_static(origin, towards, BOX, 2.0, 1, SampleBudget())
        assert one.t_mids.unique().tolist() == [3.0]
        assert (~one.is_padding).sum() == 1 and (one.t_ends - one.t_starts).sum() == 2.0

    def test_random_grids_and_budgets_agree_with_the_dynamic_list(self):
        stream = torch.Generator().manual_seed(3)
        for trial in range(12):
            n = int(torch.randint(1, 40, (), generator=stream))
            limit = int(torch.randint(1, 400, (), generator=stream))
            share = float(torch.rand((), generator=stream)) ** 2
            dynamic, static, budget = march_both(share, n, chunk=trial, limit=limit)
            total = dynamic.n_samples
            assert static.n_samples == min(limit, n * 24)
            assert (~static.is_padding).sum() == min(total, static.n_samples)
            assert budget.dropped == max(0, total - static.n_samples)


class TestMemory:
    def test_it_is_that_of_a_pass_and_the_list(self):
        origins, directions = random_rays(1500)
        occupied = torch.ones(8, 8, 8, dtype=torch.bool)
        with LargestTensor() as largest:
            march_rays_static(
                origins, directions, BOX, 0.02, 174, SampleBudget(4000), occupied=occupied,
                ray_chunk_size=16,
            )  # fmt: skip
        # All candidates would be 261 000; a pass has 16 rays of them, of 8 bytes each.
        assert largest.numel <= max(1500 * 6, 2 * 16 * 174, 2 * 4001)


class TestSelect:
    def samples(self):
        return march_both()[1]

    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_keeps_what_a_list_of_any_length_would(self, share):
        samples, budget = self.samples(), SampleBudget()
        keep = torch.rand(samples.n_samples, generator=torch.Generator().manual_seed(5)) < share
        expected = samples.select((keep & ~samples.is_padding).nonzero()[:, 0])
        found = select_static(samples, keep, 60, budget)
        assert found.n_samples <= samples.n_samples
        real = found.select((~found.is_padding).nonzero()[:, 0])
        assert torch.equal(real.ray_indices, expected.ray_indices)
        assert torch.allclose(real.t_starts, expected.t_starts, atol=1e-6)
        assert torch.allclose(real.t_ends, expected.t_ends, atol=1e-6)
        assert budget.dropped == 0
        # Repeats take no place: one for each sample that is kept suffices.
        just = SampleBudget(max(1, expected.n_samples))
        assert not select_static(samples, keep, 60, just).is_padding[: expected.n_samples].any()
        assert just.dropped == 0

    def test_too_many_are_thinned(self):
        rays = torch.tensor([0, 0, 0, 1, 1, 1])
        t_starts = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 2.0])
        samples, budget = RaySamples(rays, t_starts, t_starts + 1), SampleBudget(2)
        found = select_static(
            samples, torch.tensor([True, True, False, True, True, False]), 2, budget
        )
        # Four are kept, for two places: the first and the third of them, twice as long.
        assert found.ray_indices.tolist() == [0, 1] and found.t_mids.tolist() == [0.5, 0.5]
        assert (found.t_ends - found.t_starts).tolist() == [2.0, 2.0]
        assert budget.dropped.item() == 2


def test_the_host_waits_for_nothing():
    rays, budget = random_rays(30), SampleBudget()
    occupied = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.4
    arguments = (*rays, BOX, STEP, 24, budget, None, occupied)
    kept = SampleBudget()
    keep = torch.arange(march_rays_static(*arguments).n_samples) % 3 > 0
    select_static(march_rays_static(*arguments), keep, 30, kept)
    with WatchForWaits() as watch:
        select_static(march_rays_static(*arguments), keep, 30, kept)
    assert watch.waits == []
    with WatchForWaits() as watch:
        march_rays(*rays, BOX, STEP, 24)
    assert {"aten.nonzero.default", "aten._local_scalar_dense.default"} <= set(watch.waits)
