"""The teacher's words enter as a mapper's do, and are silent where nothing is told."""

import math

import pytest
import torch

from custom.fourd.mappers.composition import SUPER_CATEGORIES, TIME, VIEW, Composition
from custom.fourd.mappers.mapper import MapperOutput
from custom.fourd.mappers.text_injection import TextInjection
from custom.fourd.scripts.image_control import (
    BYPASS_SHARE,
    NOISY_SHARE,
    ControlTeacher,
    taught_contexts,
)
from custom.fourd.scripts.make_family import make_tokenizer
from tests.fixtures.text_encoders import WIDTH, tiny_text_encoder

LAYERS = 3


@pytest.fixture(scope="module")
def injection():
    tokenizer = make_tokenizer()
    return TextInjection(tiny_text_encoder(tokenizer), tokenizer, SUPER_CATEGORIES)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return ControlTeacher(WIDTH)


def told(time, view):
    return {TIME: torch.tensor(time), VIEW: torch.tensor(view)}


def prompts(*captions):
    return [Composition().prompt(caption) for caption in captions]


def test_codes_have_length_one_and_close_where_a_turn_does(teacher):
    times, turns = torch.tensor([0.0, 0.3, 0.3]), torch.tensor([0.0, 1.0, 1.0 + 2 * math.pi])
    codes = teacher(times, turns)
    for code in codes.values():
        assert code.shape == (3, 2, WIDTH)
        torch.testing.assert_close(code.norm(dim=-1), torch.ones(3, 2))
    torch.testing.assert_close(codes[VIEW][1], codes[VIEW][2], atol=1e-5, rtol=0)
    assert torch.equal(codes[TIME][1], codes[TIME][2])
    assert (codes[VIEW][0] - codes[VIEW][1]).abs().max() > 0.05
    # Times 0 and 1 differ, since what grows does not return.
    start, end = teacher(torch.tensor([0.0, 1.0]), torch.zeros(2))[TIME]
    assert (start - end).abs().max() > 0.05


def test_what_is_not_told_is_the_super_category(injection, teacher):
    codes = teacher(torch.tensor([0.2, 0.7]), torch.tensor([0.0, 2.0]))
    text = prompts("a red cube", "a ball")
    quiet = told([False, False], [False, False])
    got = taught_contexts(injection, text, codes, quiet, LAYERS)
    expected = injection.contexts(injection.tokenize(text), {})
    for ours, theirs in ((got.keys, expected.keys), (got.values, expected.values)):
        assert ours.shape == (LAYERS, 2, 77, WIDTH)
        torch.testing.assert_close(ours, theirs.expand_as(ours))


def test_what_is_told_enters_as_a_mappers_word(injection, teacher):
    codes = teacher(torch.tensor([0.2, 0.7]), torch.tensor([0.0, 2.0]))
    text = prompts("a red cube", "a ball")
    got = taught_contexts(injection, text, codes, told([True, True], [True, True]), LAYERS)
    words = {
        name: MapperOutput(
            (code[:, 0] * injection.base_norm(name)).expand(LAYERS, -1, -1),
            code[:, 1].expand(LAYERS, -1, -1),
        )
        for name, code in codes.items()
    }
    expected = injection.contexts(injection.tokenize(text), words)
    torch.testing.assert_close(got.keys, expected.keys)
    torch.testing.assert_close(got.values, expected.values)
    # Each sample is told for itself: the second one hears its view alone.
    mixed = taught_contexts(injection, text, codes, told([True, False], [True, True]), LAYERS)
    torch.testing.assert_close(mixed.values[:, 0], expected.values[:, 0])
    view_alone = {VIEW: words[VIEW]}
    expected = injection.contexts(injection.tokenize(text), view_alone)
    torch.testing.assert_close(mixed.values[:, 1], expected.values[:, 1])


def test_disturbances_are_drawn_and_teach_the_base_alone(injection, teacher):
    n = 200
    codes = teacher(torch.full((n,), 0.4), torch.zeros(n))
    text = prompts(*["a ball"] * n)
    heard = told([True] * n, [False] * n)

    def draw(seed):
        g = torch.Generator().manual_seed(seed)
        return taught_contexts(injection, text, codes, heard, 1, g)

    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(first.values, again.values) and not torch.equal(first.values, other.values)
    has_bypass = (first.keys != first.values).flatten(2).any(dim=-1)[0]
    # Five standard deviations of 200 draws.
    assert float(has_bypass.float().mean()) == pytest.approx(BYPASS_SHARE, abs=0.18)
    # Some codes are as they are, others are far from it; again five standard deviations.
    row = first.keys[0, :, 2]
    calm = taught_contexts(injection, text[:1], {k: v[:1] for k, v in codes.items()},
                           told([True], [False]), 1).keys[0, :, 2]  # fmt: skip
    off = ((row - calm).norm(dim=-1) / calm.norm()).detach()
    assert float((off < 1e-4).float().mean()) == pytest.approx(1 - NOISY_SHARE, abs=0.17)
    assert float(off.max()) > 0.1
    g = torch.Generator().manual_seed(0)
    less = taught_contexts(injection, text, codes, heard, 1, g, 0.1).keys[0, :, 2]
    assert float((less - calm).norm(dim=-1).max()) < 0.5 * float((row - calm).norm(dim=-1).max())


def test_gradients_reach_the_teacher(injection, teacher):
    codes = teacher(torch.tensor([0.2]), torch.tensor([1.0]))
    got = taught_contexts(injection, prompts("a cube"), codes, told([True], [True]), LAYERS)
    (got.values[..., :3].sum() + got.keys[:, :, -1, :5].sum()).backward()
    assert all(float(p.grad.abs().max()) > 0 for p in teacher.parameters())
    teacher.zero_grad()
