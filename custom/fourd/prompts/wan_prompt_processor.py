"""The prompt processor of Wan (Wan Team 2025): texts through the encoder of a UMT5."""

from dataclasses import dataclass

import threestudio
import torch
from jaxtyping import Float
from threestudio.models.prompt_processors.folder_prompt_processor import (
    FolderPromptProcessor,
    warn_if_cut,
)
from torch import Tensor


@threestudio.register("wan-prompt-processor")
class WanPromptProcessor(FolderPromptProcessor):
    """Encodes with the last hidden states of a UMT5 encoder, zero beyond the end of the text.

    The transformer reads the padding too, so the zeros are part of what it was trained on. The
    encoder (11 GB in bf16 at full size) runs once and is dropped again; a prompt in the cache loads
    no model.
    """

    @dataclass
    class Config(FolderPromptProcessor.Config):
        """Keys of the base, the model's id and the length of a text."""

        pretrained_model_name_or_path: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        """Folder or hub id whose tokenizer and text encoder are used."""
        max_sequence_length: int = 512
        """Tokens of an embedding; Wan reads 512. Longer prompts are cut, with a note."""
        half_precision_weights: bool = True
        """Run the encoder in bf16 off the CPU; the CPU always computes in fp32."""

    cfg: Config

    def configure(self) -> None:
        """See `PromptProcessor.configure`.

        Raises:
            ValueError: if ``max_sequence_length`` is not positive.
        """
        if self.cfg.max_sequence_length < 1:
            raise ValueError(
                f"max_sequence_length is {self.cfg.max_sequence_length}; expected a positive "
                "number of tokens, 512 for Wan."
            )
        super().configure()

    def encoder_fingerprint(self) -> str:
        """Return a hash of the encoder's and tokenizer's files, with the length of a text."""
        files = super().encoder_fingerprint()
        return f"zeros beyond the text, {self.cfg.max_sequence_length} tokens, {files}"

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Float[Tensor, "n l d"]:
        """Return the embeddings in fp32, one prompt at a time: attention takes l^2 per head."""
        tokenizer = self.load_tokenizer()
        encoder = self.load_encoder(self.cfg.half_precision_weights)
        length = self.cfg.max_sequence_length
        embeddings = torch.zeros(len(prompts), length, encoder.config.d_model)
        for row, prompt in zip(embeddings, prompts):
            ids = tokenizer(prompt).input_ids
            warn_if_cut(prompt, len(ids), length)
            if len(ids) > length:
                ids = tokenizer(prompt, truncation=True, max_length=length).input_ids
            # Encoding the text without padding equals masking the padding, and costs its length.
            tokens = torch.tensor([ids], device=self.device)
            row[: len(ids)] = encoder(tokens).last_hidden_state[0].float().cpu()
        return embeddings
