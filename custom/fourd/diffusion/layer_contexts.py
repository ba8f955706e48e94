"""Cross-attention in which every layer has a text of its own, with separate keys and values.

Each cross-attention (`attn2`) of a `UNet2DConditionModel` is given the keys' text and the values'
text of its own layer, through ``cross_attention_kwargs={"kv_context": contexts}``; an IP-Adapter's
image tokens are attended to beside it, as in diffusers. Without ``kv_context`` a call is diffusers'
own. Every processor knows its layer from the module's name: a counter that the layers share would
run in another order when gradient checkpointing computes them again, and give silently wrong
gradients.

The embedded family's U-Nets also pool the text into one vector for every block. What they pool is
the ``encoder_hidden_states`` of the call: `unet_arguments` gives them the mean of the values.

Dimensions: ``l`` layers in execution order, ``b`` samples, ``n`` text tokens, ``d`` their width.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

_STAGES = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


@dataclass(frozen=True)
class LayerContexts:
    """Texts of one control (or of several in one prompt) for every layer and sample."""

    keys: Float[Tensor, "l b n d"]
    values: Float[Tensor, "l b n d"]
    weight: float = 1.0
    """Of this text's part where several are attended to separately and summed."""

    def __post_init__(self) -> None:
        if self.keys.ndim != 4 or self.keys.shape != self.values.shape:
            raise ValueError(
                f"keys have shape {tuple(self.keys.shape)}, values {tuple(self.values.shape)}; "
                "expected both (layers, batch, tokens, width)."
            )
        if self.keys.shape[2] < 2:
            raise ValueError(
                "the contexts have 1 token; expected at least 2, best the 77 of a full prompt. "
                "Attention to a single key is 1 everywhere, whatever the key."
            )

    @property
    def pooled(self) -> Float[Tensor, "b n d"]:
        """One text for those parts of a model that have no layer: the mean of the values."""
        return self.values.mean(dim=0)


Contexts = LayerContexts | Sequence[LayerContexts]


def same_everywhere(text: Float[Tensor, "b n d"], n_layers: int) -> LayerContexts:
    """The contexts of a call with ordinary text: equal for all layers, keys and values."""
    repeated = text.expand(n_layers, *text.shape)
    return LayerContexts(repeated, repeated)


def joined_along_batch(branches: Sequence[LayerContexts]) -> LayerContexts:
    """The branches of a guidance as one batch, so that a single call of the model serves all.

    Raises:
        ValueError: branches of different weights.
    """
    if len({branch.weight for branch in branches}) > 1:
        raise ValueError(
            f"the branches weigh {[branch.weight for branch in branches]}; expected equal weights "
            "within one batch."
        )
    return LayerContexts(
        torch.cat([branch.keys for branch in branches], dim=1),
        torch.cat([branch.values for branch in branches], dim=1),
        branches[0].weight,
    )


def layer_table(unet: UNet2DConditionModel) -> tuple[str, ...]:
    """Names of the cross-attentions in execution order: down, mid, up.

    For Stable Diffusion 1.x and 2.x these are 16. The order of `attn_processors`, and of the
    weights in IP-Adapter files, is another: there the middle comes last.

    Raises:
        ValueError: the U-Net has none, or some whose name does not tell when they run.
    """
    names = [
        name.removesuffix(".processor")
        for name in unet.attn_processors
        if name.endswith(".attn2.processor")
    ]
    odd = [
        name for name in names if name.split(".")[0] not in _STAGES or ".attentions." not in name
    ]
    if odd or not names:
        what = f"the cross-attention {odd[0]!r}" if odd else "no cross-attention"
        raise ValueError(
            f"the U-Net has {what}; expected cross-attention in `attentions` of its down, mid and "
            "up blocks, as in Stable Diffusion's UNet2DConditionModel."
        )
    return tuple(sorted(names, key=_running_order))


def _is_placed(name: str) -> bool:
    return name.split(".")[0] in _STAGES and ".attentions." in name


def _running_order(name: str) -> tuple[int, ...]:
    return (_STAGES[name.split(".")[0]], *(int(number) for number in re.findall(r"\.(\d+)", name)))


class LayerContextAttnProcessor:
    """Cross-attention of one layer to its own texts.

    Args:
        layer: its index in `layer_table`; it never changes.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "b m c"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        kv_context: Contexts | None = None,
    ) -> Float[Tensor, "b m c"]:
        if isinstance(encoder_hidden_states, tuple):
            raise ValueError(
                "image tokens reached a layer without an IP-Adapter. Load the adapter before "
                "`set_layer_contexts`, or call it again."
            )
        query = _heads(attn, attn.to_q(hidden_states))
        texts = _texts(self.layer, kv_context, encoder_hidden_states)
        mixed = _attend_to_texts(attn, query, texts, attention_mask)
        return _to_output(attn, mixed)


class LayerContextIPAttnProcessor(IPAdapterAttnProcessor2_0):
    """The same beside the image tokens of IP-Adapters.

    Args:
        adapter: diffusers' processor of the layer, whose weights it shares; its scale is changed
            by `set_ip_adapter_scale` as before.
        layer: its index in `layer_table`.
    """

    def __init__(self, adapter: IPAdapterAttnProcessor2_0, layer: int) -> None:
        with torch.device("meta"):
            super().__init__(
                adapter.hidden_size,
                adapter.cross_attention_dim,
                adapter.num_tokens,
                list(adapter.scale),
            )
        self.to_k_ip, self.to_v_ip = adapter.to_k_ip, adapter.to_v_ip
        self.layer = layer

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "b m c"],
        encoder_hidden_states: tuple[Tensor, list[Tensor]] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_adapter_masks: Tensor | None = None,
        kv_context: Contexts | None = None,
    ) -> Float[Tensor, "b m c"]:
        if ip_adapter_masks is not None:
            raise ValueError(
                "ip_adapter_masks were given; expected none. Layers with texts of their own attend "
                "to the whole image prompt."
            )
        if not isinstance(encoder_hidden_states, tuple):
            raise ValueError(
                "no image tokens reached the IP-Adapter; expected added_cond_kwargs="
                '{"image_embeds": [...]} in the call of the U-Net.'
            )
        text, image_tokens = encoder_hidden_states
        query = _heads(attn, attn.to_q(hidden_states))
        mixed = _attend_to_texts(attn, query, _texts(self.layer, kv_context, text), attention_mask)
        for tokens, scale, to_key, to_value in zip(
            image_tokens, self.scale, self.to_k_ip, self.to_v_ip, strict=True
        ):
            if scale == 0:
                continue
            tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
            key, value = _heads(attn, to_key(tokens)), _heads(attn, to_value(tokens))
            mixed = mixed + scale * functional.scaled_dot_product_attention(query, key, value)
        return _to_output(attn, mixed)


class IgnoreLayerContexts:
    """Another processor, usually of self-attention, that hears nothing of ``kv_context``.

    Without this the processor would be told of an argument that it does not know, and diffusers
    would warn once for each layer and call.

    Args:
        inner: what it passes everything else to; diffusers' default if None.
    """

    def __init__(self, inner: object | None = None) -> None:
        self.inner = AttnProcessor2_0() if inner is None else inner

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        kv_context: object = None,
    ) -> Tensor:
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def set_layer_contexts(unet: UNet2DConditionModel) -> tuple[str, ...]:
    """Make the U-Net listen to ``kv_context``; returns its layer table.

    Load an IP-Adapter first: loading one replaces every processor. Self-attention keeps the
    processor that it has (`set_cross_view_attention` included). May be called again.

    Raises:
        ValueError: a cross-attention that is not diffusers' own, or an IP-Adapter's.
    """
    table = layer_table(unet)
    processors: dict[str, object] = {}
    for name, processor in unet.attn_processors.items():
        layer = name.removesuffix(".processor")
        if layer in table:
            processors[name] = _listening(unet, layer, processor, table.index(layer))
        elif "kv_context" in inspect.signature(processor.__call__).parameters:
            processors[name] = processor
        else:
            processors[name] = IgnoreLayerContexts(processor)
    unet.set_attn_processor(processors)
    return table


def has_layer_contexts(unet: UNet2DConditionModel) -> bool:
    """Whether every cross-attention listens to ``kv_context``."""
    ours = (LayerContextAttnProcessor, LayerContextIPAttnProcessor)
    processors = unet.attn_processors
    return all(isinstance(processors[f"{name}.processor"], ours) for name in layer_table(unet))


def unet_arguments(contexts: Contexts) -> dict[str, object]:
    """Keyword arguments of a call of the U-Net that give it the contexts."""
    texts = [contexts] if isinstance(contexts, LayerContexts) else list(contexts)
    total = sum(text.weight for text in texts)
    pooled = sum(text.weight / total * text.pooled for text in texts)
    return {
        "encoder_hidden_states": pooled,
        "cross_attention_kwargs": {"kv_context": texts},
    }


def _listening(unet, layer: str, processor: object, index: int) -> object:
    attn = unet.get_submodule(layer)
    unusual = attn.added_kv_proj_dim is not None or attn.norm_cross or attn.residual_connection
    if isinstance(processor, IPAdapterAttnProcessor2_0) and not unusual:
        return LayerContextIPAttnProcessor(processor, index)
    if isinstance(processor, AttnProcessor2_0 | LayerContextAttnProcessor) and not unusual:
        return LayerContextAttnProcessor(index)
    raise ValueError(
        f"{layer} has the processor {type(processor).__name__}; expected AttnProcessor2_0 or "
        "IPAdapterAttnProcessor2_0 on a plain cross-attention. Restore it with "
        "`unet.set_attn_processor(AttnProcessor2_0())`."
    )


def _texts(
    layer: int, contexts: Contexts | None, text: Tensor
) -> list[tuple[float, Tensor, Tensor]]:
    """(weight, keys' text, values' text) of what this layer attends to."""
    if contexts is None:
        return [(1.0, text, text)]
    given = [contexts] if isinstance(contexts, LayerContexts) else contexts
    return [(each.weight, each.keys[layer], each.values[layer]) for each in given]


def _heads(attn: Attention, states: Float[Tensor, "b n c"]) -> Float[Tensor, "b heads n e"]:
    return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _attend_to_texts(attn, query, texts, attention_mask) -> Float[Tensor, "b heads m e"]:
    mixed = 0
    for weight, for_keys, for_values in texts:
        if len(for_keys) != len(query):
            raise ValueError(
                f"the contexts are of {len(for_keys)} samples; expected {len(query)}, one for each "
                "image of the batch."
            )
        mask = attention_mask
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, for_keys.shape[1], len(query))
            mask = mask.view(len(query), attn.heads, -1, mask.shape[-1])
        key = _heads(attn, attn.to_k(for_keys.to(query.dtype)))
        value = _heads(attn, attn.to_v(for_values.to(query.dtype)))
        part = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = part if len(texts) == 1 and weight == 1 else mixed + weight * part
    return mixed


def _to_output(attn: Attention, mixed: Float[Tensor, "b heads m e"]) -> Float[Tensor, "b m c"]:
    joined = mixed.transpose(1, 2).flatten(-2)
    for layer in attn.to_out:
        joined = layer(joined)
    return joined / attn.rescale_output_factor
