"""The frames of a scene while they are edited: originals that never change, and edits over them.

Every item's result lies on disk before it shows in memory: one file, written whole or not at all,
then one line in a journal. A process that is killed and starts again finds the same results.

Legend: n frames of h x w pixels, r rows of them. Edits are kept with 16 bits, finer than 8-bit
colours, and are the same in memory and on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import threestudio
import torch
from jaxtyping import Float, Int
from torch import Tensor

from custom.fourd.data.video_scene import VideoScene

JOURNAL, ITEMS = "journal.jsonl", "items"
FORMAT = 1


@dataclass(frozen=True)
class StoredItem:
    """A line of the journal: what an item wrote."""

    item: str
    step: int
    """training step at which it was first shown"""
    rows: tuple[int, ...]
    """rows of the scene"""
    sha256: str


class EditBuffer:
    """Edited frames over originals, safe for one reader and one writer at a time.

    Reads return copies, so that nobody holds a view of what changes later.

    Args:
        scene: the originals; never written.
        folder: where results are kept; None keeps them in memory alone.
        identity: what decides the edits, as plain values; a folder of another edit is refused.
        writes: whether this process writes to the folder; of several, one does.

    Attributes:
        version: [n], how often each frame was edited.
        edited_at_step: [n], the training step of its last edit, -1 before the first.

    Raises:
        ValueError: the folder holds the edits of another scene, instruction or model.
    """

    def __init__(
        self,
        scene: VideoScene,
        folder: str | Path | None = None,
        identity: Mapping[str, Any] | None = None,
        writes: bool = True,
    ) -> None:
        self.scene, self.writes = scene, writes
        self.folder = None if folder is None else Path(folder)
        self.identity = dict(identity or {})
        self.version = torch.zeros(len(scene), dtype=torch.int64)
        self.edited_at_step = torch.full((len(scene),), -1, dtype=torch.int64)
        self._edited = torch.zeros(scene.frames.shape, dtype=torch.float16)
        self._results: dict[str, Tensor] = {}
        self._journal: dict[str, StoredItem] = {}
        self._lock = threading.RLock()
        if self.folder is not None:
            self._open()

    # Reading

    def original(self, rows: Sequence[int]) -> Float[Tensor, "r h w 3"]:
        """Frames before any edit, in [0, 1]."""
        return self.scene.frames[list(rows)].float() / 255

    def current(self, rows: Sequence[int]) -> Float[Tensor, "r h w 3"]:
        """Frames as they stand, in [0, 1]: edited, or the originals where they are not yet."""
        rows = list(rows)
        with self._lock:
            edited = self._edited[rows].float()
            is_edited = self.version[rows] > 0
        return torch.where(is_edited.view(-1, 1, 1, 1), edited, self.original(rows))

    def colors(self, rows: Int[Tensor, "p"], pixels: Int[Tensor, "p 2"]) -> Float[Tensor, "p 3"]:
        """Colours of single pixels as they stand, in [0, 1].

        Args:
            rows: rows of the scene.
            pixels: (column, row) in them.
        """
        rows, (x, y) = rows.cpu(), pixels.cpu().unbind(dim=-1)
        with self._lock:
            edited = self._edited[rows, y, x].float()
            is_edited = self.version[rows] > 0
        original = self.scene.frames[rows, y, x].float() / 255
        return torch.where(is_edited.unsqueeze(-1), edited, original)

    def result(self, item: str, row: int) -> Float[Tensor, "h w 3"]:
        """What an item made of a frame, whatever was written since.

        Raises:
            ValueError: the item is not done, did not write that frame, or its file is damaged.
        """
        entry = self._journal.get(item)
        if entry is None or row not in entry.rows:
            raise ValueError(
                f"item {item} has no result for row {row}; expected one that is done, and that "
                "writes this frame. Items must run in the order of the plan."
            )
        images = self.stored(item)
        if images is None:
            raise ValueError(
                f"the result of {item} in {self.folder} is missing or damaged; it is needed as an "
                "anchor. Start the edit anew."
            )
        return images[entry.rows.index(row)].float()

    def stored(self, item: str) -> Tensor | None:
        """The result of an item that is in the journal, in 16 bits; None without, or if damaged."""
        entry = self._journal.get(item)
        if entry is None:
            return None
        if self.folder is None:
            return self._results[item].clone()
        return self._read(entry)

    def rows_of(self, item: str) -> tuple[int, ...] | None:
        """The rows that an item of the journal writes; None if it is not there."""
        entry = self._journal.get(item)
        return None if entry is None else entry.rows

    def journal(self) -> tuple[StoredItem, ...]:
        """Everything on disk, in the order in which it was done."""
        return tuple(self._journal.values())

    def edited_fraction(self, rows: Sequence[int]) -> float:
        """Share of some frames that were edited at least once."""
        rows = list(rows)
        return float((self.version[rows] > 0).float().mean()) if rows else 1.0

    # Writing

    def commit(
        self, item: str, rows: Sequence[int], images: Float[Tensor, "r h w 3"], step: int
    ) -> None:
        """Keep an item's result and show it.

        Args:
            item: its id; one that is in the journal is shown, not written again.
            rows: rows of the scene, each once.
            images: new content in [0, 1].
            step: the training step at which it shows.

        Raises:
            ValueError: shapes do not fit, or values are not finite.
            OSError: it cannot be written; nothing shows then.
        """
        rows = tuple(int(row) for row in rows)
        expected = (len(rows), *self.scene.frames.shape[1:])
        if tuple(images.shape) != expected or len(set(rows)) < len(rows):
            raise ValueError(
                f"{item} brings images of shape {tuple(images.shape)} for rows {rows}; expected "
                f"{expected}, each row once."
            )
        if not bool(torch.isfinite(images).all()):
            raise ValueError(
                f"{item} brought NaN or infinite colours; the edit model overflowed. On CUDA set "
                "system.guidance.half_precision_weights=false."
            )
        images = images.detach().cpu().clamp(0, 1).to(torch.float16)
        if item not in self._journal:
            self._keep(item, rows, images, step)
        with self._lock:
            self._edited[list(rows)] = images
            self.version[list(rows)] += 1
            self.edited_at_step[list(rows)] = step

    def show(self, item: str, step: int) -> bool:
        """Show an item's result from disk; False if there is none, or it is damaged."""
        images = self.stored(item)
        if images is None:
            self._journal.pop(item, None)
            return False
        self.commit(item, self._journal[item].rows, images.float(), step)
        return True

    def _keep(self, item: str, rows: tuple[int, ...], images: Tensor, step: int) -> None:
        data = images.contiguous().numpy()
        entry = StoredItem(item, int(step), rows, hashlib.sha256(data.tobytes()).hexdigest())
        if self.folder is None:
            self._results[item] = images.clone()
        elif self.writes:
            path = self._path(item)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            with open(part, "wb") as file:
                np.save(file, data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            self._append({"item": item, "step": entry.step, "rows": rows, "sha256": entry.sha256})
        self._journal[item] = entry

    # Files

    def _path(self, item: str) -> Path:
        return self.folder / ITEMS / f"{item.replace('/', '-')}.npy"

    def _append(self, line: Mapping[str, Any]) -> None:
        with open(self.folder / JOURNAL, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, entry: StoredItem) -> Tensor | None:
        path = self._path(entry.item)
        try:
            data = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            threestudio.warn("%s is missing or damaged (%s).", path, error)
            return None
        if hashlib.sha256(data.tobytes()).hexdigest() != entry.sha256:
            threestudio.warn("%s is damaged: it is not what the journal says.", path)
            return None
        return torch.from_numpy(data)

    def _open(self) -> None:
        """Read the journal, and begin one where there is none."""
        path = self.folder / JOURNAL
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        # A line without its end was being written when the process died.
        whole, torn = lines[:-1], lines[-1:] != [""] and bool(lines)
        if torn and self.writes:
            self._truncate(path, whole)
        if not whole:
            if self.writes:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._append({"format": FORMAT, **self.identity})
            return
        self._check_identity(_parsed(path, whole[0]))
        for line in whole[1:]:
            entry = _parsed(path, line)
            rows = tuple(entry["rows"])
            self._journal[entry["item"]] = StoredItem(
                entry["item"], entry["step"], rows, entry["sha256"]
            )

    def _truncate(self, path: Path, lines: list[str]) -> None:
        part = path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(part, path)

    def _check_identity(self, found: Mapping[str, Any]) -> None:
        expected = json.loads(json.dumps({"format": FORMAT, **self.identity}))
        names = [key for key in {**found, **expected} if found.get(key) != expected.get(key)]
        if names:
            told = "; ".join(
                f"{key}: {found.get(key)!r}, now {expected.get(key)!r}" for key in names
            )
            raise ValueError(
                f"{self.folder} holds the edits of another run ({told}); expected the same. "
                "Resume with the same keys, or start a new edit from system.weights."
            )


def _parsed(path: Path, line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged ({error}); the edits cannot be continued. Start a new edit."
        ) from error


def adopt_edits(source: Path, target: Path) -> None:
    """Link the edits of one folder into another, which does not exist yet.

    Nothing of the source changes: files are linked (copied where that is impossible), the journal
    is copied, and neither run writes to a file that exists.
    """
    import shutil

    part = target.with_name(f".{target.name}-{os.getpid()}.part")
    shutil.copytree(source, part, copy_function=_link)
    journal = part / JOURNAL
    text = journal.read_bytes()
    journal.unlink()
    journal.write_bytes(text)
    os.rename(part, target)


def _link(source: str, target: str) -> None:
    import shutil

    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
