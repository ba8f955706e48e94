"""Decoding into folders: whole, atomic, resumable, and never over something else."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from custom.fourd.data import prepared_frames
from custom.fourd.data.prepared_frames import is_prepared, prepare, prepared_sources
from custom.fourd.data.video_frames import FrameSource
from custom.fourd.world.writers import write_mp4


@pytest.fixture
def video(tmp_path):
    grey = 20 * (torch.arange(5, dtype=torch.uint8) + 1)
    path = tmp_path / "cam00.mp4"
    write_mp4(path, grey.view(-1, 1, 1, 1).expand(5, 32, 32, 3).contiguous())
    return path


def test_frames_are_downsampled_pictures(video):
    seen = []
    folder = prepare(video, 2, lambda done, total: seen.append((done, total)))
    assert folder == video.parent / "frames_2x" / "cam00"
    assert seen == [(i, 5) for i in range(1, 6)]
    source = FrameSource(folder)
    assert source.n_frames == 5 and source.first_size() == (16, 16) and is_prepared(source)
    means = [frame.mean() for frame in source.frames()]
    assert means == pytest.approx([20, 40, 60, 80, 100], abs=1.5)
    (ready,) = prepared_sources([FrameSource(video)], 2)
    assert ready.path == folder and ready.name == "cam00"


def test_a_stop_loses_nothing(video):
    """Frames that stand are kept as they are; the record says complete at the very end."""

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(video, 1, stop)
    folder = video.parent / "frames_1x" / "cam00"
    assert not json.loads((folder / "source.json").read_text())["complete"]
    source = FrameSource(video)
    assert prepared_sources([source], 1) == [source]
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert sorted(stamps) == ["000000.png", "000001.png", "000002.png"]
    prepare(video, 1)
    assert {n: (folder / n).stat().st_mtime_ns for n in stamps} == stamps
    assert json.loads((folder / "source.json").read_text())["n_frames"] == 5
    assert prepared_sources([source], 1)[0].n_frames == 5


def test_no_half_written_picture_appears(video, monkeypatch):
    def fail(self, path, **options):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        prepare(video, 1)
    assert [p.name for p in (video.parent / "frames_1x" / "cam00").iterdir()] == ["source.json"]


def test_a_cut_video_is_never_complete(video):
    content = video.read_bytes()
    video.write_bytes(content[: int(0.9 * len(content))])
    with pytest.raises(ValueError, match="cam00.mp4 is cut"):
        prepare(video, 1)
    record = video.parent / "frames_1x" / "cam00" / "source.json"
    assert not json.loads(record.read_text())["complete"]


def test_other_files_are_left_alone(video):
    folder = video.parent / "frames_1x" / "cam00"
    folder.mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(folder / "mine.png")
    with pytest.raises(ValueError, match="holds files, but no source.json of this script"):
        prepare(video, 1)
    assert [path.name for path in folder.iterdir()] == ["mine.png"]


def test_frames_of_another_version_are_not_used(video, monkeypatch):
    folder = prepare(video, 1)
    write_mp4(video, torch.zeros(4, 32, 32, 3, dtype=torch.uint8))
    warnings = []
    monkeypatch.setattr(
        prepared_frames.threestudio, "warn", lambda text, *args: warnings.append(text % args)
    )
    source = FrameSource(video)
    assert prepared_sources([source], 1) == [source]
    assert len(warnings) == 1 and "another version" in warnings[0]
    with pytest.raises(ValueError, match="decoded from another version .* Delete the folder"):
        prepare(video, 1)
    assert len(list(folder.glob("*.png"))) == 5


def test_a_picture_that_went_missing_is_noticed(video):
    folder = prepare(video, 1)
    (folder / "000002.png").unlink()
    with pytest.raises(ValueError, match="holds 4 pictures, but its source.json says 5"):
        prepared_sources([FrameSource(video)], 1)
    (folder / "source.json").write_text("{")
    with pytest.raises(ValueError, match="source.json is no JSON"):
        prepare(video, 1)
