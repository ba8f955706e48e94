"""Random cameras for images and clips of a moving scene (4D-fy): `single-view-camera-datamodule`.

Static settings give exactly `random-camera-datamodule`. Otherwise a batch also says at which scene
times in [0, 1] it is to be rendered, and whether it is a clip for the video prior.
"""

from dataclasses import dataclass
from typing import Any

import threestudio
import torch
from jaxtyping import Float
from threestudio.data.camera_config import (
    validate_camera_config,
    validate_count,
    validate_number,
)
from threestudio.data.camera_sampling import (
    CameraSample,
    ItemSpan,
    draw_uniform,
    place_cameras,
    sample_azimuth_deg,
    sample_elevation_deg,
)
from threestudio.data.uncond import (
    RandomCameraDataModule,
    RandomCameraDataModuleConfig,
    RandomCameraDataset,
    RandomCameraIterableDataset,
)
from threestudio.utils.ops import get_ray_directions
from threestudio.utils.rng import generator
from torch import Tensor

from ..ops.camera import motion_smooth_path, relative_distance, stop_and_sweep_path

TEST_TRAJECTORIES = (None, "motion_smooth", "motion_smooth_full")


@dataclass
class SingleViewCameraDataModuleConfig(RandomCameraDataModuleConfig):
    """Keys of `single-view-camera-datamodule`, beyond those of `random-camera-datamodule`."""

    static: bool = True
    """the scene does not move"""
    relative_radius: bool = False
    """multiply the distance of images and clips by 1 / tan(fovy / 2), so that it is the visible
    half height; evaluation keeps eval_camera_distance"""
    num_frames: int = 1
    """scene times per clip"""
    sample_rand_frames: str | None = None
    """null: times evenly over [0, 1], ends included; "t0": t0 + k / num_frames, t0 random"""
    simultan: bool = False
    """train images and clips in one run"""
    prob_single_view_video: float | None = None
    """with simultan, probability that a step is a clip"""
    width_vid: int = 64
    """width of a clip in pixels"""
    height_vid: int = 64
    """height of a clip in pixels"""
    num_frames_factor: int = 1
    """evaluation renders num_frames * num_frames_factor times"""
    train_dynamic_camera: bool = False
    """move the camera within a clip, at a random constant speed"""
    num_test_loop_factor: int = 1
    """clips played while the default test path turns by 90 degrees"""
    num_test_loop_static: int = 4
    """stops of the test path"""
    test_traj: str | None = None
    """path of a dynamic test: null, "motion_smooth" or "motion_smooth_full", see `ops.camera`"""
    update_from_json: bool = True
    """accepted for upstream's configs; has no effect"""


def is_dynamic(cfg: Any) -> bool:
    """Return whether batches of this configuration carry scene times."""
    return not cfg.static or cfg.num_frames > 1 or cfg.simultan


def validate_single_view_config(cfg: Any, where: str = "data") -> None:
    """Check every key of `single-view-camera-datamodule`.

    Raises:
        ValueError: naming the key, its value, what was expected and how to repair it.
    """
    validate_camera_config(cfg, where)
    for key in (
        "num_frames",
        "num_frames_factor",
        "width_vid",
        "height_vid",
        "num_test_loop_factor",
        "num_test_loop_static",
    ):
        validate_count(getattr(cfg, key), f"{where}.{key}", 1)
    if cfg.sample_rand_frames not in (None, "t0"):
        raise ValueError(
            f"{where}.sample_rand_frames is {cfg.sample_rand_frames!r}; expected null or 't0'."
        )
    if cfg.prob_single_view_video is not None:
        validate_number(cfg.prob_single_view_video, f"{where}.prob_single_view_video", 0, 1)
    if cfg.test_traj not in TEST_TRAJECTORIES:
        raise ValueError(
            f"{where}.test_traj is {cfg.test_traj!r}; expected null, 'motion_smooth' or "
            f"'motion_smooth_full'."
        )
    n_times, n_stops = cfg.num_frames * cfg.num_frames_factor, cfg.num_test_loop_static
    if not cfg.static and cfg.test_traj is not None and (n_stops % 2 or n_times % n_stops):
        raise ValueError(
            f"{where}.test_traj is {cfg.test_traj!r} with num_test_loop_static {n_stops} and "
            f"num_frames * num_frames_factor {n_times}; expected an even number of stops that "
            f"divides the number of times."
        )


def draw_guidance_choice(step: int) -> tuple[float, float]:
    """Draw two numbers of U[0, 1) that decide a step's guidance, equal on every process.

    The first decides multi-view against single-view, the second clip against image.
    """
    draws = torch.rand(2, generator=generator("guidance-choice", step), dtype=torch.float64)
    return float(draws[0]), float(draws[1])


def sample_frame_times(cfg: Any, step: int) -> Float[Tensor, "num_frames"]:
    """Return the scene times of a step's clip, in [0, 1], equal on every process.

    "t0" draws t0 from U[0, 1/T) and takes t0 + k/T, so that every time is visited over training.
    """
    if cfg.sample_rand_frames is None:
        return torch.linspace(0.0, 1.0, cfg.num_frames)
    offset = torch.rand((), generator=generator("frame-times", step))
    return (torch.arange(cfg.num_frames) + offset) / cfg.num_frames


class SingleViewCameraIterableDataset(RandomCameraIterableDataset):
    """Random cameras, of which each is the camera of an image or of a whole clip."""

    def __init__(self, cfg: Any, where: str = "data") -> None:
        validate_single_view_config(cfg, where)
        super().__init__(cfg, where)
        if cfg.prob_single_view_video and not cfg.simultan:
            threestudio.warn(
                "%s.prob_single_view_video has no effect without %s.simultan: true.", where, where
            )
        self.height_vid = cfg.height_vid if cfg.simultan else None
        self.width_vid = cfg.width_vid if cfg.simultan else None

    def collate(self, batch: dict[str, int]) -> dict[str, Any]:
        """Return the cameras of a step; see `RandomCameraIterableDataset.collate`.

        Further keys: "single_view", "is_video", "train_dynamic_camera" (booleans),
        "images_per_group" (neighbours in the batch that show one object or clip) and, where the
        scene moves, "frame_times" and "frame_times_video" [T]. With a moving camera the T frames
        of one clip follow each other in the batch; otherwise one camera serves all times.
        """
        place = self._place(batch)
        self._set_step(place.step)
        is_video = self.is_video_step(place.step)
        camera_moves = is_video and self.cfg.train_dynamic_camera
        span = self._span(place, self.batch_size)
        cameras = self.sample_moving_cameras(span) if camera_moves else self.sample_cameras(span)
        directions = self.directions_unit_focal
        if is_video:
            directions = get_ray_directions(self.cfg.height_vid, self.cfg.width_vid, 1.0)
        flags = {
            "single_view": True,
            "is_video": is_video,
            "train_dynamic_camera": camera_moves,
            "images_per_group": self.cfg.num_frames if camera_moves else 1,
        }
        return self._assemble(cameras, place.step, directions) | flags | self._times(place.step)

    def sample_cameras(self, span: ItemSpan) -> CameraSample:
        """Draw the cameras of images, or one per clip; see `RandomCameraIterableDataset`."""
        if not self.cfg.relative_radius:
            return super().sample_cameras(span)
        elevation_deg = sample_elevation_deg(span, self.elevation_range)
        azimuth_deg = sample_azimuth_deg(
            span, self.azimuth_range, stratified=self.cfg.batch_uniform_azimuth
        )
        fovy_rad = torch.deg2rad(draw_uniform(span, "fovy", *self.fovy_range))
        distance = draw_uniform(span, "distance", *self.camera_distance_range)
        distance = relative_distance(distance, fovy_rad)
        return place_cameras(span, self.cfg, elevation_deg, azimuth_deg, distance, fovy_rad)

    def is_video_step(self, step: int) -> bool:
        """Return whether ``step`` trains on a clip; equal on every process."""
        probability = self.cfg.prob_single_view_video
        if not self.cfg.simultan or probability is None:
            return False
        return draw_guidance_choice(step)[1] < probability

    def sample_moving_cameras(self, span: ItemSpan) -> CameraSample:
        """Draw cameras that move at a constant random speed, T = num_frames of them per clip.

        Per frame, elevation changes by up to 180/16/T degrees, azimuth by up to 180/2/T, and the
        distance by up to 1/T of what is left of its range. All stay within their ranges; the
        azimuth is free where its range is a full turn. With `relative_radius` the distances are
        multiplied last.
        """
        num_frames = self.cfg.num_frames
        frames = torch.arange(num_frames, dtype=torch.float32)

        def move(start: Tensor, speed: Tensor, bounds: tuple[float, float]) -> Tensor:
            return (start[:, None] + speed[:, None] * frames).clamp(*bounds).flatten()

        swing_deg = 180.0 / (16 * num_frames)
        elevation_speed = draw_uniform(span, "elevation-speed", -swing_deg, swing_deg)
        elevation_deg = sample_elevation_deg(span, self.elevation_range)
        turn_deg = 180.0 / (2 * num_frames)
        azimuth_speed = draw_uniform(span, "azimuth-speed", -turn_deg, turn_deg)
        azimuth_deg = sample_azimuth_deg(
            span, self.azimuth_range, stratified=self.cfg.batch_uniform_azimuth
        )
        low, high = self.azimuth_range
        azimuth_bounds = (low, high) if high - low < 360.0 else (-torch.inf, torch.inf)
        near, far = self.camera_distance_range
        distance = draw_uniform(span, "distance", near, far)
        target = near + (far - near) * draw_uniform(span, "distance-speed", 0.0, 1.0)
        fovy_rad = torch.deg2rad(draw_uniform(span, "fovy", *self.fovy_range))
        fovy_rad = fovy_rad.repeat_interleave(num_frames)
        distances = move(distance, (target - distance) / num_frames, (near, far))
        if self.cfg.relative_radius:
            distances = relative_distance(distances, fovy_rad)
        return place_cameras(
            span,
            self.cfg,
            move(elevation_deg, elevation_speed, self.elevation_range),
            move(azimuth_deg, azimuth_speed, azimuth_bounds),
            distances,
            fovy_rad,
        )

    def _times(self, step: int) -> dict[str, Tensor]:
        if not is_dynamic(self.cfg):
            return {}
        frame_times = sample_frame_times(self.cfg, step)
        return {"frame_times": frame_times, "frame_times_video": frame_times}


class SingleViewCameraDataset(RandomCameraDataset):
    """Validation and test views, with scene times where the scene moves.

    Validation spreads its views over the clip; the test walks along `test_traj`.
    """

    def __init__(self, cfg: Any, split: str) -> None:
        self._n_times = cfg.num_frames * cfg.num_frames_factor
        self._frame_times: Tensor | None = None
        super().__init__(cfg, split)

    def view_azimuths_deg(self) -> Tensor:
        """Return the azimuth of each view in degrees, and fix the scene time of each."""
        cfg = self.cfg
        if cfg.static:
            return super().view_azimuths_deg()
        if self.split == "val":
            clip = torch.linspace(0.0, 1.0, self._n_times)
            places = torch.arange(cfg.n_val_views) * self._n_times // cfg.n_val_views
            self._frame_times = clip[places]
            return super().view_azimuths_deg()
        if cfg.test_traj is None:
            azimuth_deg, self._frame_times = stop_and_sweep_path(
                self._n_times, cfg.num_test_loop_static, cfg.num_test_loop_factor
            )
        else:
            azimuth_deg, self._frame_times = motion_smooth_path(
                self._n_times, cfg.num_test_loop_static, cfg.test_traj == "motion_smooth"
            )
        return azimuth_deg

    def collate(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """Stack views; where the scene moves, "frame_times" [B] holds the time of each view.

        "frame_times_video" [T] holds all times of the clip.
        """
        collated = super().collate(batch)
        if self._frame_times is None:
            return collated
        return collated | {
            "frame_times": self._frame_times[collated["index"]],
            "frame_times_video": torch.linspace(0.0, 1.0, self._n_times),
            "train_dynamic_camera": False,
        }


@threestudio.register("single-view-camera-datamodule")
class SingleViewCameraDataModule(RandomCameraDataModule):
    """Random cameras for images and clips; see `RandomCameraDataModule`."""

    Config = SingleViewCameraDataModuleConfig
    train_dataset_class = SingleViewCameraIterableDataset
    eval_dataset_class = SingleViewCameraDataset

    def validate_config(self) -> None:
        """Raise ValueError where the configuration cannot work."""
        validate_single_view_config(self.cfg)
