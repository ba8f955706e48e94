"""Checkpoint files: written so that nothing is lost, read so that nothing is executed.

A file appears under its name only when all of its bytes are on the disk: it is written beside its
place, flushed, renamed, and the folder is flushed. Beside ``<name>`` stands ``<name>.sha256`` with
the hash of its content. While a file is being replaced the hash file lists both the new and the
old hash, so whichever of the two a crash leaves behind is still recognised.

Reading checks the hash, then unpickles with ``weights_only=True`` and an allow-list of OmegaConf's
containers, which old checkpoints hold (`foreign_checkpoint`). There is no way to load anything
else.
"""

import collections
import errno
import hashlib
import os
import pickle
import re
import secrets
import shutil
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor

from threestudio.logs import warn
from threestudio.utils.foreign_checkpoint import allowed_globals, upstream_classes

_STEP_NAME = re.compile(r"epoch=\d+-step=(\d+)(?:-v\d+)?\.ckpt")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_TRANSIENT = (errno.EIO, getattr(errno, "ESTALE", errno.EIO))
_SCALARS = (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device)


# Writing


def save_checkpoint(path: str | Path, payload: Mapping[str, Any]) -> None:
    """Write ``payload`` to ``path`` atomically, with its hash in ``<path>.sha256``.

    An existing file of that name stays intact and loadable until the new one is complete. A
    transient fault of a network file system (EIO, ESTALE) is retried once.

    Args:
        path: where to; the folder is made if needed.
        payload: nested dicts, lists and tuples of tensors, numbers, strings and None. OmegaConf
            containers, NumPy scalars and paths are turned into plain ones.

    Raises:
        TypeError: something else is in the payload; its place is named.
        OSError: the disk is full, or the folder cannot be written; nothing was replaced.
    """
    path = Path(path)
    plain = to_plain(payload)

    def write(file: BinaryIO | _HashingWriter) -> None:
        torch.save(plain, file)

    for attempt in (1, 2):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_hashed(path, write)
            return
        except OSError as error:
            if error.errno in _TRANSIENT and attempt == 1:
                time.sleep(0.1)
                continue
            raise _explained(error, path) from error


def link_checkpoint(source: str | Path, target: str | Path) -> None:
    """Make ``target`` the same checkpoint as ``source``, by a hard link where that is possible.

    Replaces ``target`` atomically; neither name is ever without a complete file.
    """
    source, target = Path(source), Path(target)
    temporary = _temporary_name(target)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        _replace(temporary, target, _listed_hashes(source)[0])
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _explained(error, target) from error


def remove_checkpoint(path: str | Path) -> None:
    """Delete a checkpoint and its hash; one that is gone already is fine."""
    path = Path(path)
    path.unlink(missing_ok=True)
    hash_path(path).unlink(missing_ok=True)


def sweep_leftovers(folder: str | Path) -> list[Path]:
    """Delete what an interrupted save left in ``folder``; call only while nobody saves there.

    Returns:
        The deleted files: temporary files, and hashes of checkpoints that never came to be.
    """
    swept = []
    for path in sorted(Path(folder).glob("*")) + sorted(Path(folder).glob(".*.tmp")):
        orphan = path.name.endswith(".ckpt.sha256") and not path.with_suffix("").exists()
        if orphan or _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)
            swept.append(path)
    return swept


def hash_path(path: str | Path) -> Path:
    """Name of the file that holds the hash of ``path``."""
    path = Path(path)
    return path.with_name(path.name + ".sha256")


def to_plain(value: Any, place: str = "") -> Any:
    """Return ``value`` with plain containers and scalars only; see `save_checkpoint`.

    Raises:
        TypeError: a part is neither plain nor a tensor.
    """
    if isinstance(value, (DictConfig, ListConfig)):
        return OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        kind = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
        return kind(
            (_plain_key(key, place), to_plain(item, f"{place}.{key}" if place else str(key)))
            for key, item in value.items()
        )
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [to_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
        # A named tuple is a class of its own, which the reader would have to know.
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value) in _SCALARS or isinstance(value, (torch.dtype, torch.device)):
        return value
    for base in (bool, int, float, str):
        if isinstance(value, base):
            return base(value)
    raise TypeError(
        f"checkpoint entry {place or 'payload'} is a {type(value).__qualname__}; expected tensors, "
        "numbers, strings, None, or lists, tuples and dicts of them. Store its plain state."
    )


class _HashingWriter:
    """A binary file that hashes what passes through; torch writes sequentially to it.

    torch answers a failed write with a RuntimeError about its own archive, so the cause is kept.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.fault: OSError | None = None

    def write(self, data) -> int:
        self.sha256.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.fault = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _write_hashed(path: Path, write) -> None:
    temporary = _temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            hashing = _HashingWriter(file)
            try:
                write(hashing)
            except RuntimeError:
                if hashing.fault is None:
                    raise
                raise hashing.fault from None
            file.flush()
            os.fsync(file.fileno())
        _replace(temporary, path, hashing.sha256.hexdigest())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _replace(temporary: Path, path: Path, digest: str) -> None:
    """Rename ``temporary`` to ``path``, with a hash file that is right before and after."""
    old = _listed_hashes(path) if path.exists() else []
    if path.exists() and len(old) != 1:
        # No hash, or two after an earlier interruption: only the file itself knows which is its.
        old = [_hash_of(path)]
    _write_small(hash_path(path), [digest, *old])
    os.replace(temporary, path)
    _sync_folder(path.parent)
    if old:
        _write_small(hash_path(path), [digest])


def _hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_small(path: Path, lines: list[str]) -> None:
    temporary = _temporary_name(path)
    try:
        with open(temporary, "x", encoding="ascii") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, getattr(errno, "ENOTSUP", errno.EINVAL)):
            raise
    finally:
        os.close(descriptor)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _explained(error: OSError, path: Path) -> OSError:
    try:
        free = f"{shutil.disk_usage(path.parent).free / 2**20:.0f} MiB free"
    except OSError:
        free = "folder not reachable"
    return OSError(
        error.errno,
        f"cannot write checkpoint {path}: {error.strerror or error} ({free}). "
        "Free space or make the folder writable; an earlier checkpoint there is untouched",
    )


def _plain_key(key: Any, place: str) -> Any:
    if type(key) in (str, int, float, bool, type(None), tuple):
        return key
    if isinstance(key, (str, int)):
        return str(key) if isinstance(key, str) else int(key)
    raise TypeError(
        f"checkpoint entry {place or 'payload'} has a key of type {type(key).__qualname__}; "
        "expected a string or a number."
    )


# Reading


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint, after its hash was checked, without executing anything in it.

    A file without a hash beside it (another program's) is checked by its own checksums.

    Args:
        path: the file.
        map_location: device of the tensors, as for `torch.load`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, truncated, changed, holds code, or is no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist. Check the path.")
    if path.is_dir():
        raise ValueError(f"checkpoint {path} is a folder; expected a .ckpt file inside it.")
    with open(path, "rb") as file:
        _check_content(file, path)
        file.seek(0)
        payload = _unpickle(file, path, map_location)
    if not isinstance(payload, Mapping):
        raise ValueError(
            f"checkpoint {path} holds a {type(payload).__name__}; expected a dict of entries."
        )
    return _without_omegaconf(payload)


def find_newest_checkpoint(folder: str | Path) -> Path:
    """Return the newest checkpoint in ``folder`` that can be read.

    ``folder`` is a ``ckpts`` folder or the output folder of a run. Damaged files are passed over
    with one line that names them and the one used. "Newest" goes by the step in the name, and in
    the file for ``last.ckpt``, never by time stamps.

    Raises:
        FileNotFoundError: there is none; damaged ones are listed with their faults.
    """
    folder = Path(folder)
    if (folder / "ckpts").is_dir():
        folder = folder / "ckpts"
    faults = []
    for path in _newest_first(folder, faults):
        try:
            load_checkpoint(path)
        except (ValueError, OSError) as error:
            faults.append((path, str(error)))
            continue
        if faults:
            names = ", ".join(fault[0].name for fault in faults)
            warn("%s; using %s instead of %s.", faults[0][1].rstrip("."), path, names)
        return path
    if faults:
        listed = " ".join(fault[1] for fault in faults)
        raise FileNotFoundError(f"no readable checkpoint in {folder}: {listed}")
    raise FileNotFoundError(
        f"no checkpoint in {folder}; expected last.ckpt or epoch=0-step=N.ckpt."
    )


def step_of_name(path: str | Path) -> int | None:
    """Step in a name of the form ``epoch=0-step=N.ckpt``, else None."""
    found = _STEP_NAME.fullmatch(Path(path).name)
    return int(found.group(1)) if found else None


def _newest_first(folder: Path, faults: list) -> list[Path]:
    """Candidates by falling step; ``last.ckpt`` is left out where it repeats another file."""
    ranked = [
        (step, path) for path in folder.glob("*.ckpt") if (step := step_of_name(path)) is not None
    ]
    last = folder / "last.ckpt"
    if last.is_file():
        twins = [step for step, path in ranked if _same_content(path, last)]
        try:
            step = twins[0] if twins else int(load_checkpoint(last).get("global_step", 0))
            ranked.append((step, last))
        except (ValueError, OSError) as error:
            faults.append((last, str(error)))
    # Names break ties: "last.ckpt" sorts after "epoch=...", hence first when reversed.
    return [path for _, path in sorted(ranked, key=lambda item: (item[0], item[1].name))[::-1]]


def _same_content(first: Path, second: Path) -> bool:
    if os.path.samefile(first, second):
        return True
    hashes = _listed_hashes(first)
    return bool(hashes) and hashes == _listed_hashes(second)


def _check_content(file: BinaryIO, path: Path) -> None:
    if os.fstat(file.fileno()).st_size == 0:
        raise ValueError(f"checkpoint {path} is empty; the disk was full or the copy was cut off.")
    expected = _listed_hashes(path)
    if not expected:
        _check_archive(file, path)
        return
    actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual in expected:
        return
    # The writer may have replaced file and hash between our two reads.
    if actual in _listed_hashes(path):
        return
    raise ValueError(
        f"checkpoint {path} is damaged: its SHA-256 is {actual[:12]}..., expected "
        f"{expected[0][:12]}...; it was truncated or changed after it was written."
    )


def _check_archive(file: BinaryIO, path: Path) -> None:
    """Check the checksums inside a file that has no hash beside it, if it is a zip archive."""
    file.seek(0)
    if file.read(2) != b"PK":
        return
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"checkpoint {path} is truncated or damaged ({error}).") from error
    if bad is not None:
        raise ValueError(f"checkpoint {path} is damaged: the checksum of {bad} does not match.")


def _listed_hashes(path: Path) -> list[str]:
    try:
        text = hash_path(path).read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return []
    return [line.split()[0] for line in text.splitlines() if line.strip()]


def _unpickle(file: BinaryIO, path: Path, map_location: Any) -> Any:
    try:
        names = [*allowed_globals(), *upstream_classes(file)]
        with torch.serialization.safe_globals(names):
            return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({named.group(1)})" if named else ""
        raise ValueError(
            f"checkpoint {path} is refused: it holds something other than tensors and plain "
            f"values{what}, which could run code when loaded. Ask its author for a "
            "checkpoint with tensors and plain values only."
        ) from error
    except Exception as error:
        # torch reports damage as any of EOFError, RuntimeError, OSError, KeyError, ValueError
        # and others, depending on where the file was cut; all of them mean one thing here.
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"checkpoint {path} is truncated, damaged or no checkpoint ({first_line[:120]})."
        ) from error


def _without_omegaconf(value: Any) -> Any:
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=False)
    if isinstance(value, dict):
        for key, item in value.items():
            value[key] = _without_omegaconf(item)
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_without_omegaconf(item) for item in value)
    return value


def __getattr__(name: str) -> Any:
    # These two need Lightning, which takes seconds to import and which readers do not need.
    if name in ("AtomicCheckpointIO", "CheckpointSchedule"):
        from threestudio.utils import checkpoint_schedule

        return getattr(checkpoint_schedule, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
