"""VideoCrafter2's U-Net (Chen et al. 2024): diffusers' 3D U-Net, told the frame rate of the clip.

The original is the network of ModelScope and Zeroscope (per-frame residual blocks with temporal
convolutions, spatial and temporal transformers, a temporal transformer before the first block) plus
a second sinusoidal embedding, of the frame rate, that is added to that of the timestep. So every
tensor of an original checkpoint has its place here: ``fps_embedding.0/.2`` in
``fps_embedding.linear_1/.linear_2``, all others where `UNet3DConditionModel` has them.

Dimensions: ``b`` clips of ``f`` frames, latents of ``c`` channels and ``h`` x ``w`` pixels; ``l``
and ``d`` tokens and width of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet3DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
from jaxtyping import Float, Int
from torch import Tensor


class _SummedTimestepEmbedding(TimestepEmbedding):
    """Embeds the timestep and adds what is already embedded; has the parent's parameters only."""

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        embedded = super().forward(sample)
        return embedded if condition is None else embedded + condition


class VideoCrafterUNet(UNet3DConditionModel):
    """A 3D U-Net with a frame rate; VideoCrafter2's sizes are the defaults.

    Args:
        sample_size: edge of the latents it was trained on, a fact that the network does not use.
        in_channels: channels of a noisy latent. out_channels: channels of the prediction.
        down_block_types: blocks on the way down, the finest first. up_block_types: on the way up.
        block_out_channels: width of each block.
        layers_per_block: residual blocks in each.
        downsample_padding: zeros around the input of a downsampling convolution.
        mid_block_scale_factor: divides the middle block's output.
        act_fn: activation of the embeddings and residual blocks.
        norm_num_groups: groups of every group norm. norm_eps: what keeps them finite.
        cross_attention_dim: width of the text.
        attention_head_dim: width of one attention head.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        down_block_types: Sequence[str] = (*["CrossAttnDownBlock3D"] * 3, "DownBlock3D"),
        up_block_types: Sequence[str] = ("UpBlock3D", *["CrossAttnUpBlock3D"] * 3),
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1.0,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1024,
        attention_head_dim: int = 64,
    ) -> None:
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            downsample_padding=downsample_padding,
            mid_block_scale_factor=mid_block_scale_factor,
            act_fn=act_fn,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=attention_head_dim,
        )
        width = block_out_channels[0]
        self.time_embedding = _SummedTimestepEmbedding(width, 4 * width)
        self.fps_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.fps_embedding = TimestepEmbedding(width, 4 * width)

    def forward(
        self,
        sample: Float[Tensor, "b c f h w"],
        timestep: Int[Tensor, "b"] | int,
        encoder_hidden_states: Float[Tensor, "b l d"],
        fps: Int[Tensor, "b"] | int,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> UNet3DConditionOutput | tuple[Tensor]:
        """Return the prediction for noisy latents.

        Args:
            sample: noisy latents.
            timestep: index into the schedule, one for each clip or one for all.
            encoder_hidden_states: text, one for each clip.
            fps: frames per second, one for each clip or one for all.
            return_dict: wrap the result in `UNet3DConditionOutput`.
            **kwargs: further arguments of `UNet3DConditionModel.forward`.
        """
        rates = torch.as_tensor(fps, device=sample.device).expand(sample.shape[0])
        # The parent hands ``timestep_cond`` to the time embedding untouched, which adds it.
        return super().forward(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=self.fps_embedding(self.fps_proj(rates).to(self.dtype)),
            return_dict=return_dict,
            **kwargs,
        )
