"""The prompt processor of DeepFloyd IF: texts through the encoder of a T5."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.prompt_processors.folder_prompt_processor import (
    FolderPromptProcessor,
    warn_if_cut,
)

TEXT_LENGTH = 77


@threestudio.register("deep-floyd-prompt-processor")
class DeepFloydPromptProcessor(FolderPromptProcessor):
    """Encodes with the last hidden states of a T5 encoder, padded to 77 tokens.

    The padding is masked inside the encoder and its states are kept, as the model was trained. The
    encoder (19 GB in fp32 at full size) runs once and is dropped again; a prompt in the cache loads
    no model.
    """

    @dataclass
    class Config(FolderPromptProcessor.Config):
        """Keys of the base."""

        pretrained_model_name_or_path: str = "DeepFloyd/IF-I-XL-v1.0"
        """Folder or hub id whose tokenizer and text encoder are used."""
        half_precision_weights: bool = True
        """Run the encoder in bf16 off the CPU; the CPU always computes in fp32."""

    cfg: Config

    def encoder_fingerprint(self) -> str:
        """Return a hash of the encoder's and tokenizer's files."""
        return f"masked padding kept, {TEXT_LENGTH} tokens, {super().encoder_fingerprint()}"

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Float[Tensor, "n l d"]:
        """Return the embeddings in fp32; what exceeds 77 tokens is cut, with a note."""
        tokenizer = self.load_tokenizer()
        for prompt, ids in zip(prompts, tokenizer(prompts).input_ids):
            warn_if_cut(prompt, len(ids), TEXT_LENGTH)
        tokens = tokenizer(
            prompts,
            padding="max_length",
            max_length=TEXT_LENGTH,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        encoder = self.load_encoder(self.cfg.half_precision_weights)
        states = encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
        return states.last_hidden_state.float().cpu()
