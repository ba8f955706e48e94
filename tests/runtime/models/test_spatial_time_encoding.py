"""Encodings over space and time: sums, warps, where the time comes from, what is frozen."""

import copy

import pytest
import torch
from threestudio.models.networks import get_encoding
from threestudio.models.spatial_time_encoding import LOOP_OVERLAP

from tests.fixtures.device_waits import WatchForWaits

GRID = {"n_levels": 4, "log2_hashmap_size": 8, "base_resolution": 4, "per_level_scale": 1.5}
SUM = {"otype": "HashGridSpatialTime", **GRID}
DEFORM = {
    "otype": "HashGridSpatialTimeDeform",
    **GRID,
    # Upstream's config, with the keys that only a progressive encoding reads.
    "time_encoding_config": {
        "otype": "Grid", "type": "Hash", "n_levels": 2, "n_features_per_level": 2,
        "log2_hashmap_size": 8, "base_resolution": 4, "per_level_scale": 1.5,
        "start_level": 4, "start_step": 0, "update_steps": 500,
    },
    "time_network_config": {"otype": "VanillaMLP", "n_neurons": 16, "n_hidden_layers": 2},
}  # fmt: skip


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def make(config, **overrides):
    """An encoding whose parameters are large enough to see."""
    encoding = get_encoding(3, {**config, **overrides})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in encoding.parameters():
            parameter.normal_(generator=generator)
    return encoding


@pytest.fixture(params=["sum", "deform"])
def config(request):
    return {"sum": SUM, "deform": DEFORM}[request.param]


def test_features_are_the_sum_of_both_grids():
    encoding = make(SUM)
    x, times = uniform(20, 3), uniform(20, seed=1)
    inner = encoding.encoding
    expected = inner.encoding(x) + inner.encoding_time(torch.cat((x, times[:, None]), dim=1))
    torch.testing.assert_close(encoding(x, frame_times=times), expected)


def test_sum_keeps_the_contracts_parameter_paths():
    names = [name for name, _ in get_encoding(3, SUM).named_parameters()]
    assert names == ["encoding.encoding.params", "encoding.encoding_time.params"]


def test_deformation_looks_the_grid_up_at_the_displaced_and_clamped_point():
    encoding = make(DEFORM).encoding
    x, times = uniform(50, 3), uniform(50, 1, seed=1)
    displacement = encoding.time_network(encoding.encoding_time(torch.cat((x, times), dim=1)))
    warped = (x + displacement).clamp(0, 1)
    assert ((x + displacement) != warped).any()  # the clamp matters
    features, returned = encoding(x, times, out_all=True)
    torch.testing.assert_close(returned, displacement)
    torch.testing.assert_close(features, encoding.encoding(warped))


def test_deformation_starts_at_rest_and_can_leave_it():
    encoding = get_encoding(3, DEFORM).encoding
    x, times = uniform(20, 3), uniform(20, seed=1)
    features, displacement = encoding(x, times, out_all=True)
    assert not displacement.any()
    torch.testing.assert_close(features, encoding.encoding(x))
    torch.nn.init.normal_(encoding.encoding.params)
    encoding(x, times).sum().backward()
    assert encoding.time_network.layers[-1].weight.grad.any()


def test_each_point_has_its_own_time(config):
    encoding = make(config)
    x, times = uniform(12, 3), uniform(12, seed=1)
    together = encoding(x, frame_times=times)
    for index in range(12):
        alone = encoding(x[index : index + 1], frame_times=times[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone)


def test_times_may_be_a_column_a_vector_or_one_for_all(config):
    encoding = make(config)
    x = uniform(6, 3)
    reference = encoding(x, frame_times=torch.full((6,), 0.3))
    for times in (torch.full((6, 1), 0.3), torch.tensor([0.3]), torch.tensor(0.3)):
        torch.testing.assert_close(encoding(x, frame_times=times), reference)


def test_without_times_the_hidden_attribute_counts_and_else_zero(config):
    encoding = make(config)
    x = uniform(6, 3)
    torch.testing.assert_close(encoding(x), encoding(x, frame_times=torch.zeros(6)))
    encoding.encoding.frame_time = 0.7
    torch.testing.assert_close(encoding(x), encoding(x, frame_times=torch.full((6,), 0.7)))
    encoding.encoding.frame_time = torch.linspace(0, 1, 6)[:, None]
    torch.testing.assert_close(encoding(x), encoding(x, frame_times=torch.linspace(0, 1, 6)))
    # An argument wins over the attribute.
    torch.testing.assert_close(encoding(x, frame_times=torch.zeros(6)), make(config)(x))


def test_wrong_number_of_times_is_refused(config):
    message = r"frame_times has shape \(2,\) for 6 points; expected one time per point"
    with pytest.raises(ValueError, match=message):
        make(config)(uniform(6, 3), frame_times=torch.zeros(2))


def test_no_points(config):
    assert make(config)(torch.zeros(0, 3), frame_times=torch.zeros(0)).shape == (0, 8)
    assert make(config)(torch.zeros(0, 3)).shape == (0, 8)


def test_static_sum_adds_the_frozen_time_grid_at_zero():
    encoding = make(SUM, static=True)
    x = uniform(6, 3)
    inner = encoding.encoding
    at_zero = torch.cat((x, torch.zeros(6, 1)), dim=1)
    torch.testing.assert_close(encoding(x), inner.encoding(x) + inner.encoding_time(at_zero))
    encoding(x).sum().backward()
    assert inner.encoding.params.grad is not None
    assert inner.encoding_time.params.grad is None


def test_static_sum_can_skip_the_time_grid():
    encoding = make(SUM, static=True, skip_time_when_static=True)
    x = uniform(6, 3)
    assert torch.equal(encoding(x, frame_times=torch.ones(6)), encoding.encoding.encoding(x))
    moving = make(SUM, static=False, skip_time_when_static=True)
    assert not torch.equal(moving(x), moving.encoding.encoding(x))


def test_static_deformation_leaves_the_points_alone():
    encoding = make(DEFORM, static=True).encoding
    x = uniform(6, 3)
    features, displacement = encoding(x, torch.ones(6), out_all=True)
    assert displacement is None
    assert torch.equal(features, encoding.encoding(x))


def test_time_parameters_are_frozen_and_freed(config):
    inner = make(config, static=True).encoding
    time_parts = [inner.encoding_time] + ([inner.time_network] if config is DEFORM else [])

    def trained(module):
        return [parameter.requires_grad for parameter in module.parameters()]

    assert not any(any(trained(part)) for part in time_parts)
    assert all(trained(inner.encoding))
    inner.set_temp_param_grad(True)
    assert all(all(trained(part)) for part in time_parts)
    inner.set_temp_param_grad(False)
    assert not any(any(trained(part)) for part in time_parts)


def test_moving_deformation_trains_the_time_part_alone():
    inner = make(DEFORM).encoding
    inner.set_temp_param_grad(True)
    assert not inner.encoding.params.requires_grad


def test_config_is_not_changed(config):
    before = copy.deepcopy(config)
    get_encoding(3, config)
    assert config == before


class TestLoopingTime:
    def at(self, encoding, x, time):
        return encoding(x, frame_times=torch.full((len(x),), time))

    def test_the_end_is_the_start_to_the_bit(self, config):
        encoding, x = make(config, loop_time=True), uniform(30, 3)
        assert torch.equal(self.at(encoding, x, 1.0), self.at(encoding, x, 0.0))
        assert torch.equal(self.at(encoding, x, 1.25), self.at(encoding, x, 0.25))
        still = make(config)
        assert not torch.allclose(self.at(still, x, 1.0), self.at(still, x, 0.0), atol=0.1)

    def test_nothing_jumps_at_the_seam_or_where_the_fade_ends(self, config):
        """The grid is trilinear, so steps are bounded by its slope; a jump would be of order 1."""
        encoding, x = make(config, loop_time=True), uniform(30, 3)
        for time in (0.0, LOOP_OVERLAP, 1.0):
            before, after = (self.at(encoding, x, (time + d) % 1.0) for d in (-1e-6, 1e-6))
            assert (after - before).abs().max() < 0.02

    def test_both_sides_of_the_seam_train_the_same_parameters(self):
        encoding, x = make(SUM, loop_time=True), uniform(30, 3)
        grads = []
        for time in (1 - 1e-4, 1e-4):
            grads.append(
                torch.autograd.grad(
                    self.at(encoding, x, time).sum(), encoding.encoding.encoding_time.params
                )[0]
            )
        cosine = torch.nn.functional.cosine_similarity(*grads, dim=0)
        assert cosine > 0.999, "away from the seam the two would read distant cells"
        far = torch.autograd.grad(
            self.at(encoding, x, 0.5).sum(), encoding.encoding.encoding_time.params
        )[0]
        assert torch.nn.functional.cosine_similarity(grads[0], far, dim=0) < 0.9

    def test_the_fade_by_hand(self):
        encoding, x = make(SUM, loop_time=True).encoding, uniform(5, 3)
        stretch = 1 + LOOP_OVERLAP

        def raw(time):
            points = torch.cat((x, torch.full((5, 1), time / stretch)), dim=1)
            return encoding.encoding(x) + encoding.encoding_time(points)

        early = LOOP_OVERLAP / 4
        torch.testing.assert_close(
            self.at(encoding, x, early), 0.75 * raw(1 + early) + 0.25 * raw(early)
        )
        torch.testing.assert_close(self.at(encoding, x, 0.6), raw(0.6))

    def test_mixed_times_are_those_of_each_point(self, config):
        encoding, x = make(config, loop_time=True), uniform(12, 3)
        times = torch.linspace(0, 1, 12)
        together = encoding(x, frame_times=times)
        alone = torch.cat([encoding(x[i : i + 1], frame_times=times[i]) for i in range(12)])
        torch.testing.assert_close(together, alone)

    def test_a_gpus_way_is_the_same_without_asking_for_values(self):
        encoding = make(SUM, loop_time=True).encoding
        table, x = encoding.encoding_time.params, uniform(40, 3)
        for times in (torch.linspace(0, 1.5, 40), torch.full((40,), 0.7)):
            points = torch.cat((x, times[:, None]), dim=1).requires_grad_()
            expected = encoding.encode_time(points)
            wrapped = points[:, -1:].remainder(1.0)
            raw = torch.cat((points[:, :-1], wrapped / (1 + LOOP_OVERLAP)), dim=1)
            with WatchForWaits() as watch:
                actual = encoding._faded_everywhere(encoding.encoding_time(raw), points, wrapped)
            assert not watch.waits
            torch.testing.assert_close(actual, expected)
            grad = uniform(*actual.shape, seed=2)
            for one, other in zip(
                torch.autograd.grad(actual, (points, table), grad),
                torch.autograd.grad(expected, (points, table), grad),
                strict=True,
            ):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_displacement_follows_the_features_behind_the_scaled_input():
    encoding = make(DEFORM, include_xyz=True)
    x, times = uniform(6, 3), uniform(6, seed=1)
    features, displacement = encoding(x, frame_times=times, out_all=True)
    torch.testing.assert_close(features, encoding(x, frame_times=times))
    torch.testing.assert_close(features[:, :3], 2 * x - 1)
    torch.testing.assert_close(displacement, encoding.encoding(x, times, out_all=True)[1])


class TestMotionCells:
    def test_everything_moves_at_first(self, config):
        x, times = uniform(20, 3), uniform(20, seed=1)
        free, celled = make(config), make(config, motion_cells=4)
        assert bool(celled.encoding.moves.all())
        assert torch.equal(celled(x, frame_times=times), free(x, frame_times=times))
        names = set(celled.state_dict()) - set(free.state_dict())
        assert names == {"encoding.moves"}, "checkpoints carry it where it is asked for"

    def test_time_counts_in_the_cells_that_move_alone(self, config):
        """A cell by its index per axis: x in [1/4, 1/2), y in [1/2, 3/4), z in [0, 1/4)."""
        encoding = make(config, motion_cells=4)
        encoding.encoding.moves.zero_()
        encoding.encoding.moves[1, 2, 0] = True
        moving = torch.tensor([[0.26, 0.51, 0.01], [0.49, 0.74, 0.24]])
        still = torch.tensor([[0.24, 0.51, 0.01], [0.26, 0.49, 0.01], [0.26, 0.51, 0.26],
                              [1.0, 1.0, 1.0]])  # fmt: skip
        free = make(config)
        later = torch.tensor([0.6])
        torch.testing.assert_close(
            encoding(moving, frame_times=later), free(moving, frame_times=later)
        )
        torch.testing.assert_close(
            encoding(still, frame_times=later), free(still, frame_times=torch.tensor([0.0]))
        )

    def test_centres_are_in_the_order_of_the_cells(self):
        encoding = make(SUM, motion_cells=3).encoding
        place = torch.tensor([0, 2, 1])
        index = int(place @ torch.tensor([9, 3, 1]))
        torch.testing.assert_close(encoding.motion_cell_centres[index], (place + 0.5) / 3)
        with pytest.raises(ValueError, match="no cells that could be held still"):
            _ = make(SUM).encoding.motion_cell_centres

    @pytest.mark.parametrize("value", [-1, 1.5, True, 1000])
    def test_other_numbers_are_refused(self, value):
        with pytest.raises(ValueError, match="motion_cells is .* whole number from 0"):
            get_encoding(3, {**SUM, "motion_cells": value})
