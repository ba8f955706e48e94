"""Score distillation from Wan (Wan Team 2025), a flow-matching transformer of video latents.

The autoencoder is causal in time: one latent frame for the first frame, one for each four that
follow. So the gradient goes through the whole encoder, and short clips are what saves memory.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import threestudio
import torch
from jaxtyping import Float, Real
from threestudio.models.guidance.latent_images import encode_images, resize_images
from threestudio.models.guidance.noise_schedule import flow_schedule
from threestudio.models.guidance.score_distillation import (
    flow_scales,
    flow_weight,
    shift_noise_levels,
    weighted_residual,
)
from threestudio.utils.diffusers_folder import load_model, read_config
from threestudio.utils.pretrained import RequiredModel, resolve_pretrained
from torch import Tensor

from .video_guidance import ClipCameras, VideoDiffusionGuidance

WAN_COMPONENTS = ("transformer", "vae", "scheduler")


@threestudio.register("wan-guidance")
class WanGuidance(VideoDiffusionGuidance):
    """Video SDS in flow form, w (v_hat - (noise - clean)).

    Noisy latents are (1 - s) clean + s noise and the model is told 1000 s. ``min_step_percent`` and
    ``max_step_percent`` bound s before it is shifted; ``min_step`` and ``max_step`` likewise.
    """

    @dataclass
    class Config(VideoDiffusionGuidance.Config):
        """Keys of the base, what flow matching adds, and the size of the frames."""

        pretrained_model_name_or_path: str | None = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        """Folder or hub id with transformer, vae and scheduler, of Wan 2.1's shape."""
        guidance_scale: Any = 5.0
        """s of v_uncond + s (v_text - v_uncond); 5 is the sampler's, beyond 20 colours burn."""
        weighting_strategy: str = "uniform"
        """w: "uniform" is 1, "epsilon" 1 - s (the noise form), "reconstruction" s (the clean
        latents' form); see `flow_weight`."""
        shift: float | None = 1.0
        """k of s' = k s / (1 + (k - 1) s), which moves the drawn noise levels towards the noise; 1
        leaves them, None takes the k of the model's own sampler."""
        half_precision_vae: bool = False
        """Run the autoencoder in bf16 off the CPU, too; its gradient gets coarser."""
        width: int = 832
        """Width of the frames that the model sees, pixels; renders are resized to it."""
        height: int = 480
        """Their height."""

    cfg: Config
    guidance_convention = "standard"

    @classmethod
    def required_models(cls, cfg: Mapping[str, Any]) -> list[str]:
        """List the model that a guidance of this configuration will load."""
        name = cfg.get("pretrained_model_name_or_path") or cls.Config.pretrained_model_name_or_path
        return [RequiredModel(name, WAN_COMPONENTS, cfg.get("revision"))]

    def configure(self) -> None:
        """Load the prior.

        Raises:
            ModelUnavailableError: if it cannot be had.
            ValueError: if it is no Wan 2.1 for text, does not match flows, or a key has a value
                that is not provided.
        """
        self._check_keys()
        name = self.cfg.pretrained_model_name_or_path
        root = resolve_pretrained(name, self.cfg.revision, components=WAN_COMPONENTS)
        _check_model(root, name)
        schedule = flow_schedule(read_config(root, "scheduler"))
        self.shift = schedule.shift if self.cfg.shift is None else self.cfg.shift
        self.weights_dtype = self.weights_dtype_for(self.device)
        self.transformer = load_model(root, "transformer", self.device, self.weights_dtype)
        vae_dtype = self.weights_dtype if self.cfg.half_precision_vae else torch.float32
        self.vae = load_model(root, "vae", self.device, vae_dtype)
        self._set_frame_size()
        self.setup_schedule(schedule)

    def weights_dtype_for(self, device: torch.device) -> torch.dtype:
        """Return bf16, in which Wan was trained, where the base would return fp16."""
        half = super().weights_dtype_for(device) == torch.float16
        return torch.bfloat16 if half else torch.float32

    def draw_timesteps(self, role: str, batch: int, shared: bool) -> Float[Tensor, "b"]:
        """Draw 1000 s: s uniform between ``min_step_percent`` and ``max_step_percent``, shifted."""
        steps = self.num_train_timesteps
        levels = super().draw_timesteps(role, batch, shared) / steps
        return steps * shift_noise_levels(levels, self.shift)

    def scales(self, timesteps: Real[Tensor, "B"]) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Return (signal_scale, noise_scale) = (1 - s, s) of each clip."""
        return flow_scales(timesteps.float() / self.num_train_timesteps)

    def sds_residual(
        self,
        guided: Float[Tensor, "B c t h w"],
        noise_pred: Float[Tensor, "B c t h w"],
        latents: Float[Tensor, "B c t h w"],
        noise: Float[Tensor, "B c t h w"],
        signal_scale: Float[Tensor, "B"],
        noise_scale: Float[Tensor, "B"],
    ) -> Float[Tensor, "B c t h w"]:
        """Return w (v_hat - (noise - clean))."""
        weight = flow_weight(self.cfg.weighting_strategy, signal_scale, noise_scale)
        return weighted_residual(guided, noise - latents, weight)

    def encode_clips(
        self, rgb: Float[Tensor, "N H W C"], num_frames: int, rgb_as_latents: bool = False
    ) -> Float[Tensor, "B c t h w"]:
        """Return (z - mean) / std of clips in [0, 1], t = 1 + (T - 1) / 4; differentiable.

        z is the posterior's mean, as in Wan's training. Latents given as ``rgb`` are resized.

        Raises:
            ValueError: if T is not 4 k + 1; the encoder would drop the frames that are left over.
        """
        if rgb_as_latents:
            return super().encode_clips(rgb, num_frames, rgb_as_latents)
        group = self.vae.config.scale_factor_temporal
        if (num_frames - 1) % group:
            lower = (num_frames - 1) // group * group + 1
            raise ValueError(
                f"A clip has {num_frames} frames; expected {group} k + 1, since the autoencoder of "
                f"Wan joins {group} frames after the first. Set data.single_view.num_frames to "
                f"{lower} or {lower + group}."
            )
        frames = resize_images(rgb.permute(0, 3, 1, 2).float(), self.frame_size)
        return encode_images(self.vae, frames.unflatten(0, (-1, num_frames)).transpose(1, 2))

    def predict(
        self,
        noisy: Float[Tensor, "n c t h w"],
        timesteps: Real[Tensor, "n"],
        text: Float[Tensor, "n l d"],
        cameras: ClipCameras,
    ) -> Float[Tensor, "n c t h w"]:
        """Return the velocity, noise - clean, of each clip; cameras are not read.

        Raises:
            ValueError: if the text comes from another model's prompt processor.
        """
        width = self.transformer.config.text_dim
        if text.shape[-1] != width:
            raise ValueError(
                f"The text embeddings are {text.shape[-1]} wide; expected {width}. Set "
                "prompt_processor_type_video: wan-prompt-processor, with the same model."
            )
        return self.transformer(noisy, timesteps, text, return_dict=False)[0]

    def _check_keys(self) -> None:
        for key, value in (("use_sjc", self.cfg.use_sjc), ("low_ram_vae", self.cfg.low_ram_vae)):
            if value is True or (key == "low_ram_vae" and value > 0):
                raise ValueError(
                    f"{key} is {value}; expected {'false' if key == 'use_sjc' else '-1'}, since "
                    "wan-guidance has no such form: its velocities have no noise to leave out, and "
                    "its autoencoder sees all frames of a clip together. Use shorter clips."
                )
        # Named at start-up rather than at the first step.
        flow_weight(self.cfg.weighting_strategy, torch.ones(1), torch.ones(1))
        if self.cfg.shift is not None and self.cfg.shift <= 0:
            raise ValueError(f"shift is {self.cfg.shift}; expected a positive number, or null.")

    def _set_frame_size(self) -> None:
        _, rows, columns = self.transformer.config.patch_size
        factor = self.vae.config.scale_factor_spatial
        height, width = self.cfg.height, self.cfg.width
        if height % (factor * rows) or width % (factor * columns):
            raise ValueError(
                f"width is {width} and height {height}; expected multiples of {factor * columns} "
                f"and {factor * rows}, a patch of the transformer in pixels."
            )
        self.frame_size = (height, width)


def _check_model(root: Path, name: str) -> None:
    """Refuse folders of other models, and of Wan's with further inputs or a second transformer."""
    transformer, autoencoder = read_config(root, "transformer"), read_config(root, "vae")
    kinds = (transformer.get("_class_name"), autoencoder.get("_class_name"))
    if kinds != ("WanTransformer3DModel", "AutoencoderKLWan"):
        raise ValueError(
            f"'{name}' holds a {kinds[0]} and a {kinds[1]}; expected WanTransformer3DModel and "
            "AutoencoderKLWan. Choose the guidance_type_video that fits this model."
        )
    path = root / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if index.get("boundary_ratio") is not None or index.get("expand_timesteps"):
        raise ValueError(
            f"'{name}' is a Wan 2.2 with two transformers or a timestep per token; expected the "
            "shape of Wan 2.1, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    channels, latents = transformer.get("in_channels", 16), autoencoder.get("z_dim", 16)
    if channels != latents:
        raise ValueError(
            f"The transformer of '{name}' reads {channels} channels and its autoencoder gives "
            f"{latents}; expected equal numbers. Choose a text-to-video model, not one that starts "
            "from an image."
        )
