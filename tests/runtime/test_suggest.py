"""Nearest names."""

import difflib
import random

import pytest
from threestudio.suggest import did_you_mean, nearest


def test_nearest_orders_by_similarity_and_ignores_case():
    assert nearest("Radis", ["radius", "ratio", "bias"], n=1) == ["radius"]
    assert nearest("x", ["b", "a", "c"], n=3) == nearest("x", ["c", "b", "a"], n=3)


def test_did_you_mean_is_silent_when_nothing_is_near():
    assert did_you_mean("radis", ["radius", "bias"]) == " Did you mean 'radius'?"
    assert did_you_mean("zzz", ["radius", "bias"]) == ""


def test_one_random_edit_still_finds_the_key():
    names = ["batch_size", "camera_distance_range", "eval_height", "prob_multi_view", "seed"]
    for name in names:
        for position in range(len(name)):
            dropped = name[:position] + name[position + 1 :]
            assert nearest(dropped, names, n=1, cutoff=0.6) == [name]


@pytest.mark.parametrize("cutoff", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("n", [1, 3])
def test_the_short_way_finds_what_the_long_way_finds(n, cutoff):
    """`difflib.get_close_matches` asks every candidate for its exact similarity."""
    rng = random.Random(0)
    words = {"".join(rng.choices("abc.", k=rng.randint(1, 9))) for _ in range(80)}
    for name in ("abc.a", "cab", "", "a.b.c.a.b"):
        expected = difflib.get_close_matches(name, sorted(words), n=n, cutoff=cutoff)
        assert nearest(name, words, n=n, cutoff=cutoff) == expected
