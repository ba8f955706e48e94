"""A trained mapper on disk: one safetensors file and, beside it, one JSON that says what it is for.

``NAME.safetensors`` holds weights, frequencies and ranges; ``NAME.json`` the mapper's config, the
models that it was trained on, and the hash of the first, which ties the two together. There are no
pickles, so loading runs no code. The optimizer's state is not here: training resumes from
Lightning's checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from threestudio.utils.saving import replacing

from .controlled_prior import ImagePromptConfig
from .mapper import Mapper, config_facts, config_from_facts
from .text_injection import InjectionConfig

FORMAT_VERSION = 1
SUFFIXES = (".safetensors", ".json")


@dataclass(frozen=True)
class MapperFacts:
    """What a mapper was trained with, beside its own config."""

    base_model: str
    """Id, path or embedded:// name of the denoiser."""
    base_revision: str | None
    """Commit of the hub's repository; None if it was not pinned."""
    layer_table: tuple[str, ...]
    """Names of the cross-attentions (or blocks) in execution order."""
    injection: InjectionConfig
    """How bases and bypasses enter."""
    prompt_template: str
    """With {caption}, and the placeholders."""
    step: int
    """Training steps done."""
    ip_adapter: str | None = None
    """File of the IP-Adapter; None without one."""
    ip_adapter_scale: float | None = None
    """Its weight."""
    width: int | None = None
    """Of the text encoder; None takes the mapper's."""
    image_encoder: str | None = None
    """Folder, id or embedded:// name of the IP-Adapter's vision encoder."""
    image_encoder_folder: str | None = None
    """Where in it."""
    sampling: dict | None = None
    """Keys of `SamplingOptions` that it was tested with."""

    def image_prompt(self) -> ImagePromptConfig | None:
        """The IP-Adapter that it was trained with, if it was with one.

        Raises:
            ValueError: the file does not name the adapter's vision encoder.
        """
        if self.ip_adapter is None:
            return None
        if self.image_encoder is None:
            raise ValueError(
                f"the mapper was trained with the IP-Adapter {self.ip_adapter}, and its JSON names "
                "no image_encoder; expected one. Give ip_adapter: weights and image_encoder."
            )
        scale = {} if self.ip_adapter_scale is None else {"scale": self.ip_adapter_scale}
        return ImagePromptConfig(
            self.ip_adapter, self.image_encoder, self.image_encoder_folder, **scale
        )

    def text_template(self) -> str:
        """The template of prompts without the placeholders, which a composition puts there."""
        return self.prompt_template.partition(". ")[2]


OPTIONAL = ("image_encoder", "image_encoder_folder", "sampling")
"""Facts that earlier files of this format do not have."""


def save_mapper(path: str | Path, mapper: Mapper, facts: MapperFacts) -> tuple[Path, Path]:
    """Write a mapper, each file whole or not at all.

    Args:
        path: of either file, or of both without their suffix. Neither may exist.
        mapper: to write.
        facts: what it was trained with.

    Returns:
        The weights' file and the JSON.

    Raises:
        FileExistsError: one of them exists.
    """
    weights_path, facts_path = _pair(path)
    for existing in (weights_path, facts_path):
        if existing.exists():
            raise FileExistsError(
                f"{existing} exists; expected a new name. A mapper is never written over another."
            )
    weights_path.parent.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in mapper.state_dict().items()}
    content = save(state)
    with replacing(weights_path) as temporary:
        Path(temporary).write_bytes(content)
    with replacing(facts_path) as temporary:
        Path(temporary).write_text(json.dumps(_as_json(mapper, facts, content), indent=1) + "\n")
    return weights_path, facts_path


def load_mapper(path: str | Path) -> tuple[Mapper, MapperFacts]:
    """Read a mapper, frozen and in evaluation mode, with what it was trained with.

    Raises:
        FileNotFoundError: one of its two files is missing.
        ValueError: another format, or two files that do not belong together.
    """
    weights_path, facts_path = _pair(path)
    for wanted in (weights_path, facts_path):
        if not wanted.is_file():
            raise FileNotFoundError(
                f"{wanted} does not exist; expected a mapper as {weights_path.name} beside "
                f"{facts_path.name}. Copy both."
            )
    written = _read_facts(facts_path)
    content = weights_path.read_bytes()
    if hashlib.sha256(content).hexdigest() != written["weights_sha256"]:
        raise ValueError(
            f"{weights_path.name} is not the file that {facts_path.name} describes (their hashes "
            "differ); expected the two as they were written together. Copy both again."
        )
    state = load(content)
    mapper = Mapper(config_from_facts(written["mapper"]), float(written["base_norm"]))
    expected = {key: tuple(value.shape) for key, value in mapper.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    odd = sorted(key for key in expected | found if expected.get(key) != found.get(key))
    if odd:
        raise ValueError(
            f"{weights_path.name} holds {odd[0]} as {found.get(odd[0])}; expected "
            f"{expected.get(odd[0])} for the mapper that {facts_path.name} describes."
        )
    mapper.load_state_dict(state)
    facts = {key: written.get(key) for key in MapperFacts.__dataclass_fields__}
    facts["layer_table"] = tuple(facts["layer_table"])
    facts["injection"] = InjectionConfig(**facts["injection"])
    return mapper.eval().requires_grad_(False), MapperFacts(**facts)


def check_fits(facts: MapperFacts, base_model: str, width: int, table: tuple[str, ...]) -> None:
    """Refuse a mapper that was trained for another model.

    Args:
        facts: of the mapper.
        base_model: id, path or embedded:// name of the denoiser at hand.
        width: of its text encoder.
        table: its layer table.

    Raises:
        ValueError: any of the three differs, naming both.
    """
    for what, trained, given in (
        ("text width", facts.width, width),
        ("base model", facts.base_model, base_model),
    ):
        if trained != given:
            raise ValueError(
                f"the mapper was trained for the {what} {trained}, and the model has {given}; "
                "expected the same. Load the model that the mapper's JSON names, or train a mapper "
                "for this one."
            )
    if facts.layer_table != tuple(table):
        raise ValueError(
            f"the mapper speaks to {len(facts.layer_table)} layers and the model has {len(table)}, "
            f"the first of them {table[0] if table else None}; expected the same layers in the "
            f"same order, from {facts.layer_table[0]} on. Load the model that the mapper's JSON "
            "names."
        )


def _pair(path: str | Path) -> tuple[Path, Path]:
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in SUFFIXES else path
    weights, facts = (stem.with_name(stem.name + suffix) for suffix in SUFFIXES)
    return weights, facts


def _as_json(mapper: Mapper, facts: MapperFacts, content: bytes) -> dict[str, Any]:
    written = asdict(facts)
    written["width"] = mapper.config.width
    ranges = zip(mapper.axes, mapper.axis_low.tolist(), mapper.axis_high.tolist(), strict=True)
    return {
        "format": "threestudio-4d mapper",
        "format_version": FORMAT_VERSION,
        "mapper": config_facts(mapper.config),
        "ranges": {axis.name: [low, high] for axis, low, high in ranges},
        "base_norm": float(mapper.base_norm),
        **written,
        "weights_sha256": hashlib.sha256(content).hexdigest(),
    }


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path.name} is not JSON ({error}); expected what `save_mapper` wrote."
        ) from error
    version = written.get("format_version") if isinstance(written, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path.name} has the format version {version}; expected {FORMAT_VERSION}. Update "
            "threestudio-4d if the file is newer."
        )
    expected = {"mapper", "base_norm", "weights_sha256", *MapperFacts.__dataclass_fields__}
    expected -= set(OPTIONAL)
    missing = sorted(expected - set(written))
    if missing:
        raise ValueError(
            f"{path.name} lacks {', '.join(missing)}; expected what `save_mapper` wrote."
        )
    return written
