"""A prompt processor for guidances that read no text."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.prompt_processors.base import PromptProcessor


@threestudio.register("dummy-prompt-processor")
class DummyPromptProcessor(PromptProcessor):
    """Answers every prompt with one token of zeros and needs no model."""

    @dataclass
    class Config(PromptProcessor.Config):
        """No further keys; nothing is worth a cache."""

        use_cache: bool = False
        """Off, since there is nothing to compute."""

    cfg: Config

    @classmethod
    def required_models(cls, cfg: Any) -> list[str]:
        """List no models."""
        return []

    def encode(self, prompts: list[str]) -> Float[Tensor, "n 1 1"]:
        """Return zeros."""
        return torch.zeros(len(prompts), 1, 1)

    def encoder_fingerprint(self) -> str:
        """Return a constant."""
        return "dummy"
