"""Group norms that take their mean and variance over all frames of a group.

The published Instruct 4D-to-4D folds frames into a fifth dimension; the norms of its residual
blocks and of its output then pool over frames, while those of the transformers do not. With this a
frame's result depends on every frame beside it, so such a group cannot be cut into pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def pooled_norms(unet: UNet2DConditionModel) -> list[nn.GroupNorm]:
    """The two norms of every residual block, and the one before the output."""
    from diffusers.models.resnet import ResnetBlock2D

    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
    return norms if unet.conv_norm_out is None else [*norms, unet.conv_norm_out]


@contextlib.contextmanager
def shared_group_norm(unet: UNet2DConditionModel, num_frames: int) -> Iterator[None]:
    """Pool statistics over ``num_frames`` neighbours of the batch while the context lasts.

    Raises:
        ValueError: from the U-Net's call, if its batch does not divide into such groups.
    """

    def fold(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        images, channels, height, width = inputs[0].shape
        if images % num_frames:
            raise ValueError(
                f"a batch of {images} images does not divide into groups of {num_frames} frames, "
                "over which group norms are shared; pass whole groups."
            )
        groups = inputs[0].view(-1, num_frames, channels, height, width).transpose(1, 2)
        return (groups.reshape(-1, channels, num_frames * height, width),)

    def unfold(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        groups, channels, rows, width = output.shape
        frames = output.view(groups, channels, num_frames, rows // num_frames, width)
        return frames.transpose(1, 2).reshape(-1, channels, rows // num_frames, width)

    handles = []
    try:
        for norm in pooled_norms(unet):
            handles.append(norm.register_forward_pre_hook(fold))
            handles.append(norm.register_forward_hook(unfold))
        yield
    finally:
        for handle in handles:
            handle.remove()
