"""How long lists are: enough, not much too long, and without asking the device."""

import logging

import pytest
import torch
from threestudio.models.renderers.sample_budget import WINDOW, SampleBudget

from tests.fixtures.device_waits import WatchForWaits


def ask(budget, *counts, n_rays=10, at_most=10**9):
    return [budget.capacity(n_rays, torch.tensor(count), at_most) for count in counts]


def test_the_first_pass_gets_a_quarter_more_than_it_wants():
    for count in (0, 1, 100, 999, 12345, 10**7):
        (length,) = ask(SampleBudget(), count)
        assert count * 1.25 < length <= max(64, count * 1.25 * 1.13 + 1)


def test_only_the_first_pass_over_a_number_of_rays_waits():
    budget = SampleBudget()
    wanted = torch.tensor(500)
    with WatchForWaits() as watch:
        budget.capacity(10, wanted, 10**6)
    assert watch.waits == ["aten._local_scalar_dense.default"]
    with WatchForWaits() as watch:
        for _ in range(5):
            budget.capacity(10, wanted, 10**6)
    assert watch.waits == []
    with WatchForWaits() as watch:
        limited = SampleBudget(800)
        for _ in range(3):
            limited.capacity(10, wanted, 10**6)
    assert watch.waits == []


def test_it_follows_a_growing_count_a_pass_later():
    budget = SampleBudget()
    first, late, after = ask(budget, 1000, 3000, 3000)
    assert late == first < 3000 < 3750 <= after
    assert budget.dropped.item() == 3000 - first
    # Near its end a list grows before anything is left out.
    near = int(0.95 * after)
    _, grown = ask(budget, near, near)
    assert grown > after and budget.dropped.item() == 3000 - first


def test_it_shrinks_when_many_passes_want_less():
    budget = SampleBudget()
    (first,) = ask(budget, 100_000)
    lengths = ask(budget, *[10_000] * (2 * WINDOW))
    assert lengths[WINDOW // 2] == first and 12_500 < lengths[-1] < 15_000
    # A single large pass in the window keeps the length.
    steady = SampleBudget()
    ask(steady, 100_000)
    for _ in range(3):
        lengths = ask(steady, *[10_000] * (WINDOW - 1), 90_000)
    assert min(lengths) == first


def test_few_lengths_occur():
    lengths = {ask(SampleBudget(), count)[0] for count in range(10_000, 20_000, 37)}
    assert len(lengths) <= 9


def test_numbers_of_rays_are_apart():
    budget = SampleBudget()
    ask(budget, 100, n_rays=10)
    (large,) = ask(budget, 10_000, n_rays=500)
    (small,) = ask(budget, 100, n_rays=10)
    assert small < 200 < 10_000 < large


def test_no_list_is_longer_than_what_there_can_be():
    assert ask(SampleBudget(), 100, 100, at_most=110) == [110, 110]
    assert ask(SampleBudget(), 0, at_most=0) == [1]


def test_a_limit_holds_and_says_once_that_it_is_too_small(caplog):
    budget = SampleBudget(1000)
    with caplog.at_level(logging.WARNING, logger="threestudio"):
        lengths = ask(budget, 500, 4000, 5000, 6000)
    assert lengths == [1000] * 4
    told = [r.getMessage() for r in caplog.records if "sample_budget" in r.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("sample_budget is 1000, but a pass had 4000 samples; some are left")


@pytest.mark.parametrize("wants", [[10, 20], [3000, 10, 4000]])
def test_the_counter_is_what_was_left_out(wants):
    budget = SampleBudget(64)
    lengths = ask(budget, *wants)
    expected = sum(max(0, want - length) for want, length in zip(wants, lengths))
    assert budget.dropped.item() == expected and budget.dropped.dtype == torch.long


def test_a_limited_list_is_no_longer_than_needed_after_a_while():
    budget = SampleBudget(100_000)
    lengths = ask(budget, *[200] * (WINDOW + 2))
    assert lengths[0] == 100_000 and lengths[-1] < 400
