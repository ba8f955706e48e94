"""Frames to the files that people open: mp4, gif, png, and a labelled contact sheet.

Frames are uint8 arrays [n, h, w, 3] in RGB order. Video and image codecs are imported when a file
is written.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Nearly lossless to the eye; the default of x264 smears small saturated objects.
CRF = "16"
GIF_COLORS = 255  # beside the background's
GUTTER_PX, MARGIN_PX = 4, 12
PAPER, INK = (255, 255, 255), (90, 96, 105)
SMALLEST_TILE_PX = 96


def write_mp4(path: str | Path, frames: np.ndarray, fps: int) -> None:
    """Write H.264 with 4:2:0 colour, which every player and browser shows.

    Odd heights and widths are filled with their last row or column: the format takes even ones.
    """
    import av

    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": CRF})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_gif(path: str | Path, frames: np.ndarray, fps: int) -> None:
    """Write a looping GIF in one palette for all frames, so that nothing shimmers.

    A GIF counts time in hundredths of a second; the frames' lengths are rounded so that the whole
    lasts n / fps.
    """
    from PIL import Image

    palette, indices = _in_one_palette(frames)
    images = [Image.fromarray(index, "P") for index in indices]
    for image in images:
        image.putpalette(palette.tobytes())
    ends = [round(100 * (index + 1) / fps) for index in range(len(images))]
    lengths = [10 * (end - start) for start, end in zip([0, *ends], ends)]
    images[0].save(
        path, format="GIF", save_all=True, append_images=images[1:], duration=lengths, loop=0,
        disposal=1, optimize=False,
    )  # fmt: skip


def _in_one_palette(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours [n, 3] for all frames, and the index of the nearest one for every pixel [n, h, w].

    The most frequent colour, the background, is exactly among them. Of the others each counts
    once, or a wide background would take most of the palette.
    """
    from PIL import Image

    packed = frames.astype(np.int32) @ np.array([65536, 256, 1], np.int32)
    values, places, counts = np.unique(packed, return_inverse=True, return_counts=True)
    colors = np.stack([values >> 16, values >> 8 & 255, values & 255], axis=-1).astype(np.uint8)
    chosen = Image.fromarray(colors[None]).quantize(GIF_COLORS, method=Image.Quantize.MEDIANCUT)
    others = np.array(chosen.getpalette(), np.uint8).reshape(-1, 3)[:GIF_COLORS]
    palette = np.concatenate([colors[counts.argmax()][None], others])
    # Pillow matches by a coarse cache, which would tint a plain background.
    nearest = np.empty(len(colors), np.uint8)
    wanted = palette.astype(np.float32)
    for first in range(0, len(colors), 16384):
        part = colors[first : first + 16384].astype(np.float32)
        # |a - b|^2 less |a|^2, which does not change the order.
        distance = (wanted**2).sum(-1) - 2 * part @ wanted.T
        nearest[first : first + 16384] = distance.argmin(axis=1)
    return palette, nearest[places.reshape(frames.shape[:3])]


def write_png(path: str | Path, frame: np.ndarray) -> None:
    """Write one frame [h, w, 3]."""
    from PIL import Image

    Image.fromarray(frame).save(path, format="PNG", optimize=True)


def webp_bytes(frame: np.ndarray, quality: int = 90) -> bytes:
    """One frame [h, w, 3] as WebP, which all browsers show."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="WEBP", quality=quality, method=4)
    return buffer.getvalue()


def contact_sheet(
    frames: np.ndarray, row_labels: Sequence[str], column_labels: Sequence[str]
) -> np.ndarray:
    """Lay frames [rows, columns, h, w, 3] out with labels on two sides; returns [h, w, 3].

    Tiles below 96 pixels are enlarged by whole factors, so that the labels fit.
    """
    from PIL import Image, ImageDraw, ImageFont

    factor = max(1, -(-SMALLEST_TILE_PX // frames.shape[3]))
    frames = frames.repeat(factor, axis=2).repeat(factor, axis=3)
    rows, columns, height, width = frames.shape[:4]
    size = min(28, max(12, round(width / 10)))
    font = ImageFont.load_default(size)
    label_width = round(max((font.getlength(text) for text in row_labels), default=0)) + size
    label_height = 2 * size if any(column_labels) else 0
    left, top = MARGIN_PX + label_width, MARGIN_PX + label_height
    sheet = Image.new(
        "RGB",
        (left + columns * (width + GUTTER_PX) + MARGIN_PX,
         top + rows * (height + GUTTER_PX) + MARGIN_PX),
        PAPER,
    )  # fmt: skip
    draw: Any = ImageDraw.Draw(sheet)
    for row in range(rows):
        y = top + row * (height + GUTTER_PX)
        draw.text((left - size / 2, y + height / 2), row_labels[row], INK, font, anchor="rm")
        for column in range(columns):
            x = left + column * (width + GUTTER_PX)
            sheet.paste(Image.fromarray(frames[row, column]), (x, y))
            if row == 0:
                middle = (x + width / 2, MARGIN_PX + size)
                draw.text(middle, column_labels[column], INK, font, anchor="mm")
    return np.asarray(sheet)
