"""Image regularisers: hand-computed values."""

import torch
from threestudio.utils.loss import tv_loss


def test_tv_loss_by_hand():
    # Heights differ by 2 everywhere, widths by 1: 2 * (4 + 1) for any channel count and batch.
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
    image = (2 * rows + columns).expand(2, 5, 3, 4)
    assert tv_loss(image).item() == 10.0


def test_tv_loss_of_flat_and_single_pixel_images_is_zero():
    assert tv_loss(torch.full((1, 3, 4, 4), 0.3)).item() == 0.0
    assert tv_loss(torch.full((1, 3, 1, 1), 0.7)).item() == 0.0


def test_tv_loss_gradient():
    image = torch.arange(18.0, dtype=torch.float64).sin().view(1, 2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(tv_loss, (image,))
