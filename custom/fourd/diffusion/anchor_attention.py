"""Self-attention that borrows the look of an anchor frame (Instruct 4D-to-4D).

In every transformer block only the first attention (`attn1`) changes. Its projections keep their
weights; keys and values come from other frames than the queries:

- ``anchor``: from the anchor alone (the strongest tie),
- ``anchor_self``: from the anchor and the frame itself, joined along tokens,
- ``sparse_causal``: from the anchor and the frame before.

For the anchor itself all three are ordinary self-attention, so its features do not depend on the
other frames. They can therefore be computed once and kept: frames then go through the U-Net in
pieces of any size with the same result. Each branch of the guidance looks at the anchor's features
of its own branch.

Dimensions: ``n`` images of a U-Net call, ``l`` tokens, ``c`` channels, ``g`` branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from .cross_view_attention import set_cross_view_attention

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

ANCHOR_MODES = ("anchor", "anchor_self", "sparse_causal")

KeyValue = tuple[Tensor, Tensor]


class AnchorAttention:
    """What the processors of one U-Net share: the mode, whose turn it is, and kept features.

    Before each call of the U-Net say what its batch holds: `joint`, `anchors` or `frames`.

    Args:
        mode: one of `ANCHOR_MODES`.

    Raises:
        ValueError: for another mode.
    """

    def __init__(self, mode: str) -> None:
        if mode not in ANCHOR_MODES:
            raise ValueError(
                f"the attention mode is {mode!r}; expected one of {', '.join(ANCHOR_MODES)}."
            )
        self.mode = mode
        self.kept: dict[str, KeyValue] = {}
        """Keys and values of the anchor per layer, a row for each branch."""
        self.before: dict[str, KeyValue] = {}
        """The same of the last frame that went through, for ``sparse_causal`` only."""
        self.joint(1)

    def joint(self, num_frames: int) -> None:
        """The batch holds groups of ``num_frames`` neighbours; the first of each is its anchor."""
        if num_frames < 1:
            raise ValueError(f"num_frames is {num_frames}; expected 1 or more.")
        self.role, self.num_frames = "joint", num_frames

    def anchors(self) -> None:
        """The batch holds the anchor alone, once for each branch; its features are kept."""
        self.role = "anchors"
        self.kept, self.before = {}, {}

    def frames(self, branches: Sequence[int]) -> None:
        """The batch holds frames that look at the kept features; image i is of ``branches[i]``.

        For ``sparse_causal`` the frames of a branch must come in order, over all calls since the
        features were kept or `recall`-ed.

        Raises:
            RuntimeError: no anchor's features are kept.
            ValueError: a branch for which none are.
        """
        if not self.kept:
            raise RuntimeError(
                "no anchor features are kept; expected a call of the U-Net with the anchor, after "
                "`anchors()`, before the one with frames."
            )
        groups = len(next(iter(self.kept.values()))[0])
        if not all(0 <= branch < groups for branch in branches):
            raise ValueError(
                f"branches are {list(branches)}; expected numbers below {groups}, the branches in "
                "which the anchor's features were kept."
            )
        self.role, self.branches = "frames", list(branches)
        # Where the frame before each image is found: among those of the calls before (0 to g - 1),
        # or among this call's images (from g). A branch that this call lacks keeps its place.
        self.last = list(range(groups))
        self.previous = []
        for image, branch in enumerate(self.branches):
            self.previous.append(self.last[branch])
            self.last[branch] = groups + image

    def snapshot(self) -> dict[str, KeyValue]:
        """The kept features of the anchor, to `recall` later; they are shared, not copied."""
        return dict(self.kept)

    def recall(self, kept: dict[str, KeyValue]) -> None:
        """Keep features that `snapshot` returned; the next frame is the first after the anchor."""
        self.kept, self.before = dict(kept), {}

    def forget(self) -> None:
        """Free what is kept."""
        self.kept, self.before = {}, {}

    def keys_and_values(self, layer: str, own: KeyValue) -> KeyValue:
        """What the images of this call attend to, from their own keys and values [n, l, c]."""
        if self.role == "anchors":
            self.kept[layer] = own
            return own
        if self.role == "joint":
            return tuple(self._of_groups(part) for part in own)
        anchor = tuple(part[self.branches] for part in self.kept[layer])
        if self.mode == "anchor":
            return anchor
        others = own if self.mode == "anchor_self" else self._frames_before(layer, own)
        return tuple(torch.cat(pair, dim=1) for pair in zip(anchor, others, strict=True))

    def _of_groups(self, own: Tensor) -> Tensor:
        images, tokens, channels = own.shape
        if images % self.num_frames:
            raise ValueError(
                f"a batch of {images} images does not divide into groups of {self.num_frames} "
                "frames; keep the frames of each branch together."
            )
        grouped = own.view(-1, self.num_frames, tokens, channels)
        anchor = grouped[:, :1].expand_as(grouped)
        if self.mode == "anchor":
            return anchor.reshape(own.shape)
        others = grouped
        if self.mode == "sparse_causal":
            others = torch.cat((grouped[:, :1], grouped[:, :-1]), dim=1)
        return torch.cat((anchor, others), dim=2).reshape(images, 2 * tokens, channels)

    def _frames_before(self, layer: str, own: KeyValue) -> KeyValue:
        before = self.before.get(layer, self.kept[layer])
        known = tuple(torch.cat(pair) for pair in zip(before, own, strict=True))
        self.before[layer] = tuple(part[self.last] for part in known)
        return tuple(part[self.previous] for part in known)


class AnchorAttnProcessor:
    """The processor of one layer.

    Args:
        shared: what all layers of the U-Net share.
        layer: the layer's name.
    """

    def __init__(self, shared: AnchorAttention, layer: str) -> None:
        self.shared, self.layer = shared, layer

    def __call__(
        self,
        attn: Attention,
        hidden_states: Float[Tensor, "n l c"],
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **_: object,
    ) -> Float[Tensor, "n l c"]:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("AnchorAttnProcessor is for unmasked self-attention only.")
        key, value = self._keys_and_values(attn, hidden_states)
        query, key, value = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(hidden_states), key, value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        mixed = mixed.transpose(1, 2).flatten(-2)
        for layer in attn.to_out:
            mixed = layer(mixed)
        if attn.residual_connection:
            mixed = mixed + hidden_states
        return mixed / attn.rescale_output_factor

    def _keys_and_values(self, attn: Attention, hidden_states: Tensor) -> KeyValue:
        shared = self.shared
        if shared.role == "frames" and shared.mode == "anchor":
            # The frames' own keys and values would not be looked at: they are not computed.
            return shared.keys_and_values(self.layer, (hidden_states, hidden_states))
        own = (attn.to_k(hidden_states), attn.to_v(hidden_states))
        return shared.keys_and_values(self.layer, own)


def set_anchor_attention(unet: UNet2DConditionModel, mode: str) -> AnchorAttention:
    """Install anchor attention on every self-attention and return what its layers share."""
    shared = AnchorAttention(mode)
    processors = dict(unet.attn_processors)
    for name in processors:
        if ".attn1." in name:
            processors[name] = AnchorAttnProcessor(shared, name)
    unet.set_attn_processor(processors)
    return shared


def remove_anchor_attention(unet: UNet2DConditionModel) -> None:
    """Restore attention within single images."""
    set_cross_view_attention(unet, 1)
