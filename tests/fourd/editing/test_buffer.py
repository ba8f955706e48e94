"""The buffer: originals stay, copies are handed out, results survive being killed."""

import json
import os
import shutil

import pytest
import torch

from custom.fourd.editing.buffer import EditBuffer, adopt_edits
from tests.fixtures.edited_scenes import SIZE, hand_made_scene


@pytest.fixture
def scene():
    return hand_made_scene()


def painted(value, count=1):
    return torch.full((count, SIZE, SIZE, 3), value)


def test_originals_never_change_and_reads_are_copies(scene):
    buffer = EditBuffer(scene)
    before = scene.frames.clone()
    assert torch.equal(buffer.current([3]), before[3:4].float() / 255), "nothing is edited yet"
    buffer.commit("a", [3], painted(0.25), 7)
    assert torch.equal(buffer.current([3]), painted(0.25))
    assert torch.equal(scene.frames, before) and torch.equal(
        buffer.original([3]), before[3:4].float() / 255
    )
    for read in (buffer.current, buffer.original):
        read([3]).fill_(9.0)
    buffer.stored("a").fill_(9.0)
    buffer.result("a", 3).fill_(9.0)
    assert torch.equal(buffer.current([3]), painted(0.25)) and torch.equal(scene.frames, before)
    assert torch.equal(buffer.result("a", 3), painted(0.25)[0])


def test_versions_and_steps_by_frame(scene):
    buffer = EditBuffer(scene)
    buffer.commit("a", [1, 2], painted(0.5, 2), 0)
    buffer.commit("b", [2], painted(0.75), 30)
    assert buffer.version[:4].tolist() == [0, 1, 2, 0]
    assert buffer.edited_at_step[:4].tolist() == [-1, 0, 30, -1]
    assert buffer.edited_fraction(range(4)) == 0.5
    assert [entry.item for entry in buffer.journal()] == ["a", "b"]
    # What an item made stays known, whatever came over it.
    assert torch.equal(buffer.result("a", 2), painted(0.5)[0])
    assert buffer.rows_of("a") == (1, 2) and buffer.rows_of("c") is None


def test_pixels_have_the_colours_of_their_frames(scene):
    buffer = EditBuffer(scene)
    gradient = torch.linspace(0, 1, SIZE * SIZE * 3).view(1, SIZE, SIZE, 3)
    buffer.commit("a", [2], gradient, 0)
    rows, pixels = torch.tensor([2, 2, 5]), torch.tensor([[0, 0], [3, 6], [3, 6]])
    found = buffer.colors(rows, pixels)
    # Column first: pixel (3, 6) is in row 6. Edits are kept with 16 bits.
    assert torch.allclose(found[1], gradient[0, 6, 3], atol=3e-4)
    assert torch.equal(found[0], gradient[0, 0, 0].half().float())
    assert torch.equal(found[2], scene.frames[5, 6, 3].float() / 255)


def test_a_folder_gives_back_what_it_was_given(scene, tmp_path):
    first = EditBuffer(scene, tmp_path, {"instruction": "make it blue"})
    picture = torch.rand(2, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(0))
    first.commit("key/00", [0, 4], picture, 12)
    again = EditBuffer(scene, tmp_path, {"instruction": "make it blue"})
    assert not again.version.any(), "what is stored is not shown by itself"
    assert again.show("key/00", 12) and not again.show("key/01", 12)
    assert torch.equal(again.current([0, 4]), first.current([0, 4]))
    assert again.edited_at_step[4] == 12 and again.journal() == first.journal()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again.commit("key/00", [0, 4], picture, 12)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before, "nothing that is there is written again"


def test_a_kill_between_any_two_writes_loses_one_item_at_most(scene, tmp_path):
    """Cut the journal at every byte: what it names is whole, and can be completed."""
    whole = tmp_path / "whole"
    buffer = EditBuffer(scene, whole, {"seed": 1})
    for place, name in enumerate(("a", "b")):
        buffer.commit(name, [place], painted(0.25 * (place + 1)), place)
    text = (whole / "journal.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(text) if byte == ord("\n")]
    for cut in {0, 1, ends[0], ends[0] + 5, ends[1] - 1, ends[1], len(text) - 1, len(text)}:
        folder = tmp_path / f"cut{cut}"
        shutil.copytree(whole, folder)
        (folder / "journal.jsonl").write_bytes(text[:cut])
        (folder / "items" / "b.part").write_bytes(b"half a file")
        resumed = EditBuffer(scene, folder, {"seed": 1})
        assert len(resumed.journal()) == max(0, sum(end <= cut for end in ends) - 1)
        for place, name in enumerate(("a", "b")):
            resumed.commit(name, [place], painted(0.25 * (place + 1)), place)
        assert torch.equal(resumed.current([0, 1]), buffer.current([0, 1]))
        assert EditBuffer(scene, folder, {"seed": 1}).journal() == buffer.journal()


def test_nothing_shows_that_could_not_be_written(scene, tmp_path, monkeypatch):
    buffer = EditBuffer(scene, tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        buffer.commit("a", [0], painted(0.5), 0)
    assert not buffer.version.any() and buffer.stored("a") is None


def test_damage_is_seen_and_mended(scene, tmp_path):
    buffer = EditBuffer(scene, tmp_path)
    buffer.commit("a", [0], painted(0.5), 0)
    path = tmp_path / "items" / "a.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert buffer.stored("a") is None
    with pytest.raises(ValueError, match="the result of a in .* is missing or damaged"):
        buffer.result("a", 0)
    assert not buffer.show("a", 0)
    buffer.commit("a", [0], painted(0.5), 3)
    assert torch.equal(buffer.result("a", 0), painted(0.5)[0])
    (tmp_path / "journal.jsonl").write_text('{"format": 1}\nnonsense\n')
    with pytest.raises(ValueError, match="journal.jsonl is damaged"):
        EditBuffer(scene, tmp_path)


def test_the_edits_of_another_run_are_refused(scene, tmp_path):
    EditBuffer(scene, tmp_path, {"instruction": "make it blue", "seed": 0})
    with pytest.raises(ValueError, match="instruction: 'make it blue', now 'make it red'"):
        EditBuffer(scene, tmp_path, {"instruction": "make it red", "seed": 0})
    assert json.loads((tmp_path / "journal.jsonl").read_text())["seed"] == 0


@pytest.mark.parametrize(
    ("rows", "images", "message"),
    [
        ([0, 1], painted(0.5), r"expected \(2, 8, 8, 3\), each row once"),
        ([1, 1], painted(0.5, 2), "each row once"),
        ([0], painted(float("nan")), "brought NaN or infinite colours"),
    ],
)
def test_results_that_cannot_be_shown_are_refused(scene, rows, images, message):
    with pytest.raises(ValueError, match=message):
        EditBuffer(scene).commit("a", rows, images, 0)


def test_an_anchor_that_is_not_there_yet_is_named(scene):
    with pytest.raises(ValueError, match="item key has no result for row 2"):
        EditBuffer(scene).result("key", 2)


def test_another_run_goes_on_without_touching_the_first(scene, tmp_path):
    first = EditBuffer(scene, tmp_path / "first", {"seed": 1})
    first.commit("a", [0], painted(0.5), 0)
    before = (tmp_path / "first" / "journal.jsonl").read_bytes()
    adopt_edits(tmp_path / "first", tmp_path / "second")
    second = EditBuffer(scene, tmp_path / "second", {"seed": 1})
    assert second.show("a", 0)
    second.commit("b", [1], painted(0.75), 1)
    assert (tmp_path / "first" / "journal.jsonl").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "first" / "items").iterdir()) == ["a.npy"]
    assert [entry.item for entry in second.journal()] == ["a", "b"]
    assert not list(tmp_path.glob(".*"))
