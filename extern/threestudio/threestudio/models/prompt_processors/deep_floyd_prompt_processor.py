"""The prompt processor of DeepFloyd IF: texts through the encoder of a T5."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.prompt_processors.base import TEXT_COMPONENTS, PromptProcessor
from threestudio.utils.diffusers_folder import folder_fingerprint, load_model, load_tokenizer
from threestudio.utils.pretrained import resolve_pretrained

TEXT_LENGTH = 77


@threestudio.register("deep-floyd-prompt-processor")
class DeepFloydPromptProcessor(PromptProcessor):
    """Encodes with the last hidden states of a T5 encoder, padded to 77 tokens.

    The padding is masked inside the encoder and its states are kept, as the model was trained. The
    encoder (19 GB in fp32 at full size) runs once and is dropped again; a prompt in the cache loads
    no model.
    """

    @dataclass
    class Config(PromptProcessor.Config):
        """Keys of the base."""

        pretrained_model_name_or_path: str = "DeepFloyd/IF-I-XL-v1.0"
        """Folder or hub id whose tokenizer and text encoder are used."""
        half_precision_weights: bool = True
        """Run the encoder in bf16 off the CPU; the CPU always computes in fp32."""

    cfg: Config

    def configure(self) -> None:
        """See `PromptProcessor.configure`."""
        self._folder: Path = resolve_pretrained(
            self.cfg.pretrained_model_name_or_path, self.cfg.revision, components=TEXT_COMPONENTS
        )
        super().configure()

    def encoder_fingerprint(self) -> str:
        """Return a hash of the encoder's and tokenizer's files."""
        files = folder_fingerprint(self._folder, TEXT_COMPONENTS)
        return f"masked padding kept, {TEXT_LENGTH} tokens, {files}"

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Float[Tensor, "n l d"]:
        """Return the embeddings in fp32; what exceeds 77 tokens is cut, with a note."""
        tokenizer = load_tokenizer(self._folder)
        for prompt, ids in zip(prompts, tokenizer(prompts).input_ids):
            if len(ids) > TEXT_LENGTH:
                threestudio.warn(
                    f"The prompt {prompt!r} has {len(ids)} tokens; only {TEXT_LENGTH} are read."
                )
        tokens = tokenizer(
            prompts,
            padding="max_length",
            max_length=TEXT_LENGTH,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        half = self.cfg.half_precision_weights and self.device.type != "cpu"
        dtype = torch.bfloat16 if half else torch.float32
        encoder = load_model(self._folder, "text_encoder", self.device, dtype)
        states = encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
        return states.last_hidden_state.float().cpu()
