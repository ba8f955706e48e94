"""Parts of a diffusers folder, loaded frozen: safetensors only, classes from a closed list only.

A configuration file chooses among the classes below and the ones that an extension registered; it
can never bring code of its own, whatever ``auto_map`` or ``_class_name`` it carries.
"""

import contextlib
import hashlib
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_MODEL_CLASSES: dict[str, str] = {
    "UNet2DConditionModel": "diffusers:UNet2DConditionModel",
    "UNet3DConditionModel": "diffusers:UNet3DConditionModel",
    "UNetMotionModel": "diffusers:UNetMotionModel",
    "MotionAdapter": "diffusers:MotionAdapter",
    "WanTransformer3DModel": "diffusers:WanTransformer3DModel",
    "AutoencoderKL": "diffusers:AutoencoderKL",
    "AutoencoderKLWan": "diffusers:AutoencoderKLWan",
    "CLIPTextModel": "transformers:CLIPTextModel",
    "UMT5EncoderModel": "transformers:UMT5EncoderModel",
    "T5EncoderModel": "transformers:T5EncoderModel",
}
_TOKENIZER_CLASSES: dict[str, str] = {
    "CLIPTokenizer": "transformers:CLIPTokenizer",
    "CLIPTokenizerFast": "transformers:CLIPTokenizer",
    "PreTrainedTokenizerFast": "transformers:PreTrainedTokenizerFast",
    # T5's own class would build a pipeline of its own around the vocabulary in tokenizer.json.
    "T5Tokenizer": "transformers:PreTrainedTokenizerFast",
    "T5TokenizerFast": "transformers:PreTrainedTokenizerFast",
    "TokenizersBackend": "transformers:PreTrainedTokenizerFast",
}
# Beyond this size a file's fingerprint is taken from its two ends: the header of a safetensors file
# with every name and shape, and the last of its numbers.
_WHOLE_FILE_BYTES = 64 * 2**20
_END_BYTES = 4 * 2**20


def register_model_class(name: str, target: str) -> None:
    """Allow a configuration's ``_class_name`` to be ``name``; ``target`` is "module:Class"."""
    _MODEL_CLASSES[name] = target


def read_config(root: Path, component: str) -> dict[str, Any]:
    """Read the configuration of one component, for example "unet".

    Raises:
        FileNotFoundError: if the folder holds none.
        ValueError: if it is not a JSON object.
    """
    name = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
    path = Path(root) / component / name.get(component, "config.json")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected a diffusers folder with the component '{component}'."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch the model again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def load_model(
    root: Path, component: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """Load one network of a folder, in evaluation mode, with no parameter that requires gradients.

    Raises:
        FileNotFoundError: if the component or its safetensors file is missing.
        ValueError: if its configuration names a class outside the closed list.
    """
    config = read_config(root, component)
    name = config.get("_class_name") or (config.get("architectures") or [None])[0]
    cls = _listed_class(_MODEL_CLASSES, name, Path(root) / component)
    folder = Path(root) / component
    with _without_progress_bars():
        model = cls.from_pretrained(
            folder,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            **_variant(folder),
        )
    return model.eval().requires_grad_(False).to(device=device)


def load_tokenizer(root: Path):
    """Load the tokenizer of a folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if its configuration names a class outside the closed list.
    """
    folder = Path(root) / "tokenizer"
    config = read_config(root, "tokenizer")
    name = config.get("tokenizer_class", "CLIPTokenizer")
    cls = _listed_class(_TOKENIZER_CLASSES, name, folder)
    if str(name).startswith("T5") and not (folder / "tokenizer.json").is_file():
        return _sentencepiece_tokenizer(folder, config)
    return cls.from_pretrained(folder, local_files_only=True)


def _sentencepiece_tokenizer(folder: Path, config: dict[str, Any]):
    from threestudio.utils.sentencepiece_tokenizer import t5_tokenizer

    path = folder / "spiece.model"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds neither tokenizer.json nor spiece.model; expected one of them. Fetch "
            "the model again."
        )
    return t5_tokenizer(path, int(config.get("model_max_length") or 512))


def folder_fingerprint(root: Path, components: tuple[str, ...]) -> str:
    """Return a hash of what the components hold, to key caches of what they compute.

    Configuration files and weights up to 64 MiB count whole; of larger weights, the size and 4 MiB
    at each end. Names and contents count, times and places do not.
    """
    digest = hashlib.sha256()
    for component in components:
        for path in sorted((Path(root) / component).iterdir()):
            if path.suffix not in (".json", ".txt", ".safetensors", ".model"):
                continue
            size = path.stat().st_size
            digest.update(f"{component}/{path.name}:{size}\n".encode())
            digest.update(_sample_of_file(path, size))
    return digest.hexdigest()


def _sample_of_file(path: Path, size: int) -> bytes:
    if size <= _WHOLE_FILE_BYTES:
        return hashlib.sha256(path.read_bytes()).digest()
    with path.open("rb") as file:
        head = file.read(_END_BYTES)
        file.seek(-_END_BYTES, os.SEEK_END)
        return hashlib.sha256(head + file.read()).digest()


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar per file into the launcher's own display."""
    from transformers.utils import logging as transformers_logging

    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _variant(folder: Path) -> dict[str, str]:
    """Ask for the fp16 files where a folder holds no others."""
    names = [path.name for path in folder.glob("*.safetensors")]
    if not names:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only the pickle {pickles[0]}" if pickles else "no weights"
        raise FileNotFoundError(
            f"{folder} holds {found}; expected a .safetensors file, the only format that is read. "
            "Fetch the safetensors version, or convert it once in an environment that you trust."
        )
    plain = [name for name in names if ".fp16." not in name]
    return {} if plain else {"variant": "fp16"}


def _listed_class(table: dict[str, str], name: str | None, folder: Path):
    if name not in table:
        raise ValueError(
            f"{folder} asks for the class {name!r}; expected one of {', '.join(sorted(table))}. "
            "Code that a model folder brings is never run; an extension can register a class."
        )
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
