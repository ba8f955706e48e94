"""The prompt processor of VideoCrafter2, whose text encoder is Stable Diffusion 2.1's, CLIP-H."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import threestudio
from threestudio.models.prompt_processors.base import TEXT_COMPONENTS
from threestudio.models.prompt_processors.stable_diffusion_prompt_processor import (
    StableDiffusionPromptProcessor,
)
from threestudio.utils.pretrained import RequiredModel

ORIGINAL = "VideoCrafter/VideoCrafter2"
TEXT_ENCODER = "stabilityai/stable-diffusion-2-1-base"


@threestudio.register("videocrafter-prompt-processor")
class VideoCrafterPromptProcessor(StableDiffusionPromptProcessor):
    """Encodes as Stable Diffusion 2.1 does.

    The original's checkpoint carries the same frozen encoder inside a pickle, so its id stands here
    for a folder that has the encoder by itself.
    """

    @dataclass
    class Config(StableDiffusionPromptProcessor.Config):
        """The model's id, and a key of the original."""

        pretrained_model_name_or_path: str = ORIGINAL
        """Folder or hub id whose tokenizer and text encoder are used."""
        config: str | None = None
        """Accepted for upstream's configs, unused."""

    cfg: Config

    @classmethod
    def required_models(cls, cfg: Mapping[str, Any]) -> list[str]:
        """List the model that a processor of this configuration will load."""
        name = cfg.get("pretrained_model_name_or_path") or ORIGINAL
        name = TEXT_ENCODER if name == ORIGINAL else name
        return [RequiredModel(name, TEXT_COMPONENTS, cfg.get("revision"))]

    def configure(self) -> None:
        """See `PromptProcessor.configure`."""
        if self.cfg.pretrained_model_name_or_path == ORIGINAL:
            self.cfg.pretrained_model_name_or_path = TEXT_ENCODER
        super().configure()
