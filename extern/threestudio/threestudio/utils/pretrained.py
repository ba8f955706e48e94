"""Where a pretrained model is: a local folder, the hub's cache on this disk, the hub, or embedded.

A model is named by one string, in this order of meaning:

- ``embedded://name``: a checkpoint that an extension ships, below a root it registered;
- a folder that exists;
- ``owner/name``: an id of the Hugging Face hub, read from the cache, else downloaded.

Ids that their publishers withdrew are answered by mirrors from a table (``configs/models.yaml``).
Whatever cannot be had ends in one sentence within seconds: the network is probed before the hub's
own client, with its long retries, is allowed to try (`threestudio.utils.hub`).
"""

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import threestudio
from threestudio.utils.hub import cached_snapshot, download, hub_cache_folder, why_no_download

EMBEDDED_PREFIX = "embedded://"
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors$")
_STANDARD_COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_FACTS = ("model_index.json", "multiview.json")
_SMALL = ("*.json", "*.txt")
_COMPONENTS_WITHOUT_WEIGHTS = ("scheduler", "tokenizer")

_embedded_roots: list[Path] = []
_table_paths: list[Path] = []
_announced: set[str] = set()
_doctors: list[str] = []


class ModelUnavailableError(FileNotFoundError):
    """A pretrained model is not on this disk and cannot be fetched; the message is one sentence."""


class RequiredModel(str):
    """The name of a model that a run needs, with which part of it; prints as the name."""

    components: tuple[str, ...]
    """Parts that are needed ("unet", ...); none means all that the folder has."""
    revision: str | None
    """Commit of a hub id."""

    def __new__(
        cls, name: str, components: Sequence[str] = (), revision: str | None = None
    ) -> "RequiredModel":
        """Return ``name`` with what is needed of it."""
        required = super().__new__(cls, name)
        required.components, required.revision = tuple(components), revision
        return required

    def __eq__(self, other: object) -> bool:
        """Tell requests of different parts of one model apart; equal a plain name."""
        if isinstance(other, RequiredModel):
            mine, theirs = (self.components, self.revision), (other.components, other.revision)
            return str.__eq__(self, other) and mine == theirs
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        """Tell the opposite; `str` defines its own."""
        return not self == other

    __hash__ = str.__hash__


def register_embedded_root(path: str | os.PathLike) -> None:
    """Make ``embedded://name`` look for the folder ``path/name``; called by an extension."""
    if Path(path) not in _embedded_roots:
        _embedded_roots.append(Path(path))


def register_model_table(path: str | os.PathLike) -> None:
    """Add a table like ``configs/models.yaml``; it is read when an id is first looked up."""
    if Path(path) not in _table_paths:
        _table_paths.append(Path(path))


def register_doctor(command: str) -> None:
    """Name a command that lists and fetches models; the sentence about a missing one points there.

    Called by an extension. Without one the sentence stays as it is.
    """
    _doctors[:] = [command]


def model_table(section: str) -> dict[str, Any]:
    """Return one section, such as "aliases" or "model_names", of all registered tables, merged."""
    merged: dict[str, Any] = {}
    for path in _table_paths:
        if path.is_file():
            merged.update(_read_table(path, path.stat().st_mtime_ns).get(section) or {})
    return merged


@functools.lru_cache(maxsize=16)
def _read_table(path: Path, mtime_ns: int) -> dict[str, Any]:
    """One table, read again only when its file has changed; callers leave it as it is."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(path)) or {}


def resolve_pretrained(
    name_or_path: str | os.PathLike,
    revision: str | None = None,
    subfolder: str | None = None,
    components: Sequence[str] = (),
    aliases: Mapping[str, Sequence[str]] | None = None,
    allow_download: bool = True,
) -> Path:
    """Return the local folder of a model, downloading it from the hub when that is needed.

    Args:
        name_or_path: ``embedded://name``, a folder, or a hub id.
        revision: commit, branch or tag of a hub id; None is the default branch, unverified.
        subfolder: part of the folder to return.
        components: parts that must be there ("unet", "vae", ...); only these are downloaded. "."
            is a model that lies at the root by itself.
        aliases: withdrawn id -> mirrors, best first; None takes the registered tables.
        allow_download: False looks on this disk only and opens no connection.

    Raises:
        ModelUnavailableError: with the name, the cause and the two ways to get the model.
        ValueError: if ``name_or_path`` is none of the three forms.
    """
    name = os.fspath(name_or_path)
    if name.startswith(EMBEDDED_PREFIX):
        root = _embedded_folder(name)
    elif Path(name).expanduser().is_dir():
        root = Path(name).expanduser()
    elif _HUB_ID.match(name):
        known = model_table("aliases") if aliases is None else aliases
        root = _hub_folder(name, revision, components, known, allow_download)
    elif os.sep in name or name.startswith((".", "~")):
        raise ModelUnavailableError(
            f"The model folder '{name}' does not exist; give an existing diffusers folder, or a "
            "hub id such as 'owner/name'."
        )
    else:
        raise ValueError(
            f"'{name}' names no model; expected a local diffusers folder, a hub id such as "
            "'owner/name', or 'embedded://name'."
        )
    missing = missing_parts(root, components)
    pickles = [p for c in components for p in sorted((root / c).glob("*.bin"))]
    if missing and pickles:
        raise ModelUnavailableError(
            f"The model '{name}' in {root} lacks {', '.join(missing)} and holds the pickle "
            f"{pickles[0].name}, which is never read; fetch the safetensors version, or convert it "
            "once in an environment that you trust."
        )
    if missing:
        raise ModelUnavailableError(
            f"The model '{name}' in {root} lacks {', '.join(missing)}; fetch it again, or give a "
            "complete diffusers folder."
        )
    return root / subfolder if subfolder else root


def resolve_checkpoint_file(
    name_or_path: str | os.PathLike, revision: str | None = None, allow_download: bool = True
) -> Path:
    """Return a single weights file.

    Args:
        name_or_path: a path, ``owner/name/[folder/]file.ext`` on the hub, or
            ``embedded://name/[folder/]file.ext``.

    Raises:
        ModelUnavailableError: if there is no such file here and it cannot be fetched.
        ValueError: if the name does not end like a weights file.
    """
    name = os.fspath(name_or_path)
    if not name.endswith(WEIGHT_SUFFIXES):
        raise ValueError(
            f"'{name}' does not look like a weights file; expected one of the endings "
            f"{', '.join(WEIGHT_SUFFIXES)}."
        )
    if name.startswith(EMBEDDED_PREFIX):
        folder, _, filename = name.rpartition("/")
        path = _embedded_folder(folder) / filename
        if not path.is_file():
            raise ModelUnavailableError(f"The embedded model '{folder}' holds no file {filename}.")
        return path
    path = Path(name).expanduser()
    if path.is_file():
        return path
    owner, _, rest = name.partition("/")
    repository, _, filename = rest.partition("/")
    owner_and_repository = f"{owner}/{repository}" if filename else ""
    if not _HUB_ID.match(owner_and_repository):
        raise ModelUnavailableError(
            f"The weights file '{name}' does not exist; give an existing file, or "
            "'owner/name/file.pt' for a file on the hub."
        )
    cached = cached_snapshot(owner_and_repository, revision)
    if cached is not None and (cached / filename).is_file():
        return cached / filename
    cause = why_no_download(allow_download)
    if cause is None:
        cause = download(owner_and_repository, revision, [filename])
    cached = cached_snapshot(owner_and_repository, revision)
    if cause is None and cached is not None and (cached / filename).is_file():
        return cached / filename
    raise _unavailable(name, owner_and_repository, cause or f"it holds no file {filename}")


def models_available(names: Iterable[str]) -> dict[str, bool]:
    """Tell for each model whether it is on this disk, without opening a connection."""
    available: dict[str, bool] = {}
    for name in names:
        try:
            _resolve_required(name, allow_download=False)
        except (ModelUnavailableError, ValueError):
            available[str(name)] = False
        else:
            available.setdefault(str(name), True)
    return available


def find_model(name: str) -> Path:
    """Return where a model lies on this disk, without opening a connection.

    Args:
        name: as ``required_models(cfg)`` lists it.

    Raises:
        ModelUnavailableError: if it, or a part that is needed, is not here.
        ValueError: if it names no model.
    """
    return _resolve_required(name, allow_download=False)


def require_models(names: Iterable[str]) -> None:
    """Resolve every model, so that a missing one stops a run before any other work.

    Args:
        names: what ``required_models(cfg)`` of guidance and prompt processor classes lists.

    Raises:
        ModelUnavailableError: for the first model that cannot be had.
    """
    for name in names:
        _resolve_required(name, allow_download=True)


def missing_parts(root: Path, components: Sequence[str]) -> list[str]:
    """List the files that ``components`` need and the folder lacks; pickles do not count."""
    missing = []
    for component in components:
        folder = root / component
        if component == "scheduler":
            required = [folder / "scheduler_config.json"]
        elif component == "tokenizer":
            required = [folder / "tokenizer_config.json"]
        else:
            required = [folder / "config.json"]
        missing += [f"{component}/{path.name}" for path in required if not path.is_file()]
        if component not in _COMPONENTS_WITHOUT_WEIGHTS:
            missing += [f"{component}/{name}" for name in _missing_weights(folder)]
    return missing


def _missing_weights(folder: Path) -> list[str]:
    """List what lacks of one whole copy of the weights; of several shards all must be there."""
    names = [path.name for path in folder.glob("*.safetensors") if path.is_file()]
    shards = [found for name in names if (found := _SHARD.match(name))]
    if not names or len(shards) < len(names):
        return [] if names else ["*.safetensors"]
    copies: dict[tuple[str, str], list[str]] = {}
    for shard in shards:
        copies.setdefault((shard["stem"], shard["count"]), []).append(shard["number"])
    lacking = [
        f"{stem}-{number:05d}-of-{count}.safetensors"
        for (stem, count), present in copies.items()
        for number in range(1, int(count) + 1)
        if number not in map(int, present)
    ]
    whole = any(len(present) == int(count) for (_, count), present in copies.items())
    return [] if whole else lacking


def _resolve_required(name: str, allow_download: bool) -> Path:
    revision = getattr(name, "revision", None)
    if name.endswith(WEIGHT_SUFFIXES):
        return resolve_checkpoint_file(name, revision, allow_download)
    components = getattr(name, "components", ())
    return resolve_pretrained(
        str(name), revision, components=components, allow_download=allow_download
    )


def _embedded_folder(name: str) -> Path:
    relative = name.removeprefix(EMBEDDED_PREFIX)
    if not relative or ".." in Path(relative).parts or Path(relative).is_absolute():
        raise ValueError(f"'{name}' names no embedded model; expected 'embedded://name'.")
    for root in _embedded_roots:
        if (root / relative).is_dir():
            return root / relative
    known = sorted(f"{EMBEDDED_PREFIX}{p.name}" for r in _embedded_roots for p in r.glob("*/"))
    raise ModelUnavailableError(
        f"There is no embedded model '{name}'; the installed extensions ship "
        f"{', '.join(known) or 'none'}."
    )


def _hub_folder(
    name: str,
    revision: str | None,
    components: Sequence[str],
    aliases: Mapping[str, Sequence[str]],
    allow_download: bool,
) -> Path:
    mirrors = list(aliases.get(name, ()))
    # A copy of the withdrawn original that is still in the cache is as good as its mirror. A
    # revision is a commit of the original's repository, so it never applies to a mirror.
    for candidate in [name, *mirrors]:
        own_revision = revision if candidate == name else None
        cached = cached_snapshot(candidate, own_revision)
        if cached is not None and _is_complete(cached, components):
            if allow_download:
                _warn_unverified(candidate, own_revision)
                _announce_mirror(name, candidate)
            return cached
    cause = why_no_download(allow_download)
    if cause is not None:
        raise _unavailable(name, (mirrors or [name])[0], cause)
    causes = []
    for candidate in mirrors or [name]:
        own_revision = revision if candidate == name else None
        _warn_unverified(candidate, own_revision)
        for patterns in _download_patterns(components):
            cause = download(candidate, own_revision, patterns)
            cached = cached_snapshot(candidate, own_revision)
            if cause is None and cached is not None and _is_complete(cached, components):
                _announce_mirror(name, candidate)
                return cached
            if cause is not None:
                break  # it broke off; that these names brought nothing means nothing then
        causes.append(f"{candidate}: {cause or 'it holds no complete safetensors model'}")
    raise _unavailable(name, (mirrors or [name])[0], "; ".join(causes))


def _is_complete(root: Path, components: Sequence[str]) -> bool:
    parts = components or _listed_components(root)
    return bool(parts) and not missing_parts(root, parts)


def _listed_components(root: Path) -> list[str]:
    """The parts that the folder's own index lists; without one, those that are there."""
    present = [part for part in _STANDARD_COMPONENTS if (root / part).is_dir()]
    try:
        index = json.loads((root / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return present
    listed = [part for part in _STANDARD_COMPONENTS if part in index]
    return listed or present


def _download_patterns(components: Sequence[str]) -> list[list[str]]:
    """Return file patterns to download, and the ones to try where those bring no weights."""
    # Repositories of this family hold each weight up to four times; these names are one copy.
    plain = ["diffusion_pytorch_model.safetensors", "model.safetensors", "*-of-*.safetensors"]
    half = ["*.fp16.safetensors", "*.fp16-*-of-*.safetensors"]
    folders = components or _STANDARD_COMPONENTS
    return [
        [
            *_FACTS,
            *(
                # A repository may be a single component, at its root.
                name if folder == "." else f"{folder}/{name}"
                for folder in folders
                for name in [*_SMALL, *weights]
            ),
        ]
        for weights in (plain, half)
    ]


def _unavailable(name: str, wanted: str, cause: str) -> ModelUnavailableError:
    mirror = "" if wanted == name else f" (withdrawn by its publisher, mirrored as '{wanted}')"
    doctor = f"; `{_doctors[0]}` shows what else is missing" if _doctors else ""
    return ModelUnavailableError(
        f"Model '{name}'{mirror} is not on this disk and cannot be fetched: {cause}; either run "
        f"`hf download {wanted}` where there is a network (and copy the cache, {hub_cache_folder()}"
        f", here), or set pretrained_model_name_or_path to a local diffusers folder{doctor}."
    )


def _announce_mirror(name: str, candidate: str) -> None:
    if candidate != name and name not in _announced:
        _announced.add(name)
        threestudio.info(
            f"'{name}' was withdrawn by its publisher; using the mirror '{candidate}' "
            "(configs/models.yaml, aliases)."
        )


def _warn_unverified(hub_id: str, revision: str | None) -> None:
    if revision is None and hub_id not in _announced:
        _announced.add(hub_id)
        threestudio.warn(
            f"'{hub_id}' is used without a pinned revision, so what the hub serves is unverified "
            "(safetensors only); set `revision` to a commit to pin it."
        )
