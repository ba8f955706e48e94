"""The occupancy grid: what it keeps, what it forgets, what it draws."""

import pytest
import torch
from threestudio.models.estimators import OccupancyGridEstimator

BOX = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])


def corner_blob(points, times):
    """Something in the octant where all coordinates are positive."""
    return (points > 0).all(dim=-1, keepdim=True).float()


def test_a_fresh_grid_is_full():
    grid = OccupancyGridEstimator(BOX, 4)
    assert grid.binaries.all() and grid.binaries.shape == (1, 4, 4, 4)
    assert grid.aabbs.tolist() == [[-1.0] * 3 + [1.0] * 3]


def test_the_warm_up_finds_exactly_the_filled_cells():
    grid = OccupancyGridEstimator(BOX, 4)
    grid.update(corner_blob, step=0)
    expected = torch.zeros(4, 4, 4, dtype=torch.bool)
    expected[2:, 2:, 2:] = True
    assert torch.equal(grid.binaries[0], expected)
    assert torch.equal(grid.occs.view(4, 4, 4), expected.float())


def test_each_point_lies_in_its_cell():
    seen = []
    grid = OccupancyGridEstimator(torch.tensor([[0.0, 0.0, 0.0], [2.0, 4.0, 8.0]]), 2)
    grid.update(lambda points, times: (seen.append(points), points[:, :1])[1], step=0)
    cells = (seen[0] / torch.tensor([1.0, 2.0, 4.0])).long()
    assert cells.tolist() == [[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]


def test_what_has_gone_decays_and_leaves():
    grid = OccupancyGridEstimator(BOX, 4)
    grid.update(corner_blob, step=0)
    for step in range(1, 4):
        grid.update(lambda points, times: torch.zeros(len(points), 1), step=step)
    assert grid.occs.max().item() == pytest.approx(0.95**3)
    assert grid.binaries.sum() == 8  # still above min(mean, 0.01)
    for step in range(4, 120):
        grid.update(lambda points, times: torch.zeros(len(points), 1), step=step)
    assert grid.occs.max() < 0.01


def test_threshold_is_the_smaller_of_mean_and_bound():
    grid = OccupancyGridEstimator(BOX, 4)
    grid.update(lambda points, times: 0.004 * corner_blob(points, times) + 0.0001, step=0)
    # The mean is about 0.0006: below the bound of 0.01, above the empty cells.
    assert grid.binaries.sum() == 8
    grid.update(lambda points, times: torch.full((len(points), 1), 0.5), step=1, threshold=0.01)
    assert grid.binaries.all()
    assert grid.mean_occupancy.item() == pytest.approx(0.5)


class TestClosedCells:
    def grid(self):
        grid = OccupancyGridEstimator(BOX, 4)
        grid.close((grid.cell_centres[:, 0] > 0) & (grid.cell_centres[:, 1] > 0))
        return grid

    def test_they_are_empty_from_the_first_step_on_and_after_updates(self):
        grid = self.grid()
        for step in (0, 300, 301):  # in the warm-up, and after it
            assert not grid.binaries[0, 2:, 2:].any()
            assert step > 0 or grid.binaries.sum() == 64 - 16
            grid.update(lambda points, times: torch.ones(len(points), 1), step=step)
        assert grid.binaries.sum() == 64 - 16 and (grid.occs < 0).sum() == 16

    def test_the_mean_is_that_of_the_others(self):
        grid = self.grid()
        grid.update(lambda points, times: torch.full((len(points), 1), 0.004), step=0)
        assert grid.mean_occupancy.item() == pytest.approx(0.004, rel=1e-4)

    def test_a_checkpoint_carries_them(self):
        again = OccupancyGridEstimator(BOX, 4)
        again.load_state_dict(self.grid().state_dict())
        again.update(corner_blob, step=0)
        assert not again.binaries.any()

    def test_centres_are_in_the_order_of_the_cells(self):
        grid = OccupancyGridEstimator(torch.tensor([[0.0, 0.0, 0.0], [2.0, 4.0, 8.0]]), 2)
        assert grid.cell_centres[:3].tolist() == [[0.5, 1, 2], [0.5, 1, 6], [0.5, 3, 2]]


class TestAfterTheWarmUp:
    def cells_asked(self, step=300, resolution=16):
        grid = OccupancyGridEstimator(BOX, resolution)
        grid.update(corner_blob, step=0)
        seen = []

        def asked(points, times):
            seen.append(points)
            return corner_blob(points, times)

        grid.update(asked, step=step)
        return torch.cat(seen), grid

    def test_half_of_the_cells_are_asked_and_the_occupied_ones_more_often(self):
        points, grid = self.cells_asked()
        assert len(points) == grid.n_cells // 2
        occupied = corner_blob(points, None).mean()
        # A quarter uniform (an eighth of it occupied), a quarter occupied as far as there are any.
        assert occupied.item() == pytest.approx((1024 / 8 + 512) / 2048, rel=0.1)

    def test_uniform_draws_find_what_appears(self):
        grid = OccupancyGridEstimator(BOX, 8)
        grid.update(lambda points, times: torch.zeros(len(points), 1), step=0)
        for step in range(300, 330):
            grid.update(corner_blob, step=step)
        assert grid.binaries[0, 4:, 4:, 4:].float().mean() > 0.95

    def test_a_cell_asked_twice_decays_once(self):
        grid = OccupancyGridEstimator(BOX, 4)
        grid.update(lambda points, times: torch.ones(len(points), 1), step=0)
        grid.update(lambda points, times: torch.zeros(len(points), 1), step=300)
        assert torch.equal(grid.occs.unique(), torch.tensor([0.95, 1.0]))

    def test_draws_follow_the_step_only(self):
        torch.manual_seed(0)
        first, _ = self.cells_asked()
        torch.manual_seed(1)
        again, _ = self.cells_asked()
        assert torch.equal(first, again)
        assert not torch.equal(first, self.cells_asked(step=301)[0])


class TestTimes:
    @pytest.mark.parametrize("quarter", [0, 1, 3])
    def test_stratified_and_the_largest_counts(self, quarter):
        grid = OccupancyGridEstimator(BOX, 4)
        seen = []

        def there_for_a_quarter(points, times):
            seen.append(times)
            return ((times * 4).floor() == quarter).float()[:, None]

        grid.update(there_for_a_quarter, step=0, n_times=4)
        assert len(seen) == 4
        for index, times in enumerate(seen):
            assert times.min() >= index / 4 and times.max() < (index + 1) / 4
            assert times.unique().numel() > 32  # each cell has its own
        assert grid.occs.min() == 1.0 and grid.binaries.all()

    def test_one_time_is_none(self):
        seen = []
        OccupancyGridEstimator(BOX, 2).update(
            lambda points, times: (seen.append(times), points[:, :1])[1], step=0
        )
        assert seen == [None]


def test_chunks_change_nothing():
    whole, pieces = OccupancyGridEstimator(BOX, 4), OccupancyGridEstimator(BOX, 4)
    whole.update(lambda p, t: p.norm(dim=-1, keepdim=True) * t[:, None], step=3, n_times=2)
    pieces.update(
        lambda p, t: p.norm(dim=-1, keepdim=True) * t[:, None], step=3, n_times=2, chunk_size=7
    )
    assert torch.equal(whole.occs, pieces.occs)


def test_resolution_is_checked():
    with pytest.raises(ValueError, match="occupancy_resolution is 0"):
        OccupancyGridEstimator(BOX, 0)


def test_a_margin_gives_room_to_grow_but_not_in_closed_cells():
    """One filled cell: its 26 neighbours are open too, less the one that is closed."""
    grid = OccupancyGridEstimator(torch.tensor([[-1.0] * 3, [1.0] * 3]), 8)
    centres = grid.cell_centres
    middle = centres[4 * 64 + 3 * 8 + 2]

    def filled(points, times):
        return ((points - middle).abs().amax(dim=1, keepdim=True) < 0.125).float()

    closed = torch.zeros(grid.n_cells, dtype=torch.bool)
    closed[5 * 64 + 3 * 8 + 2] = True
    grid.close(closed)
    grid.update(filled, step=0, warmup_steps=1)
    assert int(grid.binaries.sum()) == 1
    for step in range(1, 4):
        grid.update(filled, step=step, warmup_steps=9, margin=1)
        near = ((centres - middle).abs().amax(dim=1) < 0.3) & ~closed
        assert torch.equal(grid.binaries.view(-1), near), "it does not creep from step to step"
    assert int(grid.binaries.sum()) == 26
