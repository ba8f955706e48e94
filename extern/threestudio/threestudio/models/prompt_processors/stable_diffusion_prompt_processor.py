"""The prompt processor of models with a CLIP text encoder: Stable Diffusion, MVDream, embedded."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.prompt_processors.base import TEXT_COMPONENTS, PromptProcessor
from threestudio.models.prompt_processors.vocabulary import check_words, read_vocabulary
from threestudio.utils.diffusers_folder import folder_fingerprint, load_model, load_tokenizer
from threestudio.utils.pretrained import resolve_pretrained


@threestudio.register("stable-diffusion-prompt-processor")
class StableDiffusionPromptProcessor(PromptProcessor):
    """Encodes with the last hidden states of a CLIP text model, padded to its full length.

    The encoder runs once, in fp32, and is dropped again; a prompt in the cache loads no model.
    """

    @dataclass
    class Config(PromptProcessor.Config):
        """No further keys."""

    cfg: Config

    def configure(self) -> None:
        """See `PromptProcessor.configure`."""
        self._folder: Path = resolve_pretrained(
            self.cfg.pretrained_model_name_or_path, self.cfg.revision, components=TEXT_COMPONENTS
        )
        super().configure()

    def encoder_fingerprint(self) -> str:
        """Return a hash of the tokenizer's and the text encoder's files."""
        return folder_fingerprint(self._folder, TEXT_COMPONENTS)

    def check_prompts(self) -> None:
        """Refuse words that a word-level tokenizer does not know."""
        model = self.cfg.pretrained_model_name_or_path
        vocabulary = read_vocabulary(self._folder)
        check_words(model, vocabulary, [self.prompt])
        check_words(model, vocabulary, self.prompts_vd, "view-dependent prompt")
        check_words(model, vocabulary, [self.negative_prompt], "negative_prompt")

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Float[Tensor, "n l d"]:
        """Return the embeddings; what exceeds the encoder's length is cut, with a note."""
        tokenizer = load_tokenizer(self._folder)
        length = tokenizer.model_max_length
        for prompt, ids in zip(prompts, tokenizer(prompts).input_ids):
            if len(ids) > length:
                threestudio.warn(
                    f"The prompt {prompt!r} has {len(ids)} tokens; only {length} are read."
                )
        tokens = tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        encoder = load_model(self._folder, "text_encoder", self.device)
        return encoder(tokens.input_ids.to(self.device))[0].float().cpu()
