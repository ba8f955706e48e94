"""nerfacc's functions on plain torch, against loops over rays."""

import math

import pytest
import torch
from threestudio.stand_ins import nerfacc

COUNTS = (3, 0, 4, 1)
N_RAYS = len(COUNTS)


@pytest.fixture
def flat():
    """Samples of four rays, one of them empty: t_starts, t_ends, sigmas, ray_indices."""
    stream = torch.Generator().manual_seed(3)
    rays = torch.tensor([ray for ray, n in enumerate(COUNTS) for _ in range(n)])
    starts = torch.cat([torch.arange(n) * 0.5 for n in COUNTS]).double()
    sigmas = torch.rand(len(rays), generator=stream, dtype=torch.float64) * 3
    return starts, starts + 0.4, sigmas, rays


def slow(starts, ends, sigmas, rays):
    """Weight, transmittance and opacity of each sample, sample by sample."""
    rows = []
    for i in range(len(rays)):
        depth = sum(
            float(sigmas[j] * (ends[j] - starts[j])) for j in range(i) if rays[j] == rays[i]
        )
        alpha = 1 - math.exp(-float(sigmas[i] * (ends[i] - starts[i])))
        rows.append((math.exp(-depth) * alpha, math.exp(-depth), alpha))
    return torch.tensor(rows, dtype=torch.float64).unbind(-1)


def test_weights_of_flat_samples_by_rays_and_by_packs(flat):
    expected = slow(*flat)
    starts, ends, sigmas, rays = flat
    by_rays = nerfacc.render_weight_from_density(
        starts, ends, sigmas, ray_indices=rays, n_rays=N_RAYS
    )
    packs = nerfacc.pack_info(rays, N_RAYS)
    assert packs.tolist() == [[0, 3], [3, 0], [3, 4], [7, 1]]
    by_packs = nerfacc.render_weight_from_density(starts, ends, sigmas, packed_info=packs)
    for want, one, other in zip(expected, by_rays, by_packs):
        torch.testing.assert_close(one, want)
        torch.testing.assert_close(other, want)


def test_dense_samples_agree_with_flat_ones(flat):
    starts, ends, sigmas, _ = (value[3:7] for value in flat)  # the ray of four samples
    rays = torch.zeros(4, dtype=torch.long)
    dense = nerfacc.render_weight_from_density(starts[None], ends[None], sigmas[None])
    for one, want in zip(dense, slow(starts, ends, sigmas, rays)):
        torch.testing.assert_close(one[0], want)
    alphas = dense[2]
    weights, trans = nerfacc.render_weight_from_alpha(alphas)
    torch.testing.assert_close(weights, dense[0])
    torch.testing.assert_close(trans, dense[1])
    behind = nerfacc.render_weight_from_alpha(alphas, prefix_trans=torch.tensor(0.5))
    torch.testing.assert_close(behind[0], dense[0] / 2)


def test_an_opaque_sample_hides_what_lies_behind():
    weights, trans = nerfacc.render_weight_from_alpha(
        torch.tensor([0.5, 1.0, 0.5, 0.25]), ray_indices=torch.tensor([0, 0, 0, 1]), n_rays=2
    )
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5, 0.0, 0.25]))
    torch.testing.assert_close(trans, torch.tensor([1.0, 0.5, 0.0, 1.0]))


def test_gradients_are_those_of_differences(flat):
    starts, ends, sigmas, rays = flat

    def weights(sigmas, starts):
        return nerfacc.render_weight_from_density(
            starts, starts + 0.4, sigmas, ray_indices=rays, n_rays=N_RAYS
        )[0]

    torch.autograd.gradcheck(weights, (sigmas.requires_grad_(), starts.requires_grad_()))


def test_sums_along_rays(flat):
    *_, sigmas, rays = flat
    values = torch.stack([sigmas, sigmas**2], dim=-1)
    sums = nerfacc.accumulate_along_rays(sigmas, values, rays, N_RAYS)
    for ray in range(N_RAYS):
        own = rays == ray
        torch.testing.assert_close(sums[ray], (sigmas[own, None] * values[own]).sum(0))
    assert nerfacc.accumulate_along_rays(sigmas, None, rays).shape == (4, 1)
    dense = nerfacc.accumulate_along_rays(torch.ones(2, 3), torch.ones(2, 3, 4))
    assert torch.equal(dense, torch.full((2, 4), 3.0))


def test_visibility(flat):
    starts, ends, sigmas, rays = flat
    _, trans, alphas = slow(*flat)
    keep = nerfacc.render_visibility_from_density(
        starts, ends, sigmas, ray_indices=rays, n_rays=N_RAYS, early_stop_eps=0.4, alpha_thre=0.3
    )
    assert torch.equal(keep, (trans >= 0.4) & (alphas >= 0.3)) and 0 < keep.sum() < len(keep)
    same = nerfacc.render_visibility_from_alpha(
        alphas, ray_indices=rays, n_rays=N_RAYS, early_stop_eps=0.4, alpha_thre=0.3
    )
    assert torch.equal(keep, same)


def test_rays_and_boxes_by_hand():
    rays_o = torch.tensor([[-3.0, 0.0, 0.0], [-3.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
    rays_d = torch.tensor([[1.0, 0.0, 0.0]] * 3)
    boxes = torch.tensor([[-1.0, -1, -1, 1, 1, 1], [2.0, -1, -1, 4, 1, 1]])
    t_mins, t_maxs, hits = nerfacc.ray_aabb_intersect(rays_o, rays_d, boxes)
    inf = math.inf
    assert t_mins.tolist() == [[2, 5], [inf, inf], [-1, 2]]
    assert t_maxs.tolist() == [[4, 7], [inf, inf], [1, 4]]
    assert hits.tolist() == [[True, True], [False, False], [True, True]]
    t_mins, _, _ = nerfacc.ray_aabb_intersect(rays_o, rays_d, boxes, near_plane=0.5, miss_value=-1)
    assert t_mins.tolist() == [[2, 5], [-1, -1], [0.5, 2]]


class TestGrid:
    @pytest.fixture
    def grid(self):
        return nerfacc.OccGridEstimator([-1.0, -1, -1, 1, 1, 1], resolution=8)

    @pytest.fixture
    def rays(self):
        return torch.tensor([[-3.0, 0.1, 0.1], [-3.0, 9.0, 0.0]]), torch.tensor([[1.0, 0, 0]] * 2)

    def test_state_has_nerfaccs_names(self, grid):
        assert set(grid.state_dict()) == {"resolution", "aabbs", "occs", "binaries"}
        assert grid.binaries.shape == (1, 8, 8, 8) and grid.occs.shape == (512,)
        assert isinstance(grid, nerfacc.AbstractEstimator) and grid.device.type == "cpu"

    def test_samples_have_equal_steps_inside_the_box(self, grid, rays):
        indices, starts, ends = grid.sampling(*rays, render_step_size=0.25)
        assert indices.tolist() == [0] * 8
        torch.testing.assert_close(starts, 2.0 + 0.25 * torch.arange(8))
        torch.testing.assert_close(ends, starts + 0.25)
        indices, starts, _ = grid.sampling(
            *rays, render_step_size=0.25, t_min=torch.tensor([2.6, 0.0]),
            t_max=torch.tensor([3.4, 9.0]), near_plane=0.1, far_plane=9.0,
        )  # fmt: skip
        assert starts.tolist() == [2.5, 2.75, 3.0, 3.25]

    def test_only_occupied_cells_are_sampled(self, grid, rays):
        """A field that fills x > 0 only, found after one update."""
        half = lambda points: (points[:, :1] > 0).float()  # noqa: E731
        grid.update_every_n_steps(step=0, occ_eval_fn=half)
        grid.update_every_n_steps(step=5, occ_eval_fn=lambda points: 1 / 0)  # not its turn
        _, starts, _ = grid.sampling(*rays, render_step_size=0.25)
        assert starts.tolist() == [3.0, 3.25, 3.5, 3.75]

    def test_hidden_samples_are_left_out(self, grid, rays):
        asked = []

        def sigma_fn(starts, ends, indices):
            asked.append(len(starts))
            return torch.where(starts > 2.4, 1e3, 0.0)

        _, starts, _ = grid.sampling(*rays, sigma_fn=sigma_fn, render_step_size=0.25)
        assert asked == [8] and starts.tolist() == [2.0, 2.25, 2.5]
        solid = lambda starts, ends, indices: (starts > 2.4).float()  # noqa: E731
        _, same, _ = grid.sampling(*rays, alpha_fn=solid, render_step_size=0.25)
        assert same.tolist() == starts.tolist()

    def test_jitter_shifts_each_ray(self, grid, rays):
        torch.manual_seed(0)
        _, starts, _ = grid.sampling(*rays, render_step_size=0.25, stratified=True)
        shift = (starts - 2.0 - 0.25 * torch.arange(len(starts))) / 0.25
        assert torch.allclose(shift, shift[0].expand_as(shift), atol=1e-4)
        assert -0.5 <= shift[0] < 0.5 and abs(shift[0]) > 1e-3

    def test_refusals(self, grid, rays):
        with pytest.raises(ValueError, match="levels=2 .* needs the real package nerfacc"):
            nerfacc.OccGridEstimator([0.0, 0, 0, 1, 1, 1], levels=2)
        with pytest.raises(ValueError, match=r"resolution=\[4, 4, 8\] needs"):
            nerfacc.OccGridEstimator([0.0, 0, 0, 1, 1, 1], resolution=[4, 4, 8])
        with pytest.raises(ValueError, match="cone_angle is 0.1; .* expected 0"):
            grid.sampling(*rays, cone_angle=0.1)
        with pytest.raises(RuntimeError, match="updated in training only; call train"):
            grid.eval().update_every_n_steps(0, lambda points: points[:, :1])


def test_no_samples_at_all():
    none = torch.zeros(0)
    rays = torch.zeros(0, dtype=torch.long)
    weights, trans, alphas = nerfacc.render_weight_from_density(
        none, none, none, ray_indices=rays, n_rays=2
    )
    assert weights.shape == trans.shape == alphas.shape == (0,)
    sums = nerfacc.accumulate_along_rays(weights, torch.zeros(0, 3), rays, 2)
    assert torch.equal(sums, torch.zeros(2, 3))
