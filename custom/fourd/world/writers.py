"""Scenes of the world as files that readers of real captures read, with the truth beside them.

Every folder gets a `world.json`, from which `capture.read_truth` makes colour and depth again,
exactly. Nothing that exists is overwritten.

Legend: n frames, size_px pixels of height and width (s).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from custom.fourd.ops.camera import intrinsics_from_fovy

from .capture import (
    RECORD,
    WorldCapture,
    arc_azimuths,
    join_captures,
    path_capture,
    record_of,
    rig_capture,
)
from .grammar import WorldScene
from .render import flow


def write_dynerf(
    folder: Path,
    scene: WorldScene,
    n_cameras: int = 8,
    n_times: int = 16,
    size_px: int = 64,
    fps: int = 30,
) -> WorldCapture:
    """Write `camNN.mp4` and `poses_bounds.npy` in LLFF's convention; camera 0 is inside the arc.

    Raises:
        FileExistsError: the folder holds something.
    """
    capture = rig_capture(scene, arc_azimuths(n_cameras), n_times, size_px)
    _new_folder(folder)
    frames = capture.frames()
    rows = []
    for camera in range(n_cameras):
        own = capture.camera_ids == camera
        write_mp4(folder / f"cam{camera:02d}.mp4", frames[own], fps)
        right, up, backward, position = capture.c2w[own][0, :3].double().unbind(dim=-1)
        focal_px = 0.5 * size_px / math.tan(0.5 * capture.fovy_rad)
        shape = torch.tensor([size_px, size_px, focal_px], dtype=torch.float64)
        matrix = torch.stack([-up, right, backward, position, shape], dim=-1)
        rows.append(np.concatenate([matrix.flatten().numpy(), capture.bounds]))
    np.save(folder / "poses_bounds.npy", np.stack(rows))
    _write_json(folder / RECORD, record_of(capture))
    return capture


def write_dycheck(
    folder: Path, scene: WorldScene, n_times: int = 16, size_px: int = 64, n_val: int = 2
) -> WorldCapture:
    """Write a folder as DyCheck's iPhone sequences: one moving camera, standing val cameras.

    Training frames have lidar depth (z, in the file's units), validation frames a covisible mask:
    what at least max(5, n_times // 10) training frames see too. The file's world is twice as large
    as the scene's and shifted, so that `center` and `scale` matter.

    Raises:
        FileExistsError: the folder holds something.
    """
    moving = path_capture(scene, n_times, size_px)
    still = rig_capture(scene, torch.linspace(-20.0, 20.0, n_val), n_times, size_px)
    still.camera_ids += 1
    capture = join_captures(moving, still)
    _new_folder(folder)
    center, scale = (0.5, -0.25, 0.125), 0.5
    frames, (_, depth) = capture.frames(), capture.render()
    names = [f"{c}_{t:05d}" for c, t in zip(*capture.ids(), strict=True)]
    cosine = _ray_cosines(capture)
    for row, name in enumerate(names):
        _write_json(
            folder / "camera" / f"{name}.json", _dycheck_camera(capture, row, center, scale)
        )
        _write_picture(folder / "rgb" / "1x" / f"{name}.png", frames[row])
        if row < n_times:
            z_depth = (depth[row] * cosine / scale)[..., None].numpy().astype(np.float32)
            _write_array(folder / "depth" / "1x" / f"{name}.npy", z_depth)
        else:
            mask = _covisible(capture, row, n_times)
            _write_picture(folder / "covisible" / "1x" / "val" / f"{name}.png", mask)
    for split, rows in (("train", range(n_times)), ("val", range(n_times, len(capture)))):
        cameras, times = capture.ids()
        content = {
            "frame_names": [names[row] for row in rows],
            "camera_ids": [cameras[row] for row in rows],
            "time_ids": [times[row] for row in rows],
        }
        _write_json(folder / "splits" / f"{split}.json", content)
    near, far = capture.bounds
    _write_json(folder / "scene.json", {"center": center, "scale": scale, "near": near, "far": far})
    _write_json(folder / "dataset.json", {"count": len(names), "ids": names})
    _write_json(folder / RECORD, record_of(capture))
    return capture


def write_transforms(folder: Path, capture: WorldCapture, held_out: Sequence[int] = ()) -> None:
    """Write PNG files with nerfstudio's `transforms.json`, times as D-NeRF has them.

    Args:
        capture: any cameras.
        held_out: cameras that become `val_filenames`; without any, the file names no split.

    Raises:
        FileExistsError: the folder holds something.
    """
    _new_folder(folder)
    frames = capture.frames()
    names = [f"images/{c:02d}_{t:04d}.png" for c, t in zip(*capture.ids(), strict=True)]
    for row, name in enumerate(names):
        _write_picture(folder / name, frames[row])
    content = _intrinsics(capture) | {"frames": _posed(capture, names)}
    if held_out:
        is_val = [int(camera) in held_out for camera in capture.camera_ids]
        content["train_filenames"] = [n for n, val in zip(names, is_val, strict=True) if not val]
        content["val_filenames"] = [n for n, val in zip(names, is_val, strict=True) if val]
    _write_json(folder / "transforms.json", content)
    _write_json(folder / RECORD, record_of(capture))


def write_video(path: Path, capture: WorldCapture, cameras: bool = True, fps: int = 30) -> None:
    """Write one camera's frames as an mp4, and its poses as `<name>.json` beside it.

    Args:
        capture: of a single camera.
        cameras: whether to write the poses; one for each frame.

    Raises:
        FileExistsError: one of the files is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    poses, record = path.with_suffix(".json"), path.with_name(f"{path.stem}.{RECORD}")
    for file in (path, poses, record):
        if file.exists():
            raise FileExistsError(f"{file} exists; give another name.")
    write_mp4(path, capture.frames(), fps)
    if cameras:
        content = _intrinsics(capture) | {"frames": _posed(capture, None)}
        _write_json(poses, content)
    _write_json(record, record_of(capture))


def write_mp4(path: Path, frames: UInt8[Tensor, "t h w 3"], fps: int = 30) -> None:
    """Write frames as H.264 with full colour resolution, near to lossless (above 45 dB)."""
    import av

    part = path.with_name(f".part-{path.name}")
    with av.open(str(part), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv444p", {"crf": "8"}
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    part.rename(path)


def _ray_cosines(capture: WorldCapture) -> Float[Tensor, "s s"]:
    """Between each pixel's ray and the viewing axis; the contract's depth times it is z."""
    size, focal_px = capture.size_px, 0.5 * capture.size_px / math.tan(0.5 * capture.fovy_rad)
    offset = (torch.arange(size) + 0.5 - 0.5 * size) / focal_px
    return (1 + offset[:, None] ** 2 + offset[None] ** 2).rsqrt()


def _dycheck_camera(
    capture: WorldCapture, row: int, center: Sequence[float], scale: float
) -> dict[str, Any]:
    """World-to-camera rotation with rows right, down, forward; position in the file's world."""
    right, up, backward, position = capture.c2w[row, :3].double().unbind(dim=-1)
    size = capture.size_px
    return {
        "orientation": torch.stack([right, -up, -backward]).tolist(),
        "position": (position / scale + torch.tensor(center, dtype=torch.float64)).tolist(),
        "focal_length": 0.5 * size / math.tan(0.5 * capture.fovy_rad),
        "principal_point": [0.5 * size, 0.5 * size],
        "pixel_aspect_ratio": 1.0,
        "skew": 0.0,
        "radial_distortion": [0.0, 0.0, 0.0],
        "tangential_distortion": [0.0, 0.0],
        "image_size": [size, size],
    }


def _covisible(capture: WorldCapture, row: int, n_train: int) -> UInt8[Tensor, "s s"]:
    """255 where enough training frames see a validation frame's surface; background counts."""
    fovy = torch.full((n_train,), capture.fovy_rad)
    one = slice(row, row + 1)
    seen = flow(
        capture.scene,
        capture.c2w[one].expand(n_train, 4, 4),
        fovy,
        capture.frame_times[one].expand(n_train),
        capture.c2w[:n_train],
        fovy,
        capture.frame_times[:n_train],
        capture.size_px,
        capture.size_px,
    )
    enough = seen.is_visible.sum(dim=0) >= max(5, n_train // 10)
    return ((enough | ~seen.is_surface[0]) * 255).to(torch.uint8)


def _intrinsics(capture: WorldCapture) -> dict[str, Any]:
    size = capture.size_px
    matrix = intrinsics_from_fovy(torch.tensor(capture.fovy_rad).double(), size, size)
    return {
        "camera_model": "OPENCV",
        "w": size,
        "h": size,
        "fl_x": float(matrix[0, 0]),
        "fl_y": float(matrix[1, 1]),
        "cx": float(matrix[0, 2]),
        "cy": float(matrix[1, 2]),
    }


def _posed(capture: WorldCapture, names: list[str] | None) -> list[dict[str, Any]]:
    rows = []
    for row in range(len(capture)):
        frame = {"file_path": names[row]} if names else {}
        frame["transform_matrix"] = capture.c2w[row].tolist()
        frame["time"] = float(capture.frame_times[row])
        rows.append(frame)
    return rows


def _new_folder(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; give the name of a new folder.")
    folder.mkdir(parents=True, exist_ok=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _write_array(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def _write_picture(path: Path, picture: Tensor) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.numpy()).save(path)
