"""Base of the prompt processors whose tokenizer and text encoder lie in a diffusers folder."""

from pathlib import Path

import torch

import threestudio
from threestudio.models.prompt_processors.base import TEXT_COMPONENTS, PromptProcessor
from threestudio.utils.diffusers_folder import folder_fingerprint, load_model, load_tokenizer
from threestudio.utils.pretrained import resolve_pretrained


class FolderPromptProcessor(PromptProcessor):
    """Finds the folder before anything is encoded; a subclass says how texts are encoded."""

    def configure(self) -> None:
        """See `PromptProcessor.configure`.

        Raises:
            ModelUnavailableError: the folder cannot be had.
        """
        self._folder: Path = resolve_pretrained(
            self.cfg.pretrained_model_name_or_path, self.cfg.revision, components=TEXT_COMPONENTS
        )
        super().configure()

    def encoder_fingerprint(self) -> str:
        """Return a hash of the tokenizer's and the text encoder's files."""
        return folder_fingerprint(self._folder, TEXT_COMPONENTS)

    def load_tokenizer(self):
        """Return the folder's tokenizer."""
        return load_tokenizer(self._folder)

    def load_encoder(self, half_precision: bool = False) -> torch.nn.Module:
        """Return the folder's text encoder, in bf16 if asked for and off the CPU, else in fp32."""
        half = half_precision and self.device.type != "cpu"
        dtype = torch.bfloat16 if half else torch.float32
        return load_model(self._folder, "text_encoder", self.device, dtype)


def warn_if_cut(prompt: str, n_tokens: int, most: int) -> None:
    """Tell that only the first ``most`` tokens of a prompt are read, where it has more."""
    if n_tokens > most:
        threestudio.warn(f"The prompt {prompt!r} has {n_tokens} tokens; only {most} are read.")
