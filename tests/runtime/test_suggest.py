"""Nearest names."""

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
