import hashlib
import random

import numpy as np
import pytest
import torch
from threestudio.utils import rng


@pytest.fixture(autouse=True)
def restore_seed():
    seed = rng.experiment_seed()
    yield
    rng.set_experiment_seed(seed)


def test_seed_is_the_hash_of_the_tuple_by_hand():
    digest = hashlib.blake2b(b"3|7|2|6|camera", digest_size=8).digest()
    assert rng.derive_seed("camera", 7, 2, seed=3) == int.from_bytes(digest, "little") >> 1


def test_golden_values_never_move():
    rng.set_experiment_seed(0)
    golden = [rng.derive_seed("camera", 0), rng.derive_seed("camera", 0, 0)]
    assert golden == [2435630380685850623, 3628019755713898791]


def test_every_field_changes_the_stream():
    tuples = [
        ("camera", 0, None, 0),
        ("camera", 0, 0, 0),
        ("camera", 1, 0, 0),
        ("camera", 0, 1, 0),
        ("camera", 0, 0, 1),
        ("camerb", 0, 0, 0),
        ("camera", 10, 0, 0),
        ("camera", 1, 10, 0),
        ("camera", -1, 0, 0),
        ("1|camera", 0, 0, 0),
    ]
    seeds = {rng.derive_seed(role, step, item, seed) for role, step, item, seed in tuples}
    assert len(seeds) == len(tuples)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_experiment_seed_is_the_default_and_can_be_overridden():
    rng.set_experiment_seed(5)
    assert rng.derive_seed("x", 1) == rng.derive_seed("x", 1, seed=5)
    assert rng.derive_seed("x", 1) != rng.derive_seed("x", 1, seed=6)


@pytest.mark.parametrize("draw", [rng.randn_items, rng.rand_items])
def test_two_ranks_draw_what_one_rank_draws(draw):
    whole = draw((6, 4), "latent-noise", 3)
    halves = [draw((3, 4), "latent-noise", 3, first_item=first) for first in (0, 3)]
    assert torch.equal(whole, torch.cat(halves))


def test_items_equal_single_streams():
    rows = rng.randn_items((3, 2, 5), "latent-noise", 9, first_item=4)
    for index in range(3):
        stream = rng.generator("latent-noise", 9, 4 + index)
        assert torch.equal(rows[index], torch.randn(2, 5, generator=stream))


def test_scalar_items_and_empty_batches():
    assert rng.rand_items((4,), "background", 0).shape == (4,)
    assert rng.rand_items((0, 3), "background", 0).shape == (0, 3)


def test_distributions_have_their_moments():
    normal = rng.randn_items((200, 100), "a", 0)
    uniform = rng.rand_items((200, 100), "a", 0)
    # 20,000 draws: standard errors are 0.007 (mean) and 0.005 (deviation).
    assert abs(normal.mean()) < 0.04 and abs(normal.std() - 1) < 0.03
    assert abs(uniform.mean() - 0.5) < 0.015 and uniform.min() >= 0 and uniform.max() < 1
    # Rows of neighbouring streams are unrelated.
    corr = torch.corrcoef(normal[:20])
    assert (corr - torch.eye(20)).abs().max() < 0.5


def test_dtype_and_values_agree():
    half = rng.randn_items((2, 3), "a", 1, dtype=torch.float16)
    assert half.dtype == torch.float16
    assert torch.equal(half, rng.randn_items((2, 3), "a", 1).half())


def test_drawing_touches_no_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    rng.randn_items((3, 3), "a", 0)
    rng.generator("b", 0)
    assert torch.equal(before, torch.get_rng_state())


def test_global_generators_are_a_function_of_the_step():
    def draws(step):
        rng.seed_global_generators(step)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draws(3)
    assert draws(4) != first
    assert draws(3) == first


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"seed is '0'; expected an integer"):
        rng.set_experiment_seed("0")
    with pytest.raises(TypeError, match=r"seed is True"):
        rng.set_experiment_seed(True)
    with pytest.raises(ValueError, match=r"role is empty"):
        rng.derive_seed("", 0)
    with pytest.raises(ValueError, match=r"shape is \(\)"):
        rng.randn_items((), "a", 0)
