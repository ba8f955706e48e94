"""What a machine offers: GPU memory, models on disk, words that an embedded encoder knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from threestudio.launcher.profiles import Machine
from threestudio.launcher.validate import required_models, used_parts
from threestudio.utils.config_errors import ConfigError, ConfigValueError
from threestudio.utils.config_text import TEXT_KEYS

if TYPE_CHECKING:
    from threestudio.models.prompt_processors.vocabulary import WordVocabulary


def probe_machine(candidate: Callable[[str], DictConfig]) -> Machine:
    """Describe this machine to `choose_profile`.

    Args:
        candidate: returns the resolved experiment under a profile, or raises a `ConfigError`.
    """
    return Machine(
        free_gpu_gib=_free_gpu_gib(),
        has_models=lambda name: _has_models(candidate, name),
        covers_prompt=lambda name: _covers_prompt(candidate, name),
    )


def unknown_prompt_words(cfg: DictConfig) -> list[str]:
    """List words of the experiment's prompts that the models of its prompt processors lack."""
    unknown: list[str] = []
    for _, vocabulary, text in _texts_with_vocabulary(cfg):
        unknown += vocabulary.unknown_words(text)
    return list(dict.fromkeys(unknown))


def check_prompt_words(cfg: DictConfig) -> None:
    """Refuse prompts with words that a small text encoder does not know.

    Raises:
        ConfigValueError: naming the words, their neighbours and the words that are known.
    """
    from threestudio.models.prompt_processors.vocabulary import check_words

    for model, vocabulary, text in _texts_with_vocabulary(cfg):
        try:
            check_words(model, vocabulary, [text])
        except ValueError as error:
            raise ConfigValueError(str(error)) from error


def _texts_with_vocabulary(cfg: DictConfig) -> Iterator[tuple[str, WordVocabulary, str]]:
    """Yield (model, its vocabulary, text) for every prompt of a model with a closed vocabulary."""
    from threestudio.models.prompt_processors.vocabulary import read_vocabulary
    from threestudio.utils.pretrained import resolve_pretrained

    for part in used_parts(cfg):
        texts = [text for text in _prompts(part.cfg) if text]
        lister = getattr(part.cls, "required_models", None)
        if not texts or not callable(lister):
            continue
        for model in lister(part.cfg):
            vocabulary = read_vocabulary(resolve_pretrained(model, allow_download=False))
            if vocabulary is not None:
                yield from ((model, vocabulary, text) for text in texts)


def _free_gpu_gib() -> float | None:
    import torch

    if not torch.cuda.is_available():
        return None
    free_bytes, _ = torch.cuda.mem_get_info()
    return free_bytes / 2**30


def _has_models(candidate: Callable[[str], DictConfig], name: str) -> bool:
    from threestudio.utils.pretrained import models_available

    try:
        return all(models_available(required_models(candidate(name))).values())
    except ConfigError:
        return False


def _covers_prompt(candidate: Callable[[str], DictConfig], name: str) -> bool:
    try:
        return not unknown_prompt_words(candidate(name))
    except (ConfigError, OSError, ValueError):
        return False


def _prompts(cfg: DictConfig) -> Iterator[str]:
    for key in TEXT_KEYS:
        value = cfg.get(key)
        if isinstance(value, str):
            yield value
