"""Self-attention over all views of an object: what turns an image U-Net into MVDream's.

In every transformer block of the U-Net, only the first attention (`attn1`) sees the tokens of the
other views; cross-attention to the text, feed-forward and norms stay per view. The views of one
object must be neighbours in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention


class CrossViewAttnProcessor:
    """Joins (b n) l c tokens to b (n l) c, attends, and separates them again."""

    def __init__(self, num_views: int) -> None:
        if num_views < 1:
            raise ValueError(f"num_views is {num_views}; expected 1 or more.")
        self.num_views = num_views

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "bn l c"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        kv_context: object = None,
        **_: object,
    ) -> Float[Tensor, "bn l c"]:
        # `kv_context` is for the cross-attentions (`layer_contexts`); naming it here tells
        # diffusers that the argument is known.
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("CrossViewAttnProcessor is for unmasked self-attention only.")
        images, tokens, channels = hidden_states.shape
        if images % self.num_views:
            raise ValueError(
                f"a batch of {images} images does not divide into groups of {self.num_views} "
                "views; keep the views of each object together in the batch."
            )
        joined = hidden_states.reshape(images // self.num_views, -1, channels)
        query, key, value = (
            layer(joined).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        mixed = mixed.transpose(1, 2).flatten(-2)
        for layer in attn.to_out:
            mixed = layer(mixed)
        return mixed.reshape(images, tokens, channels)


def set_cross_view_attention(unet: UNet2DConditionModel, num_views: int) -> None:
    """Install the processor on every self-attention; 1 restores attention within single images."""
    processors = dict(unet.attn_processors)
    for name in processors:
        if ".attn1." in name:
            processors[name] = CrossViewAttnProcessor(num_views)
    unet.set_attn_processor(processors)


def cross_view_attention_size(unet: UNet2DConditionModel) -> int:
    """How many views the installed processors join; 1 where none is installed."""
    sizes = {
        processor.num_views
        for processor in unet.attn_processors.values()
        if isinstance(processor, CrossViewAttnProcessor)
    }
    if len(sizes) > 1:
        raise ValueError(f"the U-Net joins different numbers of views: {sorted(sizes)}.")
    return sizes.pop() if sizes else 1
