"""Figures of generated pairs, by kind, against hand-computed ones."""

import math

import pytest
import torch

from custom.fourd.data.pair_sampling import KINDS
from custom.fourd.metrics.image_quality import psnr
from custom.fourd.systems.mapper_evaluation import _rows
from custom.fourd.systems.mapper_scores import PairScores


def pairs(kinds, source, truth, size=12):
    """Pairs of flat grey images whose objects fill the left half of the picture."""
    alpha = torch.zeros(len(kinds), size, size, 1)
    alpha[:, :, : size // 2] = 1.0
    flat = torch.ones(len(kinds), size, size, 3)
    return {
        "cond_rgb": flat * torch.tensor(source).view(-1, 1, 1, 1),
        "target_rgb": flat * torch.tensor(truth).view(-1, 1, 1, 1),
        "cond_alpha": alpha,
        "target_alpha": alpha,
        "pair_kind": torch.tensor([KINDS.index(kind) for kind in kinds]),
    }


def flat_psnr(difference):
    return -20 * math.log10(difference)


def test_figures_are_means_over_the_pairs_of_a_kind_by_hand():
    kinds = [KINDS[0], KINDS[1], KINDS[0]]
    batch = pairs(kinds, source=[0.1, 0.2, 0.5], truth=[0.5, 0.6, 0.6])
    images = batch["target_rgb"] + torch.tensor([0.1, 0.01, 0.2]).view(-1, 1, 1, 1)
    scores = PairScores()
    scores.add(images, batch)
    summary = scores.summary()
    assert set(summary) == {KINDS[0], KINDS[1]}
    first, second = summary[KINDS[0]], summary[KINDS[1]]
    assert (first["pairs"], second["pairs"]) == (2, 1)
    assert first["psnr"] == pytest.approx((flat_psnr(0.1) + flat_psnr(0.2)) / 2, abs=1e-3)
    scores.add(batch["cond_rgb"], batch, "copy")
    first, second = (scores.summary()[kind] for kind in KINDS[:2])
    assert first["copy_psnr"] == pytest.approx((flat_psnr(0.4) + flat_psnr(0.1)) / 2, abs=1e-3)
    assert second["psnr"] == pytest.approx(flat_psnr(0.01), abs=1e-2)
    assert second["copy_psnr"] == pytest.approx(flat_psnr(0.4), abs=1e-3)
    assert second["ssim"] > second["copy_ssim"], "nearer to the truth"


def test_masked_figures_leave_the_background_out():
    """Errors far from both silhouettes do not count there, and do count in the whole picture."""
    batch = pairs([KINDS[0]], source=[0.5], truth=[0.5], size=32)
    images = batch["target_rgb"].clone()
    images[:, :, -2:] += 0.3
    scores = PairScores()
    scores.add(images, batch)
    figures = scores.summary()[KINDS[0]]
    assert figures["psnr"] == pytest.approx(flat_psnr(0.3 * math.sqrt(2 / 32)), abs=1e-3)
    assert figures["psnr_masked"] > 60


def test_batches_add_up_and_the_sheet_has_a_row_for_each_part():
    batch = pairs([KINDS[2]], source=[0.1], truth=[0.3])
    scores = PairScores()
    for error in (0.1, 0.4):
        scores.add(batch["target_rgb"] + error, batch)
    figures = scores.summary()[KINDS[2]]
    assert figures["pairs"] == 2
    assert figures["psnr"] == pytest.approx((flat_psnr(0.1) + flat_psnr(0.4)) / 2, abs=1e-3)
    source, truth, generated = _rows(scores.shown)
    assert [len(row) for row in (source, truth, generated)] == [2, 2, 2]
    assert torch.equal(source[0]["img"], batch["cond_rgb"][0])
    assert torch.equal(truth[1]["img"], batch["target_rgb"][0])
    assert float(psnr(generated[1]["img"][None], truth[1]["img"][None])) == pytest.approx(
        flat_psnr(0.4), abs=1e-3
    )
