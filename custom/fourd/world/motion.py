"""How the objects of the world move: similarity transforms of scene time in [0, 1].

Every motion is the identity at time 0, so that the scene at rest is the moving scene's first frame.
All but growing and shrinking return to the identity at time 1 as well.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .grammar import WorldScene
from .vocabulary import PAIR_MOTION, PAIR_OFFSET, PAIR_SCALE, SIZES

BOUNCE_HEIGHT = 0.30
SLIDE_LENGTH = 0.30
ORBIT_RADIUS = 0.16
GROWTH = 1.35
"""Final scale of a growing object; a shrinking one ends at its inverse squared."""


ONE_WAY = ("growing", "shrinking")
"""Motions that do not return."""


def pose_of_motion(
    motion: str | None, frame_times: Float[Tensor, "*batch"]
) -> tuple[Float[Tensor, "*batch 3"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Displacement, turn about the object's own z axis, and scale of a motion.

    Args:
        motion: a word of `MOTIONS`, or None for rest.
        frame_times: scene time in [0, 1].

    Returns:
        displacement in scene units (to be multiplied by the layout's scale), angle in radians
        (counter-clockwise seen from above), scale factor.
    """
    zero, one = torch.zeros_like(frame_times), torch.ones_like(frame_times)
    turn = 2 * math.pi * frame_times
    x, y, z, angle, scale = zero, zero, zero, zero, one
    if motion == "bouncing":
        z = BOUNCE_HEIGHT * torch.sin(turn) ** 2
    elif motion == "sliding":
        y = SLIDE_LENGTH * torch.sin(turn)
    elif motion == "orbiting":
        x, y = ORBIT_RADIUS * (torch.cos(turn) - 1), ORBIT_RADIUS * torch.sin(turn)
    elif motion == "spinning":
        angle = turn
    elif motion == "growing":
        scale = GROWTH**frame_times
    elif motion == "shrinking":
        scale = GROWTH ** (-2 * frame_times)
    elif motion is not None:
        raise ValueError(f"'{motion}' is not a motion of the world.")
    return torch.stack((x, y, z), dim=-1), angle, scale


def returns_to_start(scene: WorldScene) -> bool:
    """Whether the scene at time 1 is the scene at time 0."""
    return not any(item.motion in ONE_WAY for item in scene.objects)


def object_poses(
    scene: WorldScene, frame_times: Float[Tensor, "batch"]
) -> list[tuple[Float[Tensor, "batch 3 3"], Float[Tensor, "batch 3"], Float[Tensor, "batch"]]]:
    """World pose of each object: x_world = scale * rotation @ x_object + translation."""
    poses = []
    count = len(scene.objects)
    layout_scale, reach = (1.0, 1.0) if count == 1 else (PAIR_SCALE, PAIR_MOTION)
    for index, item in enumerate(scene.objects):
        offset, angle, scale = pose_of_motion(item.motion, frame_times)
        centre = _layout_centre(index, count, scene.relation).to(offset)
        cos, sin = torch.cos(angle), torch.sin(angle)
        zero, one = torch.zeros_like(cos), torch.ones_like(cos)
        rotation = torch.stack((cos, -sin, zero, sin, cos, zero, zero, zero, one), dim=-1)
        translation = centre + offset * layout_scale * reach
        scale = scale**reach
        poses.append(
            (rotation.view(-1, 3, 3), translation, scale * SIZES[item.size] * layout_scale)
        )
    return poses


def _layout_centre(index: int, count: int, relation: str) -> Tensor:
    if count == 1:
        return torch.zeros(3)
    side = -1.0 if index == 0 else 1.0
    if relation == "on top of":
        return torch.tensor([0.0, 0.0, -side * PAIR_OFFSET])
    return torch.tensor([0.0, side * PAIR_OFFSET, 0.0])
