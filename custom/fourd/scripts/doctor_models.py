"""Which pretrained models the profiles of a config need, where they are, and fetching them."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from threestudio.utils.hub import hub_cache_folder, why_no_download
from threestudio.utils.pretrained import (
    EMBEDDED_PREFIX,
    ModelUnavailableError,
    RequiredModel,
    find_model,
    model_table,
    require_models,
)

ROOT = Path(__file__).resolve().parents[3]
GB = 1e9
COMMAND = "python -m custom.fourd.scripts.doctor"
_SPARE_BYTES = 0.2 * GB


@dataclass(frozen=True)
class ModelRow:
    """One model that a profile needs.

    Attributes:
        name: as the config names it, or the file.
        parts: what is needed of it; empty for all.
        revision: commit, branch or tag; "" is unverified.
        where: "embedded", "folder", "cache" or "missing".
        folder: where it lies; "" if missing.
        missing_parts: the parts that are not here.
        disk_gb: size of the needed parts on this disk, in 10^9 bytes.
        download_gb: what fetching the missing parts takes; None if configs/models.yaml has no size.
        licence: as configs/models.yaml states it.
        served_by: the repository that answers for a withdrawn id; "" if it is the same.
        remark: what else to know, such as weights that must be converted.
    """

    name: str
    parts: tuple[str, ...]
    revision: str
    where: str
    folder: str
    missing_parts: tuple[str, ...]
    disk_gb: float
    download_gb: float | None
    licence: str
    served_by: str
    remark: str

    @property
    def is_here(self) -> bool:
        return self.where != "missing"

    def required(self, parts: Sequence[str] | None = None) -> RequiredModel:
        """The request for ``parts`` of this model, by default for all that are needed."""
        return RequiredModel(self.name, self.parts if parts is None else parts,
                             self.revision or None)  # fmt: skip


def composed(
    config: Path, profile: str, overrides: Sequence[str] = ()
) -> DictConfig | None:
    """The resolved experiment of a config file under a profile; None if it does not offer it.

    It is merged as a launch merges it; nothing is checked or built.
    """
    from threestudio.launcher.profiles import deltas_of
    from threestudio.utils.config_sources import resolve_config

    source = _source(Path(config).resolve(), tuple(overrides))
    delta = (deltas_of(source.file_cfg, ROOT) or {}).get(profile)
    return None if delta is None else resolve_config(source.merged(delta))


@functools.lru_cache(maxsize=32)
def _source(config: Path, overrides: tuple[str, ...]):
    from threestudio.launcher.stages import Source
    from threestudio.utils.config_sources import load_with_includes, parse_override

    file_cfg = load_with_includes(config, ROOT)
    return Source(config, file_cfg, tuple(parse_override(item) for item in overrides))


def models_of(experiments: Iterable[DictConfig]) -> list[ModelRow]:
    """Return every model that the experiments load, each once, with all parts that are needed."""
    from threestudio.launcher.validate import required_models

    parts: dict[tuple[str, str], dict[str, None]] = {}
    for cfg in experiments:
        for model in required_models(cfg):
            key = str(model), getattr(model, "revision", None) or ""
            parts.setdefault(key, {}).update(dict.fromkeys(getattr(model, "components", ())))
    return [model_row(name, tuple(needed), revision) for (name, revision), needed in parts.items()]


def model_row(name: str, parts: tuple[str, ...], revision: str = "") -> ModelRow:
    """Look for one model, without opening a connection."""
    entry = _table_entry(name)
    missing = [] if _folder_of(name, parts, revision) else list(parts)
    if len(missing) > 1:
        missing = [part for part in parts if not _folder_of(name, (part,), revision)] or missing
    folder = _folder_of(name, parts, revision)
    origin = _origin(name, folder)
    mirrors = model_table("aliases").get(name) or []
    served_by = _repository_of(folder) if folder else (mirrors or [""])[0]
    return ModelRow(
        name=name,
        parts=parts,
        revision=revision,
        where=origin,
        folder=str(folder or ""),
        missing_parts=tuple(missing),
        disk_gb=_size_gb(folder, parts) if folder else 0.0,
        download_gb=0.0 if folder else _download_gb(entry, missing),
        licence=str(entry.get("licence", "unknown")),
        served_by="" if served_by == name else served_by,
        remark="" if folder else _remark(entry),
    )


def fetch(rows: Sequence[ModelRow], say: Callable[[str], None]) -> bool:
    """Download what is missing, model after model; tell whether all is here at the end.

    A model whose download breaks off stays missing, and what came of it is taken up next time.

    Args:
        rows: the models that are needed.
        say: takes each line of progress; the hub's client draws its own bars on stderr.
    """
    missing = [row for row in rows if not row.is_here]
    if not missing:
        say("Nothing to fetch: every model is here.")
        return True
    cause = why_no_download(allow_download=True)
    if cause is not None:
        names = ", ".join(row.served_by or row.name for row in missing)
        say(
            f"Nothing was fetched: {cause}; run this command where there is a network and copy "
            f"{tidy(hub_cache_folder())} here (missing: {names})."
        )
        return False
    return all([_fetch_one(row, say) for row in missing])


def _fetch_one(row: ModelRow, say: Callable[[str], None]) -> bool:
    size = "size unknown" if row.download_gb is None else f"about {row.download_gb:.1f} GB"
    say(f"Fetching {row.served_by or row.name} ({', '.join(row.missing_parts) or 'all'}; {size}) "
        f"into {tidy(hub_cache_folder())}.")  # fmt: skip
    free = free_bytes(hub_cache_folder())
    needed = (row.download_gb or 0.0) * GB
    if needed and free < needed + _SPARE_BYTES:
        say(
            f"Not fetched: {row.name} needs {needed / GB:.1f} GB and {tidy(hub_cache_folder())} "
            f"has {free / GB:.1f} GB free; make room, or set HF_HUB_CACHE to another disk."
        )
        return False
    try:
        require_models([row.required()])
    except (ModelUnavailableError, ValueError) as error:
        say(str(error) + (f" {row.remark}" if row.remark else ""))
        return False
    say(f"{row.name} is here.")
    return True


def free_bytes(folder: Path) -> int:
    """Free space at a folder, or at its nearest parent that exists, in bytes."""
    folder = Path(folder).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def tidy(path: str | Path) -> str:
    """A path to show to others: relative to the project or the home folder where it lies there."""
    text = str(path)
    for base, short in ((ROOT, "."), (Path.home(), "~")):
        if text == str(base) or text.startswith(f"{base}/"):
            return short + text[len(str(base)) :]
    return text


def _folder_of(name: str, parts: tuple[str, ...], revision: str) -> Path | None:
    try:
        return find_model(RequiredModel(name, parts, revision or None))
    except (ModelUnavailableError, ValueError):
        return None


def _origin(name: str, folder: Path | None) -> str:
    if folder is None:
        return "missing"
    if name.startswith(EMBEDDED_PREFIX):
        return "embedded"
    return "cache" if _repository_of(folder) else "folder"


def _repository_of(folder: Path) -> str:
    """The hub id whose snapshot a folder is, "" if it is none; by the cache's layout."""
    for parent in (folder, *folder.parents):
        if parent.name.startswith("models--"):
            return parent.name.removeprefix("models--").replace("--", "/")
    return ""


def _table_entry(name: str) -> dict:
    wanted = {name, *(model_table("aliases").get(name) or [])}
    entries = model_table("models").values()
    if name.startswith(EMBEDDED_PREFIX):
        own = [entry for entry in entries if str(entry.get("id")).startswith(EMBEDDED_PREFIX)]
        return next((entry for entry in own if entry["id"] == name), own[0] if own else {})
    return next((entry for entry in entries if entry.get("id") in wanted), {})


def _download_gb(entry: dict, missing: Sequence[str]) -> float | None:
    by_part = entry.get("files_gb")
    if by_part and missing:
        return round(sum(float(by_part.get(part, 0.0)) for part in missing), 2)
    size = entry.get("size_gb")
    return None if size is None else float(size)


def _remark(entry: dict) -> str:
    if (entry.get("original") or {}).get("kind") != "diffusers":
        return ""
    return (
        f"Its weights are pickles, which are never read: `hf download {entry['id']}`, then `python "
        "-m custom.fourd.scripts.convert_checkpoint --kind diffusers FOLDER TARGET`, and set "
        "pretrained_model_name_or_path to TARGET."
    )


def _size_gb(folder: Path, parts: Sequence[str]) -> float:
    if folder.is_file():
        return folder.stat().st_size / GB
    tops = [folder / part for part in parts] or [folder]
    files = {path for top in tops for path in top.rglob("*") if path.is_file()}
    return sum(path.stat().st_size for path in files) / GB
