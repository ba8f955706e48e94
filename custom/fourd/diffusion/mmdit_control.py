"""Control tokens for every block of an MMDiT (SD3, SD3.5), beside its joint attention.

An MMDiT has no cross-attention: its text is a stream of its own, changed in every block, so giving
each block another text would break that stream. Instead the image queries of a block attend to a
few control tokens as well, through the block's own projections of text, and the result, times a
gate that starts at zero, is added to the image stream after the output projection. At gate zero the
model is the stock one; the text stream is never touched.

    tokens = control.tokens(words.base, words.bypass)
    transformer(..., joint_attention_kwargs={"control": tokens})

Dimensions: ``l`` blocks, ``b`` samples, ``k`` control tokens, ``c`` width of the streams, ``m``
image tokens, ``n`` text tokens.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers.models.attention_processor import (
    JointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel
    from diffusers.models.attention_processor import Attention

FEWEST_TOKENS = 2
_SMALLEST_NORM = 1e-6
_JOINT = re.compile(r"^transformer_blocks\.(\d+)\.attn\.processor$")


@dataclass(frozen=True)
class ControlTokens:
    """Directions of the control tokens for every block and sample, and the gates."""

    base: Float[Tensor, "l b k c"]
    """Of the keys."""
    bypass: Float[Tensor, "l b k c"]
    """Of what sets the values apart from the keys."""
    gates: Float[Tensor, "l c"]
    """What the attended result is multiplied by."""
    bypass_strength: float = 0.2
    """Length of the bypass, as a share of the keys'."""

    def __post_init__(self) -> None:
        if self.base.ndim != 4 or self.base.shape != self.bypass.shape:
            raise ValueError(
                f"base has shape {tuple(self.base.shape)}, bypass {tuple(self.bypass.shape)}; "
                "expected both (blocks, batch, tokens, width)."
            )
        if self.base.shape[2] < FEWEST_TOKENS:
            raise ValueError(
                f"there is {self.base.shape[2]} control token; expected at least {FEWEST_TOKENS}, "
                "best 4. Attention to a single key is 1 everywhere, whatever the key."
            )


class MMDiTControl(nn.Module):
    """The gates of all blocks, zero at the start, and how a mapper's vectors become tokens.

    Args:
        n_blocks: of the transformer.
        width: of its streams.
        n_tokens: control tokens of each block.
        bypass_strength: alpha.

    Raises:
        ValueError: fewer than two tokens.
    """

    def __init__(
        self, n_blocks: int, width: int, n_tokens: int = 4, bypass_strength: float = 0.2
    ) -> None:
        super().__init__()
        if n_tokens < FEWEST_TOKENS:
            raise ValueError(
                f"n_tokens is {n_tokens}; expected at least {FEWEST_TOKENS}. Attention to a single "
                "key is 1 everywhere, whatever the key."
            )
        self.width, self.n_tokens, self.bypass_strength = width, n_tokens, bypass_strength
        self.gates = nn.Parameter(torch.zeros(n_blocks, width))

    @property
    def mapper_width(self) -> int:
        """Width that a mapper for this model must have: all tokens of a block at once."""
        return self.n_tokens * self.width

    def tokens(
        self, base: Float[Tensor, "l b kc"], bypass: Float[Tensor, "l b kc"]
    ) -> ControlTokens:
        """What `joint_attention_kwargs` takes as ``control``, from a mapper's two vectors."""
        shape = (self.n_tokens, self.width)
        return ControlTokens(
            base.unflatten(-1, shape),
            bypass.unflatten(-1, shape),
            self.gates,
            self.bypass_strength,
        )


class ControlJointAttnProcessor(nn.Module):
    """Joint attention of one block, and control tokens beside it.

    Args:
        inner: the block's own processor, stock or of an IP-Adapter; what it adds stays.
        block: index of the block; it never changes.
    """

    def __init__(self, inner: object, block: int) -> None:
        super().__init__()
        self.inner = inner
        self.block = block

    def forward(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "b m c"],
        encoder_hidden_states: Float[Tensor, "b n c"] | None = None,
        attention_mask: Tensor | None = None,
        ip_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,
        control: ControlTokens | None = None,
    ) -> tuple[Tensor, Tensor]:
        of_adapter = {}
        if isinstance(self.inner, SD3IPAdapterJointAttnProcessor2_0):
            of_adapter = {"ip_hidden_states": ip_hidden_states, "temb": temb}
        image, text = self.inner(
            attn, hidden_states, encoder_hidden_states, attention_mask, **of_adapter
        )
        if control is None:
            return image, text
        attended = _attend(attn, hidden_states, *self._keys_values(control, encoder_hidden_states))
        return image + control.gates[self.block].to(image.dtype) * attended, text

    # Attention looks for the arguments that a processor knows in the signature of its `__call__`.
    __call__ = forward

    def _keys_values(self, control: ControlTokens, text: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens at the mean length of the block's text tokens."""
        length = text.detach().norm(dim=-1).mean(dim=-1)[:, None, None]
        keys = length * _unit(control.base[self.block].to(text.dtype))
        bypass = _unit(control.bypass[self.block].to(text.dtype))
        return keys, keys + control.bypass_strength * length * bypass


class IgnoreControl:
    """The second attention of dual-attention blocks, which hears nothing of ``control``.

    Args:
        inner: what it passes everything else to; diffusers' default if None.
    """

    def __init__(self, inner: object | None = None) -> None:
        self.inner = JointAttnProcessor2_0() if inner is None else inner

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        ip_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,
        control: object = None,
    ) -> Tensor:
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask)


def set_mmdit_control(transformer: SD3Transformer2DModel) -> tuple[str, ...]:
    """Make every block listen to ``control``; returns the blocks' names in execution order.

    Load an IP-Adapter first: loading one replaces every processor. May be called again.

    Raises:
        ValueError: the model has no joint attention in `transformer_blocks`.
    """
    processors: dict[str, object] = {}
    table: dict[int, str] = {}
    for name, processor in transformer.attn_processors.items():
        match = _JOINT.match(name)
        if match:
            block = int(match.group(1))
            table[block] = name.removesuffix(".attn.processor")
            if isinstance(processor, ControlJointAttnProcessor):
                processor = processor.inner
            processors[name] = ControlJointAttnProcessor(processor, block)
        elif "control" in inspect.signature(processor.__call__).parameters:
            processors[name] = processor
        else:
            processors[name] = IgnoreControl(processor)
    if not table:
        raise ValueError(
            f"{type(transformer).__name__} has no joint attention in transformer_blocks; expected "
            "an SD3Transformer2DModel."
        )
    transformer.set_attn_processor(processors)
    return tuple(table[block] for block in sorted(table))


def _unit(vectors: Float[Tensor, "b k c"]) -> Float[Tensor, "b k c"]:
    return vectors / (vectors.square().sum(dim=-1, keepdim=True) + _SMALLEST_NORM**2).sqrt()


def _attend(
    attn: Attention,
    image: Float[Tensor, "b m c"],
    for_keys: Float[Tensor, "b k c"],
    for_values: Float[Tensor, "b k c"],
) -> Float[Tensor, "b m c"]:
    """What the image queries find among the control tokens, by the block's own text projections."""
    query, key, value = (
        states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for states in (attn.to_q(image), attn.add_k_proj(for_keys), attn.add_v_proj(for_values))
    )
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_added_k is not None:
        key = attn.norm_added_k(key)
    attended = functional.scaled_dot_product_attention(query, key, value)
    return attended.transpose(1, 2).flatten(-2)
