"""What a multi-view or video U-Net is told about its camera, as its class vector.

`mvdream` is the published vector: the 16 numbers of the camera-to-world matrix, its translation
scaled to unit length. It leaves apparent size unknown and four-fold silhouettes hard to tell, so
the embedded checkpoints add harmonics of azimuth and elevation and the size of the field of view.
The embedded video prior is told the scene time of each frame as well, and the products of time and
words: what a moment looks like depends on which motion the words name, and a sum of the two, all
that a U-Net's embeddings would make of them, takes it thousands of steps to tell. A spinning object
shows what a camera that goes around it the other way would see of one at rest; harmonics of the
azimuth are therefore those of the azimuth in the object's own frame, where the words say that it
spins. What was learned of shapes at rest then holds for shapes never seen spinning.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

AZIMUTH_HARMONICS = (1, 2, 3, 4, 6)
ELEVATION_HARMONICS = (1, 4)
TIME_HARMONICS = (1, 2, 3, 4)
CAMERA_VECTOR_SIZE = {"mvdream": 16, "embedded": 32}
TIME_NUMBERS = 1 + 2 * len(TIME_HARMONICS) + 2 * len(AZIMUTH_HARMONICS)
WORD_CHANNELS = 16
"""Leading channels of a text's last token state, which has attended to the whole text."""
SPIN_CHANNEL = WORD_CHANNELS
"""Channel of the last token's state that says how much of what the text names spins."""
SPIN_SLOPE = 4.0
VIDEO_VECTOR_SIZE = CAMERA_VECTOR_SIZE["embedded"] + TIME_NUMBERS * (1 + WORD_CHANNELS)


def camera_vector(
    c2w: Float[Tensor, "b 4 4"], fovy: Float[Tensor, "b"], kind: str = "mvdream"
) -> Float[Tensor, "b n"]:
    """The class vector of cameras that look at the origin.

    Args:
        c2w: camera-to-world matrices of the contract (right, up, backward, position; z up).
        fovy: vertical fields of view in radians; `mvdream` does not use them.
        kind: `mvdream` (16 numbers) or `embedded` (32 numbers: the 16, then cosine and sine of
            multiples of azimuth and of elevation, log of distance * tan(fovy / 2), and log of
            tan(fovy / 2)).

    The input is never written to.

    Raises:
        ValueError: `kind` is neither.
    """
    if kind not in CAMERA_VECTOR_SIZE:
        raise ValueError(
            f"'{kind}' is no kind of camera vector; expected one of "
            f"{', '.join(CAMERA_VECTOR_SIZE)}."
        )
    position = c2w[:, :3, 3]
    distance = position.norm(dim=-1, keepdim=True)
    normalized = c2w.clone()
    normalized[:, :3, 3] = position / (distance + 1e-8)
    numbers = [normalized.flatten(1)]
    if kind == "embedded":
        azimuth = torch.atan2(position[:, 1:2], position[:, :1])
        elevation = torch.atan2(position[:, 2:], position[:, :2].norm(dim=-1, keepdim=True))
        for angle, harmonics in (
            (azimuth, AZIMUTH_HARMONICS),
            (elevation, ELEVATION_HARMONICS),
        ):
            for harmonic in harmonics:
                numbers += [torch.cos(harmonic * angle), torch.sin(harmonic * angle)]
        opening = torch.tan(0.5 * fovy).unsqueeze(-1)
        numbers += [torch.log(distance * opening), torch.log(opening)]
    return torch.cat(numbers, dim=-1)


def video_class_vector(
    c2w: Float[Tensor, "b 4 4"],
    fovy: Float[Tensor, "b"],
    frame_times: Float[Tensor, "b"],
    text_states: Float[Tensor, "b l d"],
) -> Float[Tensor, "b n"]:
    """The class vector of a clip's frames: camera, scene time, and words times scene time.

    The camera's harmonics of azimuth are blended with those of azimuth - 2 pi t by the share of
    what the text names that spins (`spin_logit`).

    Args:
        c2w: camera-to-world matrix of each frame.
        fovy: vertical field of view of each frame in radians.
        frame_times: scene time of each frame in [0, 1].
        text_states: token states of each frame's text, at least 17 wide.

    Differentiable in all of them.
    """
    return with_words(camera_and_time(c2w, fovy, frame_times), text_states)


def camera_and_time(
    c2w: Float[Tensor, "b 4 4"], fovy: Float[Tensor, "b"], frame_times: Float[Tensor, "b"]
) -> Float[Tensor, "b m"]:
    """The part of `video_class_vector` that the words have no part in.

    Returns:
        32 numbers of the camera (`embedded`); t; cosine and sine of k 2 pi t for k in
        `TIME_HARMONICS`; cosine and sine of k (azimuth - 2 pi t) for k in `AZIMUTH_HARMONICS`, the
        azimuth as an object sees it that turns once in the clip.
    """
    azimuth = torch.atan2(c2w[:, 1, 3], c2w[:, 0, 3])
    turn = 2 * math.pi * frame_times
    angles = [harmonic * turn for harmonic in TIME_HARMONICS]
    angles += [harmonic * (azimuth - turn) for harmonic in AZIMUTH_HARMONICS]
    numbers = [frame_times]
    for angle in angles:
        numbers += [torch.cos(angle), torch.sin(angle)]
    camera = camera_vector(c2w, fovy, "embedded")
    return torch.cat((camera, torch.stack(numbers, dim=-1)), dim=-1)


def with_words(
    vectors: Float[Tensor, "b m"], text_states: Float[Tensor, "b l d"]
) -> Float[Tensor, "b n"]:
    """Make `video_class_vector` of `camera_and_time`: what the words have a part in is added."""
    azimuths = 2 * len(AZIMUTH_HARMONICS)
    matrix, azimuth, other, time = vectors.split(
        (16, azimuths, CAMERA_VECTOR_SIZE["embedded"] - 16 - azimuths, TIME_NUMBERS), dim=-1
    )
    spins = torch.sigmoid(spin_logit(text_states)).to(vectors).unsqueeze(-1)
    azimuth = torch.lerp(azimuth, time[:, -azimuths:], spins)
    words = text_states[:, -1, :WORD_CHANNELS].to(vectors)
    products = (words.unsqueeze(-1) * time.unsqueeze(-2)).flatten(1)
    return torch.cat((matrix, azimuth, other, time, products), dim=-1)


def spin_logit(text_states: Float[Tensor, "b l d"]) -> Float[Tensor, "b"]:
    """Logit of the share of the named objects that spin, as the text encoder was taught to say."""
    return SPIN_SLOPE * text_states[:, -1, SPIN_CHANNEL]
