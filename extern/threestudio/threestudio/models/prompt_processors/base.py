"""Prompt processors: from a prompt in the config to the text embeddings that guidances look up."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.prompt_processors.embedding_cache import EmbeddingCache
from threestudio.models.prompt_processors.prompt_processor_output import PromptProcessorOutput
from threestudio.models.prompt_processors.view_directions import (
    DirectionConfig,
    shift_azimuth_deg,
    view_directions,
)
from threestudio.utils.base import BaseObject
from threestudio.utils.misc import barrier, get_rank
from threestudio.utils.pretrained import RequiredModel

__all__ = [
    "DirectionConfig",
    "PromptProcessor",
    "PromptProcessorOutput",
    "hash_prompt",
    "shift_azimuth_deg",
]

TEXT_COMPONENTS = ("tokenizer", "text_encoder")
PROMPT_LIBRARY = Path("load/prompt_library.json")


def hash_prompt(model: str, prompt: str) -> str:
    """Return the MD5 of "model-prompt", the name of upstream's cache files."""
    return hashlib.md5(f"{model}-{prompt}".encode()).hexdigest()


class PromptProcessor(BaseObject):
    """Encodes a prompt, its directions' variants and the negative prompt, in this process.

    A subclass says how texts are encoded: `encoder_fingerprint` and `encode`. A foreign subclass
    may instead define the contract's static ``spawn_func(model, prompts, cache_dir)``, which writes
    ``<hash_prompt>.pt`` files; it is called in process too, so that its errors are seen.
    """

    @dataclass
    class Config(BaseObject.Config):
        """Keys of the contract."""

        prompt: str = "a hamburger"
        """What to make. ``lib:a_b`` takes the one prompt of the library that holds a and b."""
        prompt_front: str | None = None
        """Prompt of front views; None adds the direction's words to ``prompt``."""
        prompt_side: str | None = None
        """The same of side views."""
        prompt_back: str | None = None
        """The same of back views."""
        prompt_overhead: str | None = None
        """The same of overhead views."""
        negative_prompt: str = ""
        """What to stay away from; the unconditional half of classifier-free guidance."""
        pretrained_model_name_or_path: str = "runwayml/stable-diffusion-v1-5"
        """Folder, hub id or ``embedded://name`` whose tokenizer and text encoder are used."""
        revision: str | None = None
        """Commit of a hub id; None is unverified."""
        overhead_threshold: float = 60.0
        """Views above this elevation are overhead, degrees."""
        front_threshold: float = 45.0
        """Views within this azimuth of 0 are from the front, degrees."""
        back_threshold: float = 45.0
        """Views within this azimuth of 180 are from the back, degrees."""
        view_dependent_prompt_front: bool = False
        """Write "side view of a cube" rather than "a cube, side view"."""
        use_cache: bool = True
        """Keep embeddings in ``cache_dir``."""
        cache_dir: str = ".threestudio_cache/text_embeddings"
        """Folder of the cache; a relative one starts at the working directory."""
        spawn: bool = True
        """Accepted for upstream's configs; texts are always encoded in this process."""
        use_perp_neg: bool = False
        """Let guidances use `get_text_embeddings_perp_neg`."""
        perp_neg_f_sb: Any = (1, 0.5, -0.606)
        """(a, b, c) of a exp(-b r) + c, see `PromptProcessorOutput`."""
        perp_neg_f_fsb: Any = (1, 0.5, +0.967)
        """The same."""
        perp_neg_f_fs: Any = (4, 0.5, -2.426)
        """The same."""
        perp_neg_f_sf: Any = (4, 0.5, -2.426)
        """The same."""
        use_prompt_debiasing: bool = False
        """Not provided; true is refused."""
        pretrained_model_name_or_path_prompt_debiasing: str = "bert-base-uncased"
        """Accepted for upstream's configs, unused."""
        prompt_debiasing_mask_ids: Any | None = None
        """Accepted for upstream's configs, unused."""

    cfg: Config

    @classmethod
    def required_models(cls, cfg: Mapping[str, Any]) -> list[str]:
        """List the models that a processor of this configuration will load."""
        name = cfg.get("pretrained_model_name_or_path") or cls.Config.pretrained_model_name_or_path
        return [RequiredModel(name, TEXT_COMPONENTS, cfg.get("revision"))]

    def configure(self) -> None:
        """Read the prompts and make or load their embeddings.

        Raises:
            ModelUnavailableError: if embeddings must be computed and the model cannot be had.
            ValueError: for words that the encoder does not know, prompt debiasing, or a library
                prompt that is missing or ambiguous.
        """
        if self.cfg.use_prompt_debiasing:
            raise ValueError(
                "use_prompt_debiasing is true; expected false, since prompt debiasing is not "
                "provided. Write prompt_side, prompt_back and prompt_overhead by hand instead."
            )
        self.directions = view_directions(
            self.cfg.front_threshold,
            self.cfg.back_threshold,
            self.cfg.overhead_threshold,
            self.cfg.view_dependent_prompt_front,
        )
        self.direction2idx = {d.name: index for index, d in enumerate(self.directions)}
        self.prompt = self.preprocess_prompt(self.cfg.prompt)
        self.negative_prompt = self.cfg.negative_prompt
        # `or`: an empty string cannot describe a view, and launch files write it for "unset".
        self.prompts_vd = [
            self.cfg.get(f"prompt_{d.name}", None) or d.prompt(self.prompt) for d in self.directions
        ]
        self.negative_prompts_vd = [
            d.negative_prompt(self.negative_prompt) for d in self.directions
        ]
        threestudio.info(f"Prompt: {self.prompt!r}; negative prompt: {self.negative_prompt!r}")
        self.prepare_text_embeddings()
        self.load_text_embeddings()

    def encoder_fingerprint(self) -> str:
        """Return what identifies the text encoder, part of the cache's key; to define."""
        raise NotImplementedError(f"{type(self).__name__} defines no encoder_fingerprint.")

    def encode(self, prompts: list[str]) -> Float[Tensor, "n l d"]:
        """Encode prompts; called once with all that the cache does not hold; to define."""
        raise NotImplementedError(f"{type(self).__name__} defines no encode.")

    def prepare_text_embeddings(self) -> None:
        """Make the embedding of every prompt of this processor; rank 0 writes the cache."""
        prompts = [self.prompt, *self.prompts_vd, self.negative_prompt, *self.negative_prompts_vd]
        prompts = list(dict.fromkeys(prompts))
        if hasattr(type(self), "spawn_func"):
            self._embeddings = self._from_spawn_func(prompts)
            return
        self.check_prompts()
        if not self.cfg.use_cache:
            self._embeddings = dict(zip(prompts, self.encode(prompts)))
            return
        cache = EmbeddingCache(self.cfg.cache_dir, self.encoder_fingerprint())
        if get_rank() == 0:
            self._embeddings = self._cached_or_encoded(cache, prompts, write=True)
        barrier()
        if get_rank() != 0:
            self._embeddings = self._cached_or_encoded(cache, prompts, write=False)

    def check_prompts(self) -> None:
        """Refuse prompts that the encoder cannot read; to override."""

    def load_text_embeddings(self) -> None:
        """Put the embeddings together, on this processor's device."""
        self.text_embeddings = self.load_from_cache(self.prompt)[None]
        self.uncond_text_embeddings = self.load_from_cache(self.negative_prompt)[None]
        self.text_embeddings_vd = torch.stack([self.load_from_cache(p) for p in self.prompts_vd])
        self.uncond_text_embeddings_vd = torch.stack(
            [self.load_from_cache(p) for p in self.negative_prompts_vd]
        )

    def load_from_cache(self, prompt: str) -> Float[Tensor, "l d"]:
        """Return the embedding of one of this processor's prompts, on its device."""
        return self._embeddings[prompt].to(self.device)

    def preprocess_prompt(self, prompt: str) -> str:
        """Look ``lib:a_b`` up in the prompt library; return any other prompt as it is."""
        return _library_prompt(prompt) if prompt.startswith("lib:") else prompt

    def __call__(self) -> PromptProcessorOutput:
        """Return the embeddings with the rules by which cameras choose among them."""
        return PromptProcessorOutput(
            text_embeddings=self.text_embeddings,
            uncond_text_embeddings=self.uncond_text_embeddings,
            text_embeddings_vd=self.text_embeddings_vd,
            uncond_text_embeddings_vd=self.uncond_text_embeddings_vd,
            directions=self.directions,
            direction2idx=self.direction2idx,
            use_perp_neg=self.cfg.use_perp_neg,
            perp_neg_f_sb=tuple(self.cfg.perp_neg_f_sb),
            perp_neg_f_fsb=tuple(self.cfg.perp_neg_f_fsb),
            perp_neg_f_fs=tuple(self.cfg.perp_neg_f_fs),
            perp_neg_f_sf=tuple(self.cfg.perp_neg_f_sf),
            prompt=self.prompt,
            prompts_vd=self.prompts_vd,
        )

    def _cached_or_encoded(
        self, cache: EmbeddingCache, prompts: list[str], write: bool
    ) -> dict[str, Tensor]:
        embeddings = {prompt: cache.read(prompt) for prompt in prompts}
        missing = [prompt for prompt, embedding in embeddings.items() if embedding is None]
        if missing:
            for prompt, embedding in zip(missing, self.encode(missing)):
                embeddings[prompt] = embedding
                if write:
                    cache.write(prompt, embedding)
        return embeddings

    def _from_spawn_func(self, prompts: list[str]) -> dict[str, Tensor]:
        model, folder = self.cfg.pretrained_model_name_or_path, Path(self.cfg.cache_dir)
        folder.mkdir(parents=True, exist_ok=True)
        files = {prompt: folder / f"{hash_prompt(model, prompt)}.pt" for prompt in prompts}
        missing = [p for p, path in files.items() if not (self.cfg.use_cache and path.is_file())]
        if missing and get_rank() == 0:
            type(self).spawn_func(model, missing, str(folder))
        barrier()
        return {p: torch.load(f, map_location="cpu", weights_only=True) for p, f in files.items()}


def _library_prompt(prompt: str) -> str:
    if not PROMPT_LIBRARY.is_file():
        raise ValueError(
            f"The prompt {prompt!r} asks for the prompt library, and {PROMPT_LIBRARY} does not "
            'exist; write the prompt itself, or make that file: {"dreamfusion": ["a prompt", ...]}.'
        )
    words = prompt.removeprefix("lib:").lower().split("_")
    library = json.loads(PROMPT_LIBRARY.read_text(encoding="utf-8"))
    every = [candidate for candidates in library.values() for candidate in candidates]
    found = [p for p in every if all(word in p.lower() for word in words)]
    if len(found) != 1:
        listed = "; ".join(found[:3]) or "none"
        raise ValueError(
            f"The prompt {prompt!r} fits {len(found)} prompts of {PROMPT_LIBRARY} ({listed}); "
            "expected exactly one. Give more words, joined by underscores."
        )
    return found[0]
