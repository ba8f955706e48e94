"""The prompt processor of models with a CLIP text encoder: Stable Diffusion, MVDream, embedded."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.prompt_processors.folder_prompt_processor import (
    FolderPromptProcessor,
    warn_if_cut,
)
from threestudio.models.prompt_processors.vocabulary import check_words, read_vocabulary


@threestudio.register("stable-diffusion-prompt-processor")
class StableDiffusionPromptProcessor(FolderPromptProcessor):
    """Encodes with the last hidden states of a CLIP text model, padded to its full length.

    The encoder runs once, in fp32, and is dropped again; a prompt in the cache loads no model.
    """

    @dataclass
    class Config(FolderPromptProcessor.Config):
        """No further keys."""

    cfg: Config

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
        tokenizer = self.load_tokenizer()
        length = tokenizer.model_max_length
        for prompt, ids in zip(prompts, tokenizer(prompts).input_ids):
            warn_if_cut(prompt, len(ids), length)
        tokens = tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        encoder = self.load_encoder()
        return encoder(tokens.input_ids.to(self.device))[0].float().cpu()
