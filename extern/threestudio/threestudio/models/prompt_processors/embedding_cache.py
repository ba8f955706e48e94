"""Text embeddings on disk: one safetensors file per (text encoder, prompt), written atomically.

The key is the content of the encoder and its tokenizer rather than their name, so a model that was
replaced under the same name is never answered from an old file.
"""

import hashlib
import os
import tempfile
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

import threestudio

# Changes whenever the way from a prompt to its embedding does.
_RECIPE = "clip-last-hidden-state-1"


class EmbeddingCache:
    """Embeddings of one encoder in a folder.

    Args:
        folder: where the files lie; made when the first one is written.
        fingerprint: identifies the encoder, see `folder_fingerprint`.
    """

    def __init__(self, folder: str | os.PathLike, fingerprint: str) -> None:
        self.folder = Path(folder)
        self.fingerprint = fingerprint

    def path(self, prompt: str) -> Path:
        """Return the file of a prompt."""
        key = f"{_RECIPE}\n{self.fingerprint}\n{prompt}"
        return self.folder / f"{hashlib.sha256(key.encode('utf-8')).hexdigest()}.safetensors"

    def read(self, prompt: str) -> Float[Tensor, "l d"] | None:
        """Return a cached embedding on the CPU; None if there is none or its file is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path(prompt)
        if not path.is_file():
            return None
        try:
            return load_file(path)["text_embeddings"]
        except (SafetensorError, KeyError):
            threestudio.warn(f"The cached text embedding {path} is damaged; computing it again.")
            return None

    def write(self, prompt: str, embedding: Float[Tensor, "l d"]) -> None:
        """Store an embedding. A folder that cannot be written costs one warning, not the run."""
        from safetensors.torch import save

        content = save({"text_embeddings": embedding.contiguous().cpu()})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self.folder, suffix=".part")
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(temporary, self.path(prompt))
        except OSError as error:
            threestudio.warn(f"Text embeddings are not cached in {self.folder}: {error}.")
