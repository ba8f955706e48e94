"""Videos, gif and sheet, opened by the libraries that players are made of."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from custom.fourd.systems.exports.clips import (
    contact_sheet,
    webp_bytes,
    write_gif,
    write_mp4,
    write_png,
)

WHITE = 255


def clip(n=7, height=24, width=32):
    """A red square that moves to the right over white, two pixels per frame."""
    frames = np.full((n, height, width, 3), WHITE, np.uint8)
    for index in range(n):
        frames[index, 8:16, 2 * index : 2 * index + 8] = (200, 20, 30)
    return frames


def test_an_mp4_has_its_frames_in_time_and_colour(tmp_path):
    write_mp4(tmp_path / "a.mp4", clip(), fps=5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        (stream,) = container.streams.video
        assert stream.average_rate == 5 and stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.duration * stream.time_base) == pytest.approx(7 / 5)
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(read) == 7 and read[0].shape == (24, 32, 3)
    for index in (0, 3, 6):
        difference = np.abs(read[index].astype(int) - clip()[index])
        # Colour is stored at half the resolution, so the rim of the square is off.
        assert (
            np.median(difference) <= 3
            and difference[10:14, 2 * index + 2 : 2 * index + 6].max() < 16
        )


def test_odd_sizes_are_filled(tmp_path):
    write_mp4(tmp_path / "a.mp4", clip(2, 23, 31), fps=5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(24, 32, 3)] * 2


@pytest.mark.parametrize("fps, total_ms", [(15, 470), (4, 1750), (30, 230)])
def test_a_gif_lasts_as_long_as_its_frames(tmp_path, fps, total_ms):
    write_gif(tmp_path / "a.gif", clip(), fps)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 7 and image.size == (32, 24) and image.info["loop"] == 0
        lengths, frames = [], []
        for index in range(7):
            image.seek(index)
            lengths.append(image.info["duration"])
            frames.append(np.asarray(image.convert("RGB")))
    assert sum(lengths) == total_ms and max(lengths) - min(lengths) <= 10
    for index, frame in enumerate(frames):
        assert np.array_equal(frame, clip()[index]), "two colours survive a palette exactly"


def test_a_gif_of_many_colours_stays_close(tmp_path):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    frame = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 255 - ramp[:, None]), -1)
    frames = np.stack([frame, frame[::-1]])
    write_gif(tmp_path / "a.gif", frames, 10)
    with Image.open(tmp_path / "a.gif") as image:
        read = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(read - frame).mean() < 8


def test_a_gif_keeps_its_background_exactly(tmp_path):
    """Among thousands of nearly white colours, white itself is the one that the eye compares."""
    generator = np.random.default_rng(0)
    frames = np.full((2, 64, 64, 3), 255, np.uint8)
    frames[:, 16:48, 16:48] = generator.integers(0, 256, (2, 32, 32, 3))
    frames[:, 48:52] = generator.integers(235, 255, (2, 4, 64, 3))
    write_gif(tmp_path / "a.gif", frames, 10)
    with Image.open(tmp_path / "a.gif") as image:
        for index in range(2):
            image.seek(index)
            assert (np.asarray(image.convert("RGB"))[:16] == 255).all()


def test_pictures_keep_their_values(tmp_path):
    write_png(tmp_path / "a.png", clip()[3])
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), clip()[3])
    with Image.open(io.BytesIO(webp_bytes(clip()[3]))) as image:
        assert image.format == "WEBP"
        assert np.abs(np.asarray(image).astype(int) - clip()[3]).mean() < 6


def test_a_sheet_holds_every_tile_and_its_labels():
    tiles = np.stack([clip(3), clip(3)[::-1]])
    sheet = contact_sheet(tiles, ["0\u00b0", "180\u00b0"], ["t = 0", "t = 0.5", "t = 1"])
    # A tile 32 wide is enlarged to 96, the smallest that a label fits above.
    red = (sheet == (200, 20, 30)).all(-1)
    assert red.sum() == 6 * 9 * 64
    rows = np.flatnonzero(red.any(1))
    assert len(rows) == 2 * 24 and (np.diff(rows) > 1).sum() == 1
    ink = (sheet < 140).all(-1) & ~red
    assert ink[: rows[0] - 10].any(), "labels above the columns"
    columns = np.flatnonzero(red.any(0))
    assert ink[:, : columns[0]].any(), "labels before the rows"
    assert not ink[rows[0] :, columns[0] :].any(), "none on the tiles"


def test_a_sheet_without_labels_is_tight():
    plain = contact_sheet(np.full((1, 2, 96, 96, 3), 7, np.uint8), [""], ["", ""])
    labelled = contact_sheet(np.full((1, 2, 96, 96, 3), 7, np.uint8), ["90"], ["a", "b"])
    assert plain.shape[0] < labelled.shape[0] and plain.shape[1] < labelled.shape[1]
