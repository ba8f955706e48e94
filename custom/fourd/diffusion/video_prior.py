"""The embedded video prior: an image U-Net whose self-attention joins the frames of a clip."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from threestudio.models.guidance.base import PRIOR_COMPONENTS
from threestudio.models.guidance.noise_schedule import NoiseSchedule, noise_schedule
from threestudio.utils.diffusers_folder import load_model, read_config
from threestudio.utils.pretrained import resolve_pretrained

from .camera_vector import VIDEO_VECTOR_SIZE


@dataclass(frozen=True)
class VideoFacts:
    """What `video.json` beside `model_index.json` says of a video prior."""

    num_frames: int = 16
    """Frames of a clip that the model was trained with at most."""
    class_vector: str = "embedded-spin"
    """What its class vector holds: `camera_vector.video_class_vector`."""
    image_size: int = 64
    """Edge of a frame in pixels."""


@dataclass(frozen=True)
class VideoPrior:
    """A frozen video diffusion model over frames of an image autoencoder."""

    unet: torch.nn.Module
    """`UNet2DConditionModel`; `set_cross_view_attention(unet, T)` joins the T frames of a clip."""
    autoencoder: torch.nn.Module
    """`AutoencoderKL`, or a model with its interface; sees one frame at a time."""
    schedule: NoiseSchedule
    """The schedule it was trained with."""
    facts: VideoFacts


def read_video_facts(root: Path) -> VideoFacts:
    """Read `video.json` of a folder.

    Raises:
        ValueError: there is no such file, or it holds an unknown key, a value of the wrong type or
            a kind of class vector that does not exist.
    """
    path = Path(root) / "video.json"
    if not path.is_file():
        raise ValueError(
            f"{root} holds no video.json; expected the folder of an embedded video prior. For "
            "UNet3DConditionModel choose guidance_type_video: zeroscope-guidance."
        )
    content = json.loads(path.read_text(encoding="utf-8"))
    types = {"num_frames": int, "class_vector": str, "image_size": int}
    assert types.keys() == {field.name for field in fields(VideoFacts)}
    for key, value in content.items():
        if key not in types or not isinstance(value, types[key]):
            expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in types.items())
            raise ValueError(f"{path} holds {key}={value!r}; expected the keys {expected}.")
    facts = VideoFacts(**content)
    if facts.class_vector != "embedded-spin":
        raise ValueError(
            f"{path} asks for the class vector {facts.class_vector!r}; expected 'embedded-spin'. "
            "Remake it with custom.fourd.scripts.train_video."
        )
    return facts


def load_video_prior(
    name: str,
    revision: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> VideoPrior:
    """Load an embedded video prior, frozen and in evaluation mode; attention sees single frames.

    Args:
        name: folder, hub id or ``embedded://name``, in diffusers layout with a `video.json`.
        revision: commit of a hub id.
        device: where the model goes; None leaves it where torch creates tensors.
        dtype: precision of its weights.

    Raises:
        ModelUnavailableError: if the model cannot be had.
        ValueError: if the folder is no embedded video prior, or its U-Net's class vector has
            another size.
    """
    device = torch.empty(0).device if device is None else device
    root = resolve_pretrained(name, revision, components=PRIOR_COMPONENTS)
    facts = read_video_facts(root)
    size = read_config(root, "unet").get("projection_class_embeddings_input_dim")
    if size != VIDEO_VECTOR_SIZE:
        raise ValueError(
            f"The U-Net of '{name}' takes a class vector of {size} numbers; expected "
            f"{VIDEO_VECTOR_SIZE} (camera, scene time, words times time). Remake it with "
            "custom.fourd.scripts.train_video."
        )
    return VideoPrior(
        load_model(root, "unet", device, dtype),
        load_model(root, "vae", device, dtype),
        noise_schedule(read_config(root, "scheduler")),
        facts,
    )
