"""What a mapper is told: the moment and the camera of the target, absolute, relative or both.

The relative inputs go from the condition frame i, seen by camera a, to the target j, seen by camera
b. Each camera is a mapping with ``c2w`` [b 4 4] and ``fovy`` (radians), ``elevation``, ``azimuth``
(degrees) and ``radius`` (scene units) [b], as the pair source gives it. Angles of azimuth enter as
sine and cosine, so that a full turn ends where it began.

Dimensions: ``b`` samples, ``n_axes`` numbers for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Camera = Mapping[str, Tensor]

INPUT_MODES = ("absolute", "relative", "both")
TIME_DISTANCES = ("signed", "unsigned")


@dataclass(frozen=True)
class ControlAxis:
    """One number that a mapper is told.

    The range [low, high] goes to [-1, 1]. It is exact where ``measured`` is False; where it is
    True, it stands until the mapper has seen the training set's own (`Mapper.set_ranges`).
    """

    name: str
    family: str
    low: float = -1.0
    high: float = 1.0
    measured: bool = False


def _measured(name: str, low: float, high: float) -> ControlAxis:
    return ControlAxis(name, "view", low, high, measured=True)


_QUARTER = math.pi / 2
_SE3 = (
    *(ControlAxis(f"rotation_{i}", "view") for i in range(6)),
    *(_measured(f"translation_{axis}", -2.0, 2.0) for axis in "xyz"),
)
VIEW_AXES: dict[str, tuple[ControlAxis, ...]] = {
    "rel_spherical": (
        _measured("delta_elevation", -_QUARTER, _QUARTER),
        ControlAxis("sin_delta_azimuth", "view"),
        ControlAxis("cos_delta_azimuth", "view"),
        _measured("log_radius_ratio", -1.0, 1.0),
        _measured("elevation_a", -_QUARTER, _QUARTER),
    ),
    "abs_spherical": (
        _measured("elevation_b", -_QUARTER, _QUARTER),
        ControlAxis("sin_azimuth_b", "view"),
        ControlAxis("cos_azimuth_b", "view"),
        _measured("log_radius_b", -1.0, 2.0),
    ),
    "rel_se3": _SE3,
    "rel_se3_focal": (*_SE3, _measured("log_focal_ratio", -1.0, 1.0)),
    "flat12": tuple(_measured(f"matrix_{i // 4}{i % 4}", -2.0, 2.0) for i in range(12)),
}
"""What each view parameterisation tells of the cameras."""
ABSOLUTE_VIEWS = ("abs_spherical", "flat12")
RELATIVE_VIEWS = ("rel_spherical", "rel_se3", "rel_se3_focal")


def time_axes(mode: str = "both", distance: str = "signed") -> tuple[ControlAxis, ...]:
    """What a TimeMapper is told: the target's time in [0, 1], its distance from i, or both.

    Args:
        mode: one of `INPUT_MODES`. A distance alone cannot know how a scene moves unless the image
            prompt or a scene code tells it.
        distance: ``signed`` (time_j - time_i) or ``unsigned``, which cannot tell after from before.

    Raises:
        ValueError: another mode or distance.
    """
    _check("time_input", mode, INPUT_MODES)
    _check("time_distance", distance, TIME_DISTANCES)
    absolute = ControlAxis("time_j", "time", 0.0, 1.0)
    name = "delta_time" if distance == "signed" else "distance_time"
    return _of_mode(mode, (absolute,), (ControlAxis(name, "time"),))


def view_axes(
    mode: str = "both", relative: str = "rel_spherical", absolute: str = "abs_spherical"
) -> tuple[ControlAxis, ...]:
    """What a ViewMapper is told.

    Args:
        mode: one of `INPUT_MODES`.
        relative: one of `RELATIVE_VIEWS`; ``rel_se3`` is rotation (two columns) and translation of
            camera b in the frame of camera a, in units of the radius of camera a.
        absolute: one of `ABSOLUTE_VIEWS`; ``flat12`` is the upper 3 x 4 of the pose.

    Raises:
        ValueError: another mode or parameterisation.
    """
    _check("view_input", mode, INPUT_MODES)
    _check("view_relative", relative, RELATIVE_VIEWS)
    _check("view_absolute", absolute, ABSOLUTE_VIEWS)
    return _of_mode(mode, VIEW_AXES[absolute], VIEW_AXES[relative])


def time_numbers(time_i: Float[Tensor, "b"], time_j: Float[Tensor, "b"]) -> dict[str, Tensor]:
    """Every number that a time axis may ask for; scene times in [0, 1]."""
    delta = time_j - time_i
    return {"time_j": time_j, "delta_time": delta, "distance_time": delta.abs()}


def view_numbers(camera_a: Camera, camera_b: Camera) -> dict[str, Tensor]:
    """Every number that a view axis may ask for."""
    elevation_a, azimuth_a, radius_a = _spherical(camera_a)
    elevation_b, azimuth_b, radius_b = _spherical(camera_b)
    turn = azimuth_b - azimuth_a
    numbers = {
        "delta_elevation": elevation_b - elevation_a,
        "sin_delta_azimuth": turn.sin(),
        "cos_delta_azimuth": turn.cos(),
        "log_radius_ratio": torch.log(radius_b / radius_a),
        "elevation_a": elevation_a,
        "elevation_b": elevation_b,
        "sin_azimuth_b": azimuth_b.sin(),
        "cos_azimuth_b": azimuth_b.cos(),
        "log_radius_b": radius_b.log(),
        # The focal length is proportional to 1 / tan(fovy / 2).
        "log_focal_ratio": torch.log(_half_opening(camera_a) / _half_opening(camera_b)),
    }
    pose_a, pose_b = camera_a["c2w"], camera_b["c2w"]
    to_a = pose_a[:, :3, :3].transpose(-1, -2)
    rotation = to_a @ pose_b[:, :3, :3]
    offset = (pose_b[:, :3, 3] - pose_a[:, :3, 3]).unsqueeze(-1)
    translation = (to_a @ offset).squeeze(-1) / radius_a.unsqueeze(-1)
    columns = rotation[:, :, :2].transpose(-1, -2).flatten(1)
    numbers |= {f"rotation_{i}": columns[:, i] for i in range(6)}
    numbers |= {f"translation_{axis}": translation[:, i] for i, axis in enumerate("xyz")}
    flat = pose_b[:, :3, :4]
    numbers |= {f"matrix_{i // 4}{i % 4}": flat[:, i // 4, i % 4] for i in range(12)}
    return numbers


def control_values(
    axes: Sequence[ControlAxis], batch: Mapping[str, Tensor | Camera]
) -> Float[Tensor, "b n_axes"]:
    """The numbers of ``axes``, not yet scaled, from a batch of the pair source.

    Args:
        axes: of `time_axes`, `view_axes`, or one after the other.
        batch: ``time_i`` and ``time_j`` [b] if a time axis asks, ``camera_a`` and ``camera_b`` if a
            view axis does.

    Raises:
        ValueError: the batch lacks what an axis asks for.
    """
    numbers: dict[str, Tensor] = {}
    for family, keys, function in (
        ("time", ("time_i", "time_j"), time_numbers),
        ("view", ("camera_a", "camera_b"), view_numbers),
    ):
        if not any(axis.family == family for axis in axes):
            continue
        missing = [key for key in keys if key not in batch]
        if missing:
            raise ValueError(
                f"the batch has no {' and no '.join(missing)}; expected both {' and '.join(keys)} "
                f"for a mapper that is told the {family}."
            )
        numbers |= function(*(batch[key] for key in keys))
    return torch.stack([numbers[axis.name] for axis in axes], dim=-1)


def neutral_batch(batch: Mapping[str, Tensor | Camera], family: str) -> dict[str, Tensor | Camera]:
    """The batch with one control at rest: the target's time, or camera, is the condition's."""
    if family == "time":
        return {**batch, "time_j": batch["time_i"]}
    return {**batch, "camera_b": batch["camera_a"]}


def _of_mode(mode: str, absolute: tuple, relative: tuple) -> tuple[ControlAxis, ...]:
    return {"absolute": absolute, "relative": relative, "both": (*absolute, *relative)}[mode]


def _check(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{key} is {value!r}; expected one of {', '.join(known)}.")


def _spherical(camera: Camera) -> tuple[Tensor, Tensor, Tensor]:
    return torch.deg2rad(camera["elevation"]), torch.deg2rad(camera["azimuth"]), camera["radius"]


def _half_opening(camera: Camera) -> Tensor:
    return torch.tan(0.5 * camera["fovy"])
