"""Placeholders of a full prompt, replaced by what mappers say, for every layer of the denoiser.

A prompt such as "<view> <time>. a photo of a red cube" is tokenised to its full length. At a
placeholder the base vector takes the place of the super-category's token embedding, before
positions are added and the causal layers run, so that all later words see it. The result H, still
before the final norm, gives the keys: K = LN(H). For the values the bypass changes the row of H at
the placeholder, by ``mode``:

- ``constrained``: h' = h + bypass_strength |h| v, with v the bypass at unit length,
- ``unconstrained``: h' = m v, with m the mean norm of the prompt's rows (detached); h is forgotten,
- ``literal``: V = LN(H) + literal_strength v, after the norm. A row of LN(H) is about sqrt(d) long,
  so that this hardly moves it: kept to compare with.

No embedding table is resized: placeholders never reach the model as ids.

Dimensions: ``l`` layers, ``b`` prompts, ``n`` tokens of a prompt (77), ``d`` their width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from custom.fourd.diffusion.layer_contexts import LayerContexts

from .mapper import MapperOutput

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase

BYPASS_MODES = ("constrained", "unconstrained", "literal")
BASE_ENTRIES = ("replace", "add")
_SMALLEST_NORM = 1e-6


@dataclass(frozen=True)
class InjectionConfig:
    """How bases and bypasses enter."""

    mode: str = "constrained"
    """One of `BYPASS_MODES`."""
    bypass_strength: float = 0.2
    """alpha of ``constrained``, a share of the row's norm."""
    literal_strength: float = 0.2
    """lambda of ``literal``."""
    base_entry: str = "replace"
    """``replace`` the super-category's embedding, or ``add`` to it."""

    def __post_init__(self) -> None:
        for key, value, known in (
            ("mode", self.mode, BYPASS_MODES),
            ("base_entry", self.base_entry, BASE_ENTRIES),
        ):
            if value not in known:
                raise ValueError(
                    f"the injection's {key} is {value!r}; expected one of {', '.join(known)}."
                )


@dataclass(frozen=True)
class PlaceholderPrompts:
    """Tokenised prompts, with the super-category's id where a placeholder stands."""

    input_ids: Int[Tensor, "b n"]
    positions: dict[str, Int[Tensor, "b"]]
    """Where each placeholder stands in each prompt."""


class TextInjection:
    """A frozen CLIP text encoder that reads mappers' words; holds no parameters of its own.

    Args:
        text_encoder: `CLIPTextModel`, or `CLIPTextModelWithProjection`.
        tokenizer: of the encoder; copied, so that the caller's learns no new tokens.
        super_categories: a word for each placeholder, of one token ({"<time>": "time"}). Its
            embedding stands where no mapper speaks, and its norm is the norm of the base.
        config: how bases and bypasses enter.

    Raises:
        ValueError: a super-category that is not one known token.
    """

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        tokenizer: PreTrainedTokenizerBase,
        super_categories: Mapping[str, str],
        config: InjectionConfig | None = None,
    ) -> None:
        # Since transformers 5.6 CLIPTextModel holds its parts itself; the other still nests it.
        self.encoder = getattr(text_encoder, "text_model", text_encoder)
        self.config = config or InjectionConfig()
        self.tokenizer = copy.deepcopy(tokenizer)
        self.super_categories = dict(super_categories)
        self.super_ids = {
            placeholder: self._single_id(word) for placeholder, word in super_categories.items()
        }
        self.tokenizer.add_tokens(list(super_categories), special_tokens=True)
        self.placeholder_ids = {
            placeholder: self.tokenizer.convert_tokens_to_ids(placeholder)
            for placeholder in super_categories
        }

    @property
    def width(self) -> int:
        """Of the encoder's tokens."""
        return self.encoder.config.hidden_size

    @property
    def length(self) -> int:
        """Tokens of a full prompt."""
        return self.encoder.config.max_position_embeddings

    def base_norm(self, placeholder: str) -> float:
        """Norm of the super-category's token embedding: the norm of a mapper's base."""
        weight = self.encoder.embeddings.token_embedding.weight
        return float(weight[self.super_ids[placeholder]].detach().float().norm())

    def tokenize(self, prompts: Sequence[str]) -> PlaceholderPrompts:
        """Tokenise prompts to their full length and find every placeholder.

        Raises:
            ValueError: a prompt that does not hold each placeholder exactly once within its length.
        """
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).input_ids
        positions = {}
        for placeholder, index in self.placeholder_ids.items():
            found = ids == index
            counts = found.sum(dim=1)
            if not bool((counts == 1).all()):
                wrong = int((counts != 1).nonzero()[0])
                raise ValueError(
                    f"the prompt {prompts[wrong]!r} holds {placeholder} {int(counts[wrong])} times "
                    f"within its {self.length} tokens; expected exactly once, near the beginning "
                    "so that all words after it see it."
                )
            positions[placeholder] = found.int().argmax(dim=1)
            ids = torch.where(found, self.super_ids[placeholder], ids)
        device = self.encoder.embeddings.token_embedding.weight.device
        return PlaceholderPrompts(
            ids.to(device), {name: where.to(device) for name, where in positions.items()}
        )

    def contexts(
        self, prompts: PlaceholderPrompts, words: Mapping[str, MapperOutput], weight: float = 1.0
    ) -> LayerContexts:
        """Keys and values of the prompts for every layer, in one call of the encoder.

        Args:
            prompts: of `tokenize`.
            words: what a mapper says for each placeholder, for the same layers; a placeholder
                without an entry stands for its super-category (the neutral word).
            weight: of the contexts, where several are summed.

        Differentiable in the words; the encoder's weights get no gradient if they are frozen.

        Raises:
            ValueError: words for an unknown placeholder, or of other sizes.
        """
        n_layers = self._check(prompts, words)
        embedded = self.encoder.embeddings.token_embedding(prompts.input_ids)
        embedded = embedded.expand(n_layers, *embedded.shape)
        for placeholder, output in words.items():
            if output.base is not None:
                embedded = self._with_base(embedded, prompts.positions[placeholder], output.base)
        hidden = self._run(embedded.flatten(0, 1)).unflatten(0, embedded.shape[:2])
        norm = self.encoder.final_layer_norm
        keys = norm(hidden)
        bypasses = [
            (prompts.positions[name], output.bypass)
            for name, output in words.items()
            if output.bypass is not None
        ]
        if not bypasses:
            return LayerContexts(keys, keys, weight)
        if self.config.mode == "literal":
            return LayerContexts(keys, self._bypassed(keys, bypasses), weight)
        return LayerContexts(keys, norm(self._bypassed(hidden, bypasses)), weight)

    def _with_base(self, embedded: Tensor, positions: Tensor, base: Tensor) -> Tensor:
        base = base.to(embedded.dtype)
        if self.config.base_entry == "add":
            base = base + _row(embedded, positions)
        return _with_row(embedded, positions, base)

    def _run(self, embedded: Float[Tensor, "m n d"]) -> Float[Tensor, "m n d"]:
        """The causal encoder on token embeddings, up to but without its final norm.

        `CLIPTextModel.forward` takes ids alone, so its parts are called one by one.
        """
        from transformers.masking_utils import create_causal_mask

        hidden = self.encoder.embeddings(inputs_embeds=embedded)
        mask = create_causal_mask(
            config=self.encoder.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
        )
        return self.encoder.encoder(
            inputs_embeds=hidden, attention_mask=mask, is_causal=True
        ).last_hidden_state

    def _bypassed(
        self, states: Float[Tensor, "l b n d"], bypasses: Sequence[tuple[Tensor, Tensor]]
    ) -> Float[Tensor, "l b n d"]:
        changed = states
        for positions, bypass in bypasses:
            direction = unit_length(bypass.to(states.dtype))
            row = _row(states, positions)
            if self.config.mode == "constrained":
                row = row + self.config.bypass_strength * row.norm(dim=-1, keepdim=True) * direction
            elif self.config.mode == "unconstrained":
                row = states.detach().norm(dim=-1).mean(dim=-1, keepdim=True) * direction
            else:
                row = row + self.config.literal_strength * direction
            changed = _with_row(changed, positions, row)
        return changed

    def _single_id(self, word: str) -> int:
        ids = self.tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(
                f"the super-category {word!r} is {len(ids)} tokens, or unknown; expected a word "
                "that the tokenizer knows as one token, such as 'time', 'view' or 'object'."
            )
        return ids[0]

    def _check(self, prompts: PlaceholderPrompts, words: Mapping[str, MapperOutput]) -> int:
        unknown = sorted(set(words) - set(prompts.positions))
        if unknown:
            raise ValueError(
                f"words are given for {', '.join(unknown)}; expected placeholders of the prompts: "
                f"{', '.join(prompts.positions)}."
            )
        batch = len(prompts.input_ids)
        vectors = [part for out in words.values() for part in (out.base, out.bypass)]
        shapes = {tuple(part.shape) for part in vectors if part is not None}
        if len(shapes) > 1 or any(shape[1:] != (batch, self.width) for shape in shapes):
            raise ValueError(
                f"the words have shapes {sorted(shapes)}; expected (layers, {batch}, {self.width}) "
                "for all: the text encoder's width, and as many samples as prompts."
            )
        return shapes.pop()[0] if shapes else 1


def unit_length(vectors: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Vectors at length 1; smooth at zero, where they stay zero."""
    return vectors / (vectors.square().sum(dim=-1, keepdim=True) + _SMALLEST_NORM**2).sqrt()


def _row(states: Float[Tensor, "l b n d"], positions: Int[Tensor, "b"]) -> Float[Tensor, "l b d"]:
    return states[:, torch.arange(len(positions), device=states.device), positions]


def _with_row(
    states: Float[Tensor, "l b n d"], positions: Int[Tensor, "b"], row: Float[Tensor, "l b d"]
) -> Float[Tensor, "l b n d"]:
    is_row = torch.arange(states.shape[2], device=states.device) == positions.unsqueeze(-1)
    return torch.where(is_row[None, :, :, None], row.unsqueeze(2), states)
