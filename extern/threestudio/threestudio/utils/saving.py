"""Savers that every system has: pictures, grids, videos, data and meshes.

Everything is written beside its place and renamed, so whoever reads an output folder during a
training sees whole files only.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from threestudio.utils import image_grid
from threestudio.utils.checkpoint import save_checkpoint
from threestudio.utils.mesh_files import write_obj
from threestudio.utils.misc import get_rank
from threestudio.utils.redaction import redact_values
from threestudio.utils.trackers import finish_wandb, start_wandb, track_media

_IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class SaverMixin:
    """Mixin that saves below one folder, set by `set_save_dir` after construction.

    Each ``save_*`` method takes a file name relative to that folder and returns the path. ``name``
    and ``step`` also send the picture or video to the trackers that the config enables.
    """

    _save_dir: str | None = None
    _wandb_cfg: dict | None = None
    _wandb_logger: Any = None

    # Folder

    def set_save_dir(self, save_dir: str | os.PathLike) -> None:
        self._save_dir = os.fspath(save_dir)

    def get_save_dir(self) -> str:
        """Return the save folder.

        Raises:
            ValueError: it is not set yet, as during ``configure``.
        """
        if self._save_dir is None:
            raise ValueError(
                "the save folder is not set; it is known only after construction, so configure() "
                "must not save. Call set_save_dir first."
            )
        return self._save_dir

    def get_save_path(self, filename: str) -> str:
        """Return the path of ``filename`` below the save folder; its parent folders are made."""
        path = os.path.join(self.get_save_dir(), filename)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def on_save_fault(self, path: str, error: OSError) -> None:
        """Called when a picture, video or data file cannot be written; raises by default."""
        raise error

    def convert_data(self, data: Any) -> Any:
        """Turn tensors inside ``data`` into NumPy arrays."""
        return image_grid.to_numpy(data)

    # Trackers

    def create_loggers(self, cfg_loggers: Any) -> None:
        """Take note of the trackers of ``cfg.loggers``; a training starts them."""
        wandb = (cfg_loggers or {}).get("wandb") or {}
        self._wandb_cfg = dict(wandb) if wandb.get("enable", False) else None

    def start_loggers(self, folder: str | os.PathLike, config: Any = None) -> None:
        """Start the trackers that the config enables; one that fails is reported and left out.

        Args:
            folder: output folder of the run.
            config: the experiment as plain containers, for the trackers that show it.
        """
        if self._wandb_cfg is not None:
            self._wandb_logger = start_wandb(self._wandb_cfg, folder, config)

    def get_loggers(self) -> list:
        """Return the trackers that run, as Lightning loggers."""
        return [self._wandb_logger] if self._wandb_logger is not None else []

    def finish_loggers(self) -> None:
        """End what `start_loggers` started."""
        if self._wandb_logger is not None:
            finish_wandb(self._wandb_logger)
            self._wandb_logger = None

    def _track(self, kind: str, name: str | None, path: str, step: int | None) -> None:
        if self._wandb_logger is not None and name is not None:
            track_media(self._wandb_logger, kind, name, path, step)

    # Pictures

    def get_rgb_image_(self, img, data_format="HWC", data_range=(0, 1), rgba=False) -> np.ndarray:
        """Colours to a picture, see `threestudio.utils.image_grid.rgb_picture`."""
        return image_grid.rgb_picture(img, data_format, data_range)

    def get_image_grid_(self, imgs, align="max") -> np.ndarray:
        """Grid items to one picture, see `threestudio.utils.image_grid.assemble_grid`."""
        return image_grid.assemble_grid(imgs, align)

    def save_rgb_image(self, filename: str, img, data_format: str = "HWC", data_range=(0, 1),
                       name: str | None = None, step: int | None = None) -> str:
        """Save colours [H, W, C] (or CHW) whose values lie in ``data_range``."""
        return self._save_picture(
            filename, image_grid.rgb_picture(img, data_format, data_range), name, step
        )

    def save_uv_image(self, filename: str, img, data_format: str = "HWC", data_range=(0, 1),
                      cmap: str = "checkerboard") -> str:
        """Save texture coordinates [H, W, 2]; ``cmap`` is "checkerboard" or "color"."""
        return self._save_picture(
            filename, image_grid.uv_picture(img, data_format, data_range, cmap)
        )

    def save_grayscale_image(self, filename: str, img, data_range=None, cmap: str | None = "jet",
                             name: str | None = None, step: int | None = None) -> str:
        """Save one value per pixel; without ``data_range`` the lowest and highest span it."""
        return self._save_picture(
            filename, image_grid.grayscale_picture(img, data_range, cmap), name, step
        )

    def save_image_grid(self, filename: str, imgs: Sequence, align: Any = "max",
                        name: str | None = None, step: int | None = None,
                        texts: Sequence[str] | None = None) -> str:
        """Save grid items in rows, see `threestudio.utils.image_grid.assemble_grid`."""
        return self._save_picture(
            filename, image_grid.assemble_grid(imgs, align, texts), name, step
        )

    def save_image(self, filename: str, img) -> str:
        """Save a picture as it is: uint8 or uint16, [H, W], [H, W, 3] or [H, W, 4] in RGB order.

        Raises:
            ValueError: another type.
        """
        img = np.asarray(self.convert_data(img))
        if img.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"image has type {img.dtype}; expected uint8 or uint16.")
        return self._save_picture(filename, img)

    def save_cubemap(self, filename: str, img: Sequence, data_range=(0, 1),
                     rgba: bool = False) -> str:
        """Save six faces (+x, -x, +y, -y, +z, -z) as a cross of three rows and four columns."""
        if len(img) != 6:
            raise ValueError(f"cubemap has {len(img)} faces; expected 6.")
        faces = [image_grid.rgb_picture(face, "HWC", data_range) for face in img]
        blank = np.zeros_like(faces[0])
        rows = [[blank, faces[2], blank, blank], [faces[1], faces[4], faces[0], faces[5]],
                [blank, faces[3], blank, blank]]
        cross = np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0)
        return self._save_picture(filename, cross)

    def _save_picture(self, filename: str, picture: np.ndarray, name: str | None = None,
                      step: int | None = None) -> str:
        return self._save(filename, lambda path: _write_picture(path, picture),
                          lambda path: self._track("image", name, path, step))

    # Video

    def save_img_sequence(self, filename: str, img_dir: str, matcher: str,
                          save_format: str = "mp4", fps: int = 30, name: str | None = None,
                          step: int | None = None) -> str:
        """Join the pictures of a folder to a video.

        Args:
            filename: of the video; the suffix of ``save_format`` is added if it is missing.
            img_dir: folder of the pictures, below the save folder.
            matcher: regular expression for their names; group 1 is the frame number.
            save_format: "mp4" (H.264) or "gif".
            fps: frames per second.

        Raises:
            ValueError: unknown format, or no picture matches.
        """
        if save_format not in ("mp4", "gif"):
            raise ValueError(f"save_format is {save_format!r}; expected 'mp4' or 'gif'.")
        if not filename.endswith(save_format):
            filename += f".{save_format}"
        if get_rank() != 0:
            return os.path.join(self.get_save_dir(), filename)
        folder = Path(self.get_save_dir()) / img_dir
        numbered = sorted(
            (int(found.group(1)), path) for path in (folder.iterdir() if folder.is_dir() else [])
            if not path.name.startswith(".") and (found := re.search(matcher, path.name))
        )
        if not numbered:
            raise ValueError(f"no picture in {folder} matches '{matcher}'; nothing to join.")
        paths = [path for _, path in numbered]
        return self._save(filename, lambda path: _write_video(path, paths, save_format, fps),
                          lambda path: self._track("video", name, path, step))

    # Data and files

    def save_data(self, filename: str, data: Any) -> str:
        """Save a dict as .npz, anything else as .npy."""
        data = self.convert_data(data)
        suffix = ".npz" if isinstance(data, dict) else ".npy"
        filename = filename if filename.endswith(suffix) else filename + suffix

        def write(path: str) -> None:
            with open(path, "wb") as file:
                np.savez(file, **data) if isinstance(data, dict) else np.save(file, data)

        return self._save(filename, write)

    def save_state_dict(self, filename: str, data: Any) -> str:
        """Save tensors in nested dicts, readable by `threestudio.utils.checkpoint`."""
        if get_rank() != 0:
            return os.path.join(self.get_save_dir(), filename)
        path = self.get_save_path(filename)
        save_checkpoint(path, data)
        return path

    def save_json(self, filename: str, payload: Any) -> str:
        """Save ``payload``, tensors as lists, as JSON; credentials in its text are left out."""
        def plain(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                value = value.detach().cpu().numpy()
            return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)

        text = redact_values(json.dumps(payload, indent=2, default=plain)) + "\n"
        return self._save(filename, lambda path: Path(path).write_text(text, encoding="utf-8"))

    def save_file(self, filename: str, src_path: str | os.PathLike) -> str:
        """Copy a file into the save folder."""
        return self._save(filename, lambda path: shutil.copyfile(src_path, path))

    def save_with_writer(self, filename: str, write: Callable[[str], Any]) -> str:
        """Save what ``write(path)`` writes; it gets a temporary path with the file's suffix."""
        return self._save(filename, write)

    def save_mesh(self, filename: str, v_pos, t_pos_idx, v_tex=None, t_tex_idx=None) -> str:
        """Save bare geometry: vertices [V, 3] and triangles [T, 3], with texture coordinates."""
        import trimesh

        v_pos, t_pos_idx = self.convert_data(v_pos), self.convert_data(t_pos_idx)
        mesh = trimesh.Trimesh(vertices=v_pos, faces=t_pos_idx, process=False)
        return self._save(filename, lambda path: mesh.export(path))

    def save_obj(self, filename: str, mesh, save_mat: bool = False, save_normal: bool = False,
                 save_uv: bool = False, save_vertex_color: bool = False, map_Kd=None, map_Ks=None,
                 map_Bump=None, map_Pm=None, map_Pr=None, map_format: str = "jpg") -> list[str]:
        """Save a `Mesh` as OBJ, with a material and its textures if ``save_mat``.

        Returns:
            The paths written, the OBJ last.
        """
        stem = os.path.splitext(filename)[0]
        paths: list[str] = []
        material = None
        if save_mat:
            maps = {"map_Kd": ("texture_kd", map_Kd), "map_Ks": ("texture_ks", map_Ks),
                    "map_Bump": ("texture_nrm", map_Bump), "map_Pm": ("texture_metallic", map_Pm),
                    "map_Pr": ("texture_roughness", map_Pr)}
            lines = ["newmtl default", "Ka 0.0 0.0 0.0"]
            for key, (texture, data) in maps.items():
                if data is None:
                    lines += ["Kd 1.0 1.0 1.0"] if key == "map_Kd" else []
                    continue
                target = os.path.join(os.path.dirname(filename), f"{texture}.{map_format}")
                picture = (image_grid.rgb_picture(data) if np.ndim(self.convert_data(data)) == 3
                           else image_grid.grayscale_picture(data, (0, 1), None))
                paths.append(self._save_picture(target, picture))
                lines.append(f"{key} {texture}.{map_format}")
            text = "\n".join(lines) + "\n"
            paths.append(self._save(f"{stem}.mtl", lambda path: Path(path).write_text(text)))
            material = os.path.basename(f"{stem}.mtl")
        paths.append(self._save(f"{stem}.obj", lambda path: write_obj(
            path, mesh, material, save_normal, save_uv, save_vertex_color)))
        return paths

    def _save(self, filename: str, write: Callable[[str], Any],
              then: Callable[[str], None] | None = None) -> str:
        """Write through a temporary name, so that readers never see half a file."""
        path = os.path.join(self.get_save_dir(), filename)
        if get_rank() != 0:
            return path
        try:
            path = self.get_save_path(filename)
            with replacing(path) as temporary:
                write(temporary)
        except OSError as error:
            self.on_save_fault(path, error)
        else:
            if then is not None:
                then(path)
        return path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Yield a temporary name beside ``path``, with its suffix, and rename it there at the end."""
    folder, name = os.path.split(os.fspath(path))
    temporary = os.path.join(folder, f".{os.getpid()}-{name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _write_picture(path: str, picture: np.ndarray) -> None:
    import cv2

    if Path(path).suffix.lower() not in _IMAGE_TYPES:
        raise ValueError(
            f"{path!r} has no known picture suffix; expected one of {', '.join(_IMAGE_TYPES)}."
        )
    if picture.ndim == 3 and picture.shape[-1] == 3:
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    elif picture.ndim == 3 and picture.shape[-1] == 4:
        picture = cv2.cvtColor(picture, cv2.COLOR_RGBA2BGRA)
    encoded, data = cv2.imencode(Path(path).suffix, picture)
    if not encoded:
        raise ValueError(f"cannot encode an image of shape {picture.shape} for {path}.")
    # imwrite reports a full disk as False; writing the bytes ourselves keeps the cause.
    Path(path).write_bytes(data.tobytes())


def _write_video(path: str, frames: list[Path], save_format: str, fps: int) -> None:
    import imageio.v3 as iio

    if save_format == "gif":
        images = [_read_rgb(frame) for frame in frames]
        iio.imwrite(path, images, plugin="pillow", duration=1000.0 / fps, loop=0)
        return
    with iio.imopen(path, "w", plugin="pyav") as video:
        video.init_video_stream("libx264", fps=fps)
        for frame in frames:
            video.write_frame(_even(_read_rgb(frame)))


def _read_rgb(path: Path) -> np.ndarray:
    import cv2

    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"{path} is not a readable picture.")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _even(frame: np.ndarray) -> np.ndarray:
    """Repeat the last row and column of odd sizes: H.264 with 4:2:0 colour takes even ones only."""
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
