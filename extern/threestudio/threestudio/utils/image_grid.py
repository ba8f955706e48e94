"""Arrays to pictures: value ranges, colour maps, and tiles laid out in rows.

Pictures are [H, W, 3] or [H, W, 4] uint8 arrays in RGB order; `threestudio.utils.saving` writes
them. OpenCV is imported when a picture is made, never with this module.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_CHECKER_TILES = 64


def to_numpy(data: Any) -> Any:
    """Turn tensors inside ``data`` (a tensor, array, list or dict) into NumPy arrays.

    Raises:
        TypeError: ``data`` is something else.
    """
    if data is None or isinstance(data, (np.ndarray, str, int, float, bool)):
        return data
    if isinstance(data, torch.Tensor):
        data = data.detach()
        return (data.float() if data.dtype == torch.bfloat16 else data).cpu().numpy()
    if isinstance(data, (list, tuple)):
        return [to_numpy(item) for item in data]
    if isinstance(data, dict):
        return {key: to_numpy(value) for key, value in data.items()}
    raise TypeError(
        f"cannot convert a {type(data).__name__}; expected a tensor, an array, a list or a dict."
    )


def rgb_picture(img: Any, data_format: str = "HWC", data_range=(0, 1)) -> np.ndarray:
    """Map colours in ``data_range`` to a picture.

    More than four channels are split into RGB tiles side by side, the last one filled with zeros;
    four are RGBA; one is repeated; two are filled with a zero.

    Raises:
        ValueError: ``img`` has not three dimensions, or ``data_format`` is unknown.
    """
    img = _channels_last(to_numpy(img), data_format)
    img = _to_bytes(img, data_range)
    channels = img.shape[-1]
    if channels in (3, 4):
        return img
    if channels == 1:
        return img.repeat(3, axis=-1)
    padded = np.pad(img, ((0, 0), (0, 0), (0, -channels % 3)))
    return np.concatenate(np.split(padded, padded.shape[-1] // 3, axis=-1), axis=1)


def uv_picture(
    img: Any, data_format: str = "HWC", data_range=(0, 1), cmap: str = "checkerboard"
) -> np.ndarray:
    """Show texture coordinates [H, W, 2] as a checkerboard or as the colour (u, v, 0)."""
    img = _channels_last(to_numpy(img), data_format)
    lo, hi = data_range
    uv = (np.nan_to_num(img).clip(lo, hi) - lo) / (hi - lo)
    if cmap == "checkerboard":
        tiles = (uv * _CHECKER_TILES).astype(np.int64).sum(axis=-1, keepdims=True) % 2
        return np.where(tiles == 0, 255, 128).astype(np.uint8).repeat(3, axis=-1)
    if cmap == "color":
        return _to_bytes(np.concatenate([uv, np.zeros_like(uv[..., :1])], axis=-1), (0, 1))
    raise ValueError(f"cmap is {cmap!r}; expected 'checkerboard' or 'color'.")


def grayscale_picture(img: Any, data_range=None, cmap: str | None = "jet") -> np.ndarray:
    """Show one value per pixel, [H, W] or [H, W, 1].

    Args:
        img: the values.
        data_range: (lowest, highest); None takes those of the finite values.
        cmap: "jet", "magma", "spectral" (red to blue), or None for gray.
    """
    img = np.asarray(to_numpy(img))
    img = img[..., 0] if img.ndim == 3 and img.shape[-1] == 1 else img
    if img.ndim != 2:
        raise ValueError(f"grayscale image has shape {img.shape}; expected (h, w) or (h, w, 1).")
    finite = img[np.isfinite(img)]
    if data_range is None:
        data_range = (finite.min(), finite.max()) if finite.size else (0, 1)
    lo, hi = float(data_range[0]), float(data_range[1])
    gray = _to_bytes(img, (lo, hi)) if hi > lo else np.zeros(img.shape, np.uint8)
    if cmap is None:
        return gray[..., None].repeat(3, axis=-1)
    return _colored(gray, cmap)


def assemble_grid(
    items: Sequence, align: Any = "max", texts: Sequence[str] | None = None
) -> np.ndarray:
    """Lay pictures out in rows.

    Args:
        items: dicts ``{"type": "rgb" | "uv" | "grayscale", "img": ..., "kwargs": {...}}``; a flat
            list is one row, a list of lists gives the rows.
        align: height and width of each tile: "max" or "min" of all, an int, or a pair (h, w).
        texts: one line per row, written into its first tile.

    Raises:
        ValueError: no item, an unknown type, or an unknown ``align``.
    """
    rows = [list(row) for row in items] if items and isinstance(items[0], (list, tuple)) else [
        list(items)
    ]
    if not any(rows):
        raise ValueError("the image grid is empty; expected at least one image.")
    pictures = [[_picture(item) for item in row] for row in rows]
    size = _tile_size([tile for row in pictures for tile in row], align)
    width = max(len(row) for row in pictures)
    lines = []
    for row in pictures:
        tiles = [_opaque(_fit(tile, size)) for tile in row]
        tiles += [np.zeros_like(tiles[0]) if tiles else np.zeros((*size, 3), np.uint8)] * (
            width - len(row)
        )
        lines.append(np.concatenate(tiles, axis=1))
    if texts is not None:
        for line, text in zip(lines, texts):
            _write_text(line, text)
    return np.concatenate(lines, axis=0)


def _picture(item: dict) -> np.ndarray:
    kinds = {"rgb": rgb_picture, "uv": uv_picture, "grayscale": grayscale_picture}
    if item["type"] not in kinds:
        raise ValueError(f"image type is {item['type']!r}; expected one of {', '.join(kinds)}.")
    return kinds[item["type"]](item["img"], **dict(item.get("kwargs") or {}))


def _channels_last(img: np.ndarray, data_format: str) -> np.ndarray:
    img = np.asarray(img)
    if data_format not in ("HWC", "CHW"):
        raise ValueError(f"data_format is {data_format!r}; expected 'HWC' or 'CHW'.")
    if img.ndim != 3:
        raise ValueError(f"image has shape {img.shape}; expected {data_format} (one image).")
    return img.transpose(1, 2, 0) if data_format == "CHW" else img


def _to_bytes(img: np.ndarray, data_range) -> np.ndarray:
    if img.dtype == np.uint8:
        return img
    lo, hi = data_range
    values = np.nan_to_num(img.astype(np.float32), nan=lo, posinf=hi, neginf=lo).clip(lo, hi)
    return ((values - lo) / (hi - lo) * 255.0).astype(np.uint8)


def _colored(gray: np.ndarray, cmap: str) -> np.ndarray:
    import cv2

    if cmap == "spectral":
        # OpenCV has no Spectral; these are ColorBrewer's eleven anchors, interpolated.
        anchors = np.array([
            [158, 1, 66], [213, 62, 79], [244, 109, 67], [253, 174, 97], [254, 224, 139],
            [255, 255, 191], [230, 245, 152], [171, 221, 164], [102, 194, 165], [50, 136, 189],
            [94, 79, 162],
        ])
        at = np.linspace(0, 255, len(anchors))
        table = np.stack([np.interp(np.arange(256), at, anchors[:, c]) for c in range(3)], -1)
        return table.astype(np.uint8)[gray]
    maps = {"jet": cv2.COLORMAP_JET, "magma": cv2.COLORMAP_MAGMA}
    if cmap not in maps:
        raise ValueError(f"cmap is {cmap!r}; expected jet, magma, spectral or null.")
    return cv2.cvtColor(cv2.applyColorMap(gray, maps[cmap]), cv2.COLOR_BGR2RGB)


def _tile_size(pictures: list[np.ndarray], align: Any) -> tuple[int, int]:
    heights, widths = zip(*(picture.shape[:2] for picture in pictures))
    if align == "max":
        return max(heights), max(widths)
    if align == "min":
        return min(heights), min(widths)
    if isinstance(align, int) and not isinstance(align, bool):
        return align, align
    if isinstance(align, Sequence) and not isinstance(align, str) and len(align) == 2:
        return int(align[0]), int(align[1])
    raise ValueError(f"align is {align!r}; expected 'max', 'min', an int or a pair (h, w).")


def _fit(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if picture.shape[:2] == size:
        return picture
    import cv2

    return cv2.resize(np.ascontiguousarray(picture), (size[1], size[0]))


def _opaque(picture: np.ndarray) -> np.ndarray:
    return picture[..., :3]


def _write_text(line: np.ndarray, text: str) -> None:
    import cv2

    # Black below white keeps the line readable on any background.
    for color, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.putText(line, str(text), (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.5, color, width,
                    cv2.LINE_AA)
