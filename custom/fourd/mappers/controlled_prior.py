"""A frozen image model that listens to mappers: its text, its image prompt, its layers.

Dimensions: ``b`` samples, ``l`` cross-attention layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from threestudio.utils.pretrained import RequiredModel, resolve_checkpoint_file, resolve_pretrained
from torch import Tensor

from custom.fourd.diffusion.image_prior import ImagePrior
from custom.fourd.diffusion.ip_adapter import (
    DEFAULT_SCALE,
    clip_pixels,
    image_arguments,
    image_features,
    ip_adapter_kind,
    load_ip_adapter,
    without_image,
)
from custom.fourd.diffusion.layer_contexts import set_layer_contexts

from .composition import PLACEHOLDERS, Composition
from .control_inputs import control_values
from .mapper import Mapper, MapperOutput
from .text_injection import InjectionConfig, PlaceholderPrompts, TextInjection

ENCODER_FOLDER = "image_encoder"


@dataclass(frozen=True)
class ImagePromptConfig:
    """An IP-Adapter and the vision encoder that it was made for."""

    weights: str
    """Its safetensors file, or owner/repository/path of one."""
    image_encoder: str
    """Folder or id that holds the vision encoder, or embedded://name."""
    image_encoder_folder: str | None = None
    """Where in it; null is image_encoder."""
    scale: float = DEFAULT_SCALE
    """Weight of the image prompt in attention."""

    @classmethod
    def of(cls, given: Mapping[str, Any] | ImagePromptConfig | None) -> ImagePromptConfig | None:
        """The config from a mapping, None for none.

        Raises:
            ValueError: a key is unknown or missing.
        """
        if not given or isinstance(given, cls):
            return given or None
        known = [field.name for field in fields(cls)]
        wrong = [key for key in given if key not in known]
        wrong += [key for key in ("weights", "image_encoder") if not given.get(key)]
        if wrong:
            raise ValueError(
                f"ip_adapter has an unknown or empty key {wrong[0]!r}; expected weights and "
                f"image_encoder, and perhaps {', '.join(known[2:])}."
            )
        return cls(**given)

    def required_models(self) -> list[str]:
        """What must be on disk, as the launcher asks for it."""
        part = self.image_encoder_folder or ENCODER_FOLDER
        return [self.weights, RequiredModel(self.image_encoder, (part,), None)]


class ControlledPrior:
    """The frozen model with its image prompt and its prompts; it is no module and learns nothing.

    Args:
        prior: the image model; its attention processors are replaced.
        ip_adapter: see `ImagePromptConfig`; None for a model without image prompts.
        composition: how controls join, which decides the placeholders.
        injection: how bases and bypasses enter.

    Raises:
        ModelUnavailableError: the adapter or its encoder cannot be had.
        ValueError: keys that do not fit.
    """

    def __init__(
        self,
        prior: ImagePrior,
        ip_adapter: Mapping[str, Any] | ImagePromptConfig | None = None,
        composition: Composition | None = None,
        injection: InjectionConfig | None = None,
    ) -> None:
        self.prior = prior
        self.ip_adapter = ImagePromptConfig.of(ip_adapter)
        self.composition = composition or Composition()
        self.vision: Any = None
        self.adapter_kind: str | None = None
        if self.ip_adapter is not None:
            self._load_adapter(self.ip_adapter)
        self.table = set_layer_contexts(prior.unet)
        self.injection = TextInjection(
            prior.text_encoder, prior.tokenizer, self.composition.super_categories, injection
        )

    def _load_adapter(self, given: ImagePromptConfig) -> None:
        from threestudio.utils.diffusers_folder import load_model

        path = Path(resolve_checkpoint_file(given.weights))
        load_ip_adapter(self.prior.unet, str(path.parent), given.scale, weight_name=path.name)
        self.adapter_kind = ip_adapter_kind(self.prior.unet)
        part = given.image_encoder_folder or ENCODER_FOLDER
        root = resolve_pretrained(given.image_encoder, None, components=(part,))
        self.vision = load_model(root, part, self.device)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.prior.unet.parameters()).device

    # Text

    def prompts(self, texts: Sequence[str]) -> PlaceholderPrompts:
        """Tokenised prompts, with both placeholders before each text."""
        return self.injection.tokenize([self.composition.prompt(text) for text in texts])

    def words(
        self,
        mappers: Mapping[str, Mapper],
        batch: Mapping[str, Any],
        noise_levels: Float[Tensor, "b"],
        cuts: Mapping[str, Int[Tensor, "l b"] | None] | None = None,
    ) -> dict[str, MapperOutput]:
        """What mappers say of a batch's targets at these noise levels, by placeholder.

        Args:
            mappers: by kind.
            batch: times and cameras; ``scene_features`` where a mapper wants them, see
                `with_scene_features`.
            noise_levels: in [0, 1].
            cuts: of nested dropout, by kind.
        """
        return {
            PLACEHOLDERS[kind]: mapper(
                noise_levels,
                control_values(mapper.axes, batch),
                scene_features=batch["scene_features"] if mapper.config.scene_features else None,
                cuts=(cuts or {}).get(kind),
            )
            for kind, mapper in mappers.items()
        }

    # The image prompt

    def with_scene_features(
        self, batch: Mapping[str, Any], mappers: Mapping[str, Mapper]
    ) -> dict[str, Any]:
        """The batch, with pooled vision features of its condition frames where a mapper wants them.

        Raises:
            ValueError: it does, and there is no vision encoder, or one of another width.
        """
        widths = {m.config.scene_features for m in mappers.values()} - {0}
        if not widths or "scene_features" in batch:
            return dict(batch)
        found = self.pooled_features(batch["cond_rgb"])
        if widths != {found.shape[-1]}:
            raise ValueError(
                f"the mappers want {sorted(widths)} scene_features and the vision encoder gives "
                f"{found.shape[-1]}; expected the same. Set system.mapper.scene_features to it."
            )
        return {**batch, "scene_features": found}

    @torch.no_grad()
    def pooled_features(self, rgb: Float[Tensor, "b h w 3"]) -> Float[Tensor, "b d"]:
        """The vision encoder's pooled, projected feature of images.

        Raises:
            ValueError: no image prompt was loaded, so there is no encoder.
        """
        if self.vision is None:
            raise ValueError(
                "vision features are asked for, and no ip_adapter is loaded; expected one, since "
                "its image encoder makes them. Set system.ip_adapter."
            )
        pixels = clip_pixels(rgb, self.vision.config.image_size).to(self.vision.dtype)
        return self.vision(pixels).image_embeds.float()

    def image_features(
        self, batch: Mapping[str, Any], kept: Bool[Tensor, "b"] | None = None
    ) -> Tensor | None:
        """What the adapter is told of condition frames; None without an adapter.

        Args:
            batch: ``cond_features`` where they are cached, else ``cond_rgb``.
            kept: samples that keep their image prompt; None keeps all.

        Raises:
            ValueError: cached features of another kind of adapter.
        """
        if self.adapter_kind is None:
            return None
        rgb, cached = batch["cond_rgb"], batch.get("cond_features")
        pixels = clip_pixels(rgb, self.vision.config.image_size).to(self.vision.dtype)
        if cached is None:
            cached = image_features(self.vision, pixels, self.adapter_kind)
        elif cached.ndim != (2 if self.adapter_kind == "base" else 3):
            raise ValueError(
                f"cond_features have shape {tuple(cached.shape)}, and the IP-Adapter is of kind "
                f"{self.adapter_kind!r}; set data.cond_features_kind={self.adapter_kind} and "
                "render the grid's features for it."
            )
        features = cached.to(pixels)
        if kept is None or bool(kept.all()):
            return features
        nothing = without_image(self.vision, pixels[:1], self.adapter_kind).expand_as(features)
        return torch.where(kept.view(-1, *[1] * (features.ndim - 1)), features, nothing)

    def image_prompt(
        self, batch: Mapping[str, Any], kept: Bool[Tensor, "b"] | None = None
    ) -> dict[str, Any]:
        """Arguments of the denoiser for condition frames; those not ``kept`` are no prompt."""
        features = self.image_features(batch, kept)
        return {} if features is None else image_arguments(features)
