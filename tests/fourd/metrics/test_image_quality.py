"""Measures by hand, and SSIM against its formula."""

import math

import pytest
import torch

from custom.fourd.metrics.image_quality import alpha_iou, dilated_union, psnr, ssim


def test_psnr_by_hand():
    truth = torch.zeros(3, 2, 2, 3)
    images = truth.clone()
    images[0] += 0.1
    images[1, 0, 0, 0] = 1.0
    values = psnr(images, truth)
    assert values.tolist() == pytest.approx([20.0, -10 * math.log10(1 / 12), 100.0], abs=1e-4)


def test_psnr_within_a_mask():
    truth, images = torch.zeros(2, 2, 2, 3), torch.zeros(2, 2, 2, 3)
    images[0, 0, 0], images[0, 1, 1] = 0.1, 0.9
    mask = torch.zeros(2, 2, 2, dtype=torch.bool)
    mask[0, 0] = True
    # Two pixels count, one of them is off by 0.1; the second image has no pixel that counts.
    assert psnr(images, truth, mask).tolist() == pytest.approx(
        [-10 * math.log10(0.01 / 2), 100.0], abs=1e-4
    )
    everywhere = torch.ones(2, 2, 2, dtype=torch.bool)
    torch.testing.assert_close(psnr(images, truth, everywhere), psnr(images, truth))


def ssim_by_loops(first, second, kept=None):
    """Mean over one window per (kept) pixel, all channels; images are mirrored at their borders."""
    span = torch.arange(11) - 5
    line = torch.exp(-(span**2) / (2 * 1.5**2)).double()
    window = line[:, None] * line[None] / line.sum() ** 2
    c1, c2 = 0.01**2, 0.03**2
    values = []
    first, second = (
        torch.nn.functional.pad(image.double().movedim(-1, 0), (5, 5, 5, 5), mode="reflect")
        for image in (first, second)
    )
    for row in range(first.shape[1] - 10):
        for column in range(first.shape[2] - 10):
            if kept is not None and not kept[row, column]:
                continue
            a, b = (image[:, row : row + 11, column : column + 11] for image in (first, second))
            ma, mb = (window * a).sum((1, 2)), (window * b).sum((1, 2))
            va = (window * a * a).sum((1, 2)) - ma**2
            vb = (window * b * b).sum((1, 2)) - mb**2
            cov = (window * a * b).sum((1, 2)) - ma * mb
            values.append(
                (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
            )
    return torch.stack(values).mean()


def test_ssim_against_its_formula():
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 9, 8, 3, generator=g)
    images = (truth + 0.2 * torch.randn(truth.shape, generator=g)).clamp(0, 1)
    for value, image, true in zip(ssim(images, truth), images, truth):
        # torchmetrics computes in single precision.
        assert float(value) == pytest.approx(float(ssim_by_loops(image, true)), abs=2e-4)
    torch.testing.assert_close(ssim(truth, truth), torch.ones(2))


def test_ssim_within_a_mask_counts_windows_centred_there():
    g = torch.Generator().manual_seed(1)
    truth, images = torch.rand(2, 2, 9, 12, 3, generator=g)
    mask = torch.rand(2, 9, 12, generator=g) > 0.6
    for row, value in enumerate(ssim(images, truth, mask)):
        expected = ssim_by_loops(images[row], truth[row], mask[row])
        assert float(value) == pytest.approx(float(expected), abs=2e-4)
    everywhere, nowhere = torch.ones_like(mask), torch.zeros_like(mask)
    torch.testing.assert_close(ssim(images, truth, everywhere), ssim(images, truth))
    assert ssim(images, truth, nowhere).tolist() == [1.0, 1.0]


def test_iou_by_hand():
    ours, theirs = torch.zeros(3, 1, 4, 1), torch.zeros(3, 1, 4, 1)
    ours[0, 0, :3], theirs[0, 0, 1:] = 0.9, 0.8
    ours[1, 0, 0], theirs[1, 0, 1] = 0.51, 0.50
    assert alpha_iou(ours, theirs).tolist() == [0.5, 0.0, 1.0]
    assert alpha_iou(ours, theirs, threshold=0.85)[0] == 0.0
    assert alpha_iou(ours, theirs).dtype == ours.dtype


def test_the_dilated_union_by_hand():
    alpha, truth = torch.zeros(1, 7, 7, 1), torch.zeros(1, 7, 7, 1)
    alpha[0, 0, 0], truth[0, 6, 6], truth[0, 0, 6] = 1.0, 0.03, 0.01
    region = dilated_union(alpha, truth, radius_px=1)[0]
    expected = torch.zeros(7, 7, dtype=torch.bool)
    expected[:2, :2] = expected[5:, 5:] = True
    assert torch.equal(region, expected), "faint coverage below 2 % does not count"
    assert dilated_union(alpha, truth)[0].sum() == 18
