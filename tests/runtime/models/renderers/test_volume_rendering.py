"""Marching, weights and sums along rays, against loops and hand-computed cases."""

import math

import pytest
import torch
from threestudio.models.renderers.volume_rendering import (
    RayBatch,
    RaySamples,
    accumulate_along_rays,
    intersect_box,
    march_rays,
    render_weights,
    visible_samples,
)

BOX = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])


def random_rays(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rays from outside and inside the box, many of which miss it."""
    stream = torch.Generator().manual_seed(seed)
    origins = torch.randn(n, 3, generator=stream) * 2
    targets = torch.randn(n, 3, generator=stream)
    return origins, torch.nn.functional.normalize(targets - origins, dim=-1)


class TestIntersectBox:
    def test_axis_ray_by_hand(self):
        origin = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [3.0, 2.0, 0.0]])
        towards = torch.tensor([[-1.0, 0.0, 0.0]]).expand(3, -1)
        t_enter, t_exit = intersect_box(origin, towards, BOX)
        assert t_enter.tolist() == [2.0, 0.0, 0.0]
        assert t_exit.tolist() == [4.0, 1.0, 0.0]  # the last misses

    def test_planes_cut_the_interval(self):
        origin, towards = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[-1.0, 0.0, 0.0]])
        t_enter, t_exit = intersect_box(origin, towards, BOX, near_plane=2.5, far_plane=3.0)
        assert (t_enter.item(), t_exit.item()) == (2.5, 3.0)
        t_enter, t_exit = intersect_box(origin, towards, BOX, near_plane=5.0)
        assert t_exit.item() <= t_enter.item()

    def test_a_ray_in_the_plane_of_a_face_and_one_that_is_not_a_number(self):
        origin = torch.tensor([[3.0, 1.0, 0.0], [float("nan"), 0.0, 0.0]])
        towards = torch.tensor([[-1.0, 0.0, 0.0]]).expand(2, -1)
        t_enter, t_exit = intersect_box(origin, towards, BOX)
        assert torch.isfinite(t_enter).all() and torch.isfinite(t_exit).all()
        assert t_exit[1] <= t_enter[1]

    def test_ends_lie_on_the_box(self):
        origins, directions = random_rays(200)
        t_enter, t_exit = intersect_box(origins, directions, BOX)
        hit = t_exit > t_enter
        assert 0 < hit.sum() < 200
        ends = origins + t_exit[:, None] * directions
        assert torch.allclose(ends[hit].abs().amax(-1), torch.ones(int(hit.sum())), atol=1e-5)
        # A ray is declared a miss only if no point of it is inside.
        along = torch.linspace(0, 8, 400)[None, :, None]
        inside = ((origins[:, None] + along * directions[:, None]).abs() < 1).all(-1).any(-1)
        assert not (inside & ~hit).any()


def march_by_loop(origins, directions, step, n_steps, jitter, occupied):
    """One ray and one sample at a time, in double precision."""
    samples = []
    n_axis = occupied.shape[0]
    for ray, (o, d) in enumerate(zip(origins.double(), directions.double())):
        low, high = 0.0, math.inf
        for axis in range(3):
            near, far = sorted(((-1 - o[axis]) / d[axis], (1 - o[axis]) / d[axis]))
            low, high = max(low, float(near)), min(high, float(far))
        for k in range(n_steps):
            t_mid = low + (k + float(jitter[ray])) * step
            if t_mid >= high:
                break
            cell = ((o + t_mid * d + 1) / 2 * n_axis).floor().long().clamp(0, n_axis - 1)
            if occupied[tuple(cell)]:
                samples.append((ray, t_mid))
    return samples


class TestMarchRays:
    n_steps = 24
    step = 2 * 1.7321 / 24

    def march(self, occupied=None, jitter=None, chunk=0, n=60):
        origins, directions = random_rays(n)
        return march_rays(
            origins, directions, BOX, self.step, self.n_steps, jitter=jitter, occupied=occupied,
            ray_chunk_size=chunk,
        )

    @pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
    def test_equals_the_loop(self, share):
        stream = torch.Generator().manual_seed(1)
        occupied = torch.rand(5, 5, 5, generator=stream) < share
        jitter = torch.rand(60, generator=stream)
        samples = self.march(occupied, jitter)
        expected = march_by_loop(*random_rays(60), self.step, self.n_steps, jitter, occupied)
        assert samples.ray_indices.tolist() == [ray for ray, _ in expected]
        t_mids = torch.tensor([t_mid for _, t_mid in expected])
        assert torch.allclose(samples.t_mids, t_mids, atol=1e-5)
        assert torch.allclose(
            samples.t_ends - samples.t_starts, torch.full_like(t_mids, self.step), atol=1e-6
        )

    def test_a_full_grid_is_no_grid(self):
        full = torch.ones(4, 4, 4, dtype=torch.bool)
        with_grid, without = self.march(full), self.march()
        assert torch.equal(with_grid.ray_indices, without.ray_indices)
        assert torch.allclose(with_grid.t_mids, without.t_mids, atol=1e-6)

    @pytest.mark.parametrize("chunk", [1, 7, 1000])
    def test_chunks_change_nothing(self, chunk):
        occupied = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(2)) < 0.3
        whole, pieces = self.march(occupied), self.march(occupied, chunk=chunk)
        assert torch.equal(whole.ray_indices, pieces.ray_indices)
        assert torch.equal(whole.t_starts, pieces.t_starts)

    def test_nothing_occupied_gives_no_sample(self):
        samples = self.march(torch.zeros(4, 4, 4, dtype=torch.bool))
        assert samples.n_samples == 0 and samples.ray_indices.dtype == torch.long

    def test_jitter_moves_samples_by_less_than_a_step(self):
        still, moved = self.march(jitter=torch.zeros(60)), self.march(jitter=torch.full((60,), 0.9))
        first = still.ray_indices[0]
        before = still.t_mids[still.ray_indices == first][0]
        after = moved.t_mids[moved.ray_indices == first][0]
        assert (after - before).item() == pytest.approx(0.9 * self.step, rel=1e-4)


def weights_by_loop(densities, lengths, ray_indices):
    """NeRF's equation 3 written out."""
    weights, ray, trans = [], None, None
    for density, length, index in zip(densities, lengths, ray_indices.tolist()):
        if index != ray:
            ray, trans = index, torch.ones((), dtype=densities.dtype)
        alpha = 1 - torch.exp(-density * length)
        weights.append(trans * alpha)
        trans = trans * (1 - alpha)
    return torch.stack(weights)


class TestRenderWeights:
    rays = torch.tensor([1, 1, 1, 3, 4, 4, 4, 4])

    def inputs(self, dtype=torch.float64, scale=3.0):
        stream = torch.Generator().manual_seed(0)
        densities = torch.rand(8, generator=stream, dtype=dtype) * scale
        lengths = torch.rand(8, generator=stream, dtype=dtype) * 0.5 + 0.1
        return densities.requires_grad_(), lengths.requires_grad_()

    def test_one_ray_by_hand(self):
        # Optical depth ln 2 per sample: each takes half of what is left.
        weights = render_weights(
            torch.full((3,), math.log(2.0)), torch.ones(3), torch.zeros(3, dtype=torch.long), 1
        )
        assert weights.tolist() == pytest.approx([0.5, 0.25, 0.125])

    def test_values_and_gradients_equal_the_loop(self):
        ours, loops = [], []
        for function, results in ((render_weights, ours), (weights_by_loop, loops)):
            densities, lengths = self.inputs()
            extra = (5,) if function is render_weights else ()
            weights = function(densities, lengths, self.rays, *extra)
            (weights * torch.linspace(-1, 2, 8)).sum().backward()
            results += [weights.detach(), densities.grad, lengths.grad]
        for mine, theirs in zip(ours, loops):
            assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-14)

    def test_gradcheck(self):
        densities, lengths = self.inputs()
        assert torch.autograd.gradcheck(
            lambda d, t: render_weights(d, t, self.rays, 5), (densities, lengths)
        )

    def test_precision_survives_many_opaque_rays(self):
        # The running sum reaches 2e6; a ray's own depth of 0.01 must still be exact.
        n_rays = 20_000
        rays = torch.arange(n_rays).repeat_interleave(2)
        densities = torch.tensor([0.01, 100.0]).repeat(n_rays)
        weights = render_weights(densities, torch.ones(2 * n_rays), rays, n_rays).view(-1, 2)
        expected = torch.tensor([-math.expm1(-0.01), math.exp(-0.01)])
        assert torch.allclose(weights, expected.expand(n_rays, 2), rtol=1e-6)

    def test_infinite_density_is_opaque_and_spares_the_other_rays(self):
        rays = torch.tensor([0, 0, 1, 1])
        half = math.log(2.0)
        weights = render_weights(
            torch.tensor([float("inf"), 1.0, half, half]), torch.ones(4), rays, 2
        )
        assert weights.tolist() == pytest.approx([1.0, 0.0, 0.5, 0.25])

    def test_empty_samples_change_nothing(self):
        densities, lengths = self.inputs()
        whole = render_weights(densities, lengths, self.rays, 5)
        thin = densities.detach().clone()
        thin[[1, 5]] = 0.0
        kept = torch.tensor([0, 2, 3, 4, 6, 7])
        sparse = render_weights(thin[kept], lengths[kept], self.rays[kept], 5)
        dense = render_weights(thin, lengths, self.rays, 5)
        assert torch.allclose(dense[kept], sparse, rtol=1e-12)
        assert not torch.allclose(dense, whole)

    def test_no_samples(self):
        none = torch.zeros(0)
        assert render_weights(none, none, none.long(), 4).shape == (0,)
        assert accumulate_along_rays(none, None, none.long(), 4).tolist() == [[0.0]] * 4


def test_accumulate_sums_per_ray():
    weights = torch.tensor([0.5, 0.25, 1.0])
    values = torch.tensor([[2.0, 0.0], [4.0, 4.0], [1.0, 3.0]])
    rays = torch.tensor([0, 0, 2])
    assert accumulate_along_rays(weights, values, rays, 3).tolist() == [
        [2.0, 1.0],
        [0.0, 0.0],
        [1.0, 3.0],
    ]
    assert accumulate_along_rays(weights, None, rays, 3)[:, 0].tolist() == [0.75, 0.0, 1.0]


def test_visible_samples_by_hand():
    rays = torch.tensor([0, 0, 0, 1])
    samples = RaySamples(rays, torch.zeros(4), torch.ones(4))
    # Ray 0: thin, then opaque, then hidden behind it (T = e^-10.001 < 1e-4). Ray 1: just thick.
    densities = torch.tensor([0.001, 10.0, 1.0, 0.02])
    keep = visible_samples(densities, samples, 2, alpha_threshold=0.01, early_stop_eps=1e-4)
    assert keep.tolist() == [False, True, False, True]
    assert samples.select(keep.nonzero()[:, 0]).ray_indices.tolist() == [0, 1]
    assert visible_samples(densities, samples, 2, 0.0, 0.0).all()


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() > 0:
                self.numel = max(self.numel, value.untyped_storage().nbytes() // 4)
        return result


class TestBoundedMemory:
    def test_bookkeeping_never_holds_all_candidates(self):
        origins, directions = random_rays(2000)
        occupied = torch.zeros(8, 8, 8, dtype=torch.bool)
        occupied[3:5, 3:5, 3:5] = True
        with LargestTensor() as largest:
            samples = march_rays(
                origins, directions, BOX, 0.02, 174, occupied=occupied, ray_chunk_size=16
            )
        assert samples.n_samples > 0
        # All candidates would be 348 000; a pass has 16 rays of them, and the rest is per ray.
        assert largest.numel <= max(2000 * 6, 2 * 16 * 174, samples.n_samples * 2)

    def test_only_the_box_of_occupied_cells_is_walked(self):
        origins, directions = random_rays(500)
        occupied = torch.zeros(8, 8, 8, dtype=torch.bool)
        occupied[3:5, 3:5, 3:5] = True
        with LargestTensor() as largest:
            march_rays(
                origins, directions, BOX, 0.02, 174, occupied=occupied, ray_chunk_size=10**6
            )
        # The occupied box has a quarter of the side; few rays meet it, for a quarter of the steps.
        assert largest.numel < 500 * 174 / 8


class TestRayBatch:
    def batch(self, times=None):
        origins, directions = random_rays(12)
        return RayBatch(origins, directions, image_size=4, frame_times=times)

    def samples(self, rays):
        rays = torch.tensor(rays)
        t_starts = torch.arange(len(rays)) * 1.0
        return RaySamples(rays, t_starts, t_starts + 0.5)

    def test_points_images_and_times(self):
        batch = self.batch(torch.tensor([0.1, 0.2, 0.3]))
        samples = self.samples([0, 3, 4, 11])
        assert batch.images(samples).tolist() == [0, 0, 1, 2]
        assert batch.times(samples).tolist() == pytest.approx([0.1, 0.1, 0.2, 0.3])
        expected = batch.origins[4] + 2.25 * batch.directions[4]
        assert torch.allclose(batch.points(samples)[2], expected)
        assert self.batch().times(samples) is None

    @pytest.mark.parametrize("size", [1, 5, 12, 99])
    def test_slices_know_their_images(self, size):
        batch = self.batch(torch.tensor([0.1, 0.2, 0.3]))
        images = []
        for part in batch.split(size):
            n_rays = part.origins.shape[0]
            assert n_rays <= size
            images += part.images(self.samples(list(range(n_rays)))).tolist()
        assert images == [0] * 4 + [1] * 4 + [2] * 4


def test_opacity_is_one_minus_the_light_that_passes():
    stream = torch.Generator().manual_seed(4)
    rays = torch.randint(0, 50, (600,), generator=stream).sort().values
    densities = torch.rand(600, generator=stream) * 4
    lengths = torch.rand(600, generator=stream) * 0.2
    weights = render_weights(densities, lengths, rays, 50)
    opacity = accumulate_along_rays(weights, None, rays, 50)[:, 0]
    depth = torch.zeros(50).index_add(0, rays, densities * lengths)
    assert torch.allclose(opacity, 1 - torch.exp(-depth), atol=1e-6)
    assert (weights >= 0).all()
