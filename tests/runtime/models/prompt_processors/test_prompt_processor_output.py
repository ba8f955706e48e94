import math

import pytest
import torch
from threestudio.models.prompt_processors.prompt_processor_output import PromptProcessorOutput
from threestudio.models.prompt_processors.view_directions import view_directions

SIDE, FRONT, BACK, OVERHEAD = range(4)


@pytest.fixture
def output():
    g = torch.Generator().manual_seed(0)
    directions = view_directions(45, 45, 60)
    return PromptProcessorOutput(
        text_embeddings=torch.randn(1, 3, 2, generator=g),
        uncond_text_embeddings=torch.randn(1, 3, 2, generator=g),
        text_embeddings_vd=torch.randn(4, 3, 2, generator=g),
        uncond_text_embeddings_vd=torch.randn(4, 3, 2, generator=g),
        directions=directions,
        direction2idx={d.name: i for i, d in enumerate(directions)},
        use_perp_neg=True,
    )


def angles(*pairs):
    elevation, azimuth = (torch.tensor(column) for column in zip(*pairs))
    return elevation, azimuth, torch.ones(len(pairs))


def test_conditional_rows_come_first(output):
    text = output.get_text_embeddings(*angles((0.0, 10.0), (0.0, 170.0), (70.0, 0.0)))
    assert text.shape == (6, 3, 2)
    assert torch.equal(text[:3], output.text_embeddings_vd[[FRONT, BACK, OVERHEAD]])
    assert torch.equal(text[3:], output.uncond_text_embeddings_vd[[FRONT, BACK, OVERHEAD]])


def test_without_view_dependence_every_view_gets_the_plain_prompt(output):
    text = output.get_text_embeddings(*angles((0.0, 10.0), (70.0, 170.0)), False)
    assert torch.equal(text[:2], output.text_embeddings.expand(2, -1, -1))
    assert torch.equal(text[2:], output.uncond_text_embeddings.expand(2, -1, -1))


def loop(output, elevation, azimuth):
    """Perp-Neg as the contract words it, one view at a time."""
    vd, uncond_vd = output.text_embeddings_vd, output.uncond_text_embeddings_vd

    def f(coefficients, r):
        a, b, c = coefficients
        return a * math.exp(-b * r) + c

    if elevation > 60:
        uncond = uncond_vd[OVERHEAD]
        return vd[OVERHEAD], uncond, [uncond, uncond], [0.0, 0.0]
    phi = abs((azimuth + 180) % 360 - 180)
    index = FRONT if phi < 45 else BACK if phi > 135 else SIDE
    if phi < 90:
        r = 1 - phi / 90
        positive = r * vd[FRONT] + (1 - r) * vd[SIDE]
        weights = [-f(output.perp_neg_f_fs, r), -f(output.perp_neg_f_sf, 1 - r)]
        return positive, uncond_vd[index], [vd[FRONT], vd[SIDE]], weights
    r = 2 - phi / 90
    positive = r * vd[SIDE] + (1 - r) * vd[BACK]
    weights = [-f(output.perp_neg_f_sb, r), -f(output.perp_neg_f_fsb, r)]
    return positive, uncond_vd[index], [vd[SIDE], vd[FRONT]], weights


def test_perp_neg_against_a_loop(output):
    views = [(0.0, 0.0), (10.0, 30.0), (0.0, 90.0), (0.0, -120.0), (0.0, 180.0), (80.0, 20.0)]
    text, weights = output.get_text_embeddings_perp_neg(*angles(*views))
    count = len(views)
    assert text.shape == (4 * count, 3, 2) and weights.shape == (count, 2)
    for i, (elevation, azimuth) in enumerate(views):
        positive, uncond, negatives, expected = loop(output, elevation, azimuth)
        torch.testing.assert_close(text[i], positive)
        torch.testing.assert_close(text[count + i], uncond)
        torch.testing.assert_close(text[2 * count + 2 * i], negatives[0])
        torch.testing.assert_close(text[2 * count + 2 * i + 1], negatives[1])
        assert weights[i].tolist() == pytest.approx(expected, abs=1e-6)


def test_perp_neg_needs_view_dependence(output):
    with pytest.raises(ValueError, match="use_perp_neg needs view-dependent prompts"):
        output.get_text_embeddings_perp_neg(*angles((0.0, 0.0)), view_dependent_prompting=False)
