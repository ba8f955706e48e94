"""Score distillation from AnimateDiff (Guo et al. 2024): Stable Diffusion 1.5 with motion modules.

Frames have the latents of Stable Diffusion's autoencoder, one frame at a time; motion modules in
the U-Net let the frames of a clip attend to each other.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import threestudio
import torch
from jaxtyping import Float, Int
from threestudio.models.guidance.base import PRIOR_COMPONENTS
from threestudio.models.guidance.noise_schedule import noise_schedule
from threestudio.utils.diffusers_folder import load_model, read_config
from threestudio.utils.pretrained import RequiredModel, resolve_pretrained
from torch import Tensor

from .video_guidance import (
    ClipCameras,
    VideoDiffusionGuidance,
    require_schedule,
    use_channels_last,
)

# A motion adapter's repository holds one network, at its root.
ADAPTER_COMPONENTS = (".",)


@threestudio.register("animatediff-guidance")
class AnimateDiffGuidance(VideoDiffusionGuidance):
    """Video SDS, w (eps_hat - eps) with eps_hat = eps_text + s (eps_text - eps_uncond)."""

    @dataclass
    class Config(VideoDiffusionGuidance.Config):
        """Keys of the base, the motion adapter and the size of the frames."""

        pretrained_model_name_or_path: str | None = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        """Folder or hub id with vae, scheduler and unet: Stable Diffusion 1.5's
        `UNet2DConditionModel`, or a `UNetMotionModel` that holds its motion modules."""
        motion_adapter_name_or_path: str | None = "guoyww/animatediff-motion-adapter-v1-5-2"
        """Folder or hub id of a `MotionAdapter`; None takes the model's own modules, in its unet or
        in its folder motion_adapter."""
        motion_adapter_revision: str | None = None
        """Commit of the adapter's hub id; None is unverified."""
        beta_schedule: str = "linear"
        """Spacing of the betas that the motion modules were trained with, whatever the scheduler of
        the image model says (Stable Diffusion's own is "scaled_linear")."""
        guidance_scale: Any = 100.0
        """s of eps_text + s (eps_text - eps_uncond); diffusers' scale is s + 1."""
        width: int = 512
        """Width of the frames that the model sees, pixels; renders are resized to it."""
        height: int = 512
        """Their height."""

    cfg: Config
    guidance_convention = "threestudio"

    @classmethod
    def required_models(cls, cfg: Mapping[str, Any]) -> list[str]:
        """List the image model and the motion adapter that this configuration will load."""
        key = "motion_adapter_name_or_path"
        adapter = cfg.get(key, getattr(cls.Config, key))
        required = super().required_models(cfg)
        if adapter:
            revision = cfg.get("motion_adapter_revision")
            required.append(RequiredModel(adapter, ADAPTER_COMPONENTS, revision))
        return required

    def configure(self) -> None:
        """Load the prior.

        Raises:
            ModelUnavailableError: if the image model or the adapter cannot be had.
            ValueError: if they do not fit each other, the model is of another kind or has another
                schedule, or a key asks for what is not provided.
        """
        name = self.cfg.pretrained_model_name_or_path
        root = resolve_pretrained(name, self.cfg.revision, components=PRIOR_COMPONENTS)
        scheduler = read_config(root, "scheduler")
        schedule = noise_schedule({**scheduler, "beta_schedule": self.cfg.beta_schedule})
        require_schedule(schedule, name, self.cfg.beta_schedule)
        self.weights_dtype = self.weights_dtype_for(self.device)
        self.unet = self._load_unet(root)
        self.vae = load_model(root, "vae", self.device, self.weights_dtype)
        if self.cfg.enable_channels_last_format:
            use_channels_last(self.unet)
        self.frame_size = (self.cfg.height, self.cfg.width)
        self.setup_schedule(schedule)

    def _load_unet(self, root: Path) -> torch.nn.Module:
        name, adapter = self.cfg.pretrained_model_name_or_path, self.cfg.motion_adapter_name_or_path
        kind = read_config(root, "unet").get("_class_name")
        if kind == "UNetMotionModel":
            if adapter:
                raise ValueError(
                    f"motion_adapter_name_or_path is '{adapter}' and '{name}' already holds motion "
                    "modules; expected one of the two. Set motion_adapter_name_or_path=null."
                )
            return load_model(root, "unet", self.device, self.weights_dtype)
        if kind != "UNet2DConditionModel":
            raise ValueError(
                f"The U-Net of '{name}' is a {kind}; expected UNetMotionModel, or "
                "UNet2DConditionModel and a motion adapter. Choose the guidance_type_video that "
                "fits this model."
            )
        unet = load_model(root, "unet", self.device, self.weights_dtype)
        return _joined(unet, self._load_adapter(root), name)

    def _load_adapter(self, root: Path) -> torch.nn.Module:
        if self.cfg.motion_adapter_name_or_path:
            root = resolve_pretrained(
                self.cfg.motion_adapter_name_or_path,
                self.cfg.motion_adapter_revision,
                components=ADAPTER_COMPONENTS,
            )
            return load_model(root, ".", self.device, self.weights_dtype)
        if not (root / "motion_adapter").is_dir():
            raise ValueError(
                f"'{self.cfg.pretrained_model_name_or_path}' has neither motion modules nor a "
                "folder motion_adapter; expected motion_adapter_name_or_path to name an adapter."
            )
        return load_model(root, "motion_adapter", self.device, self.weights_dtype)

    def predict(
        self,
        noisy: Float[Tensor, "n c t h w"],
        timesteps: Int[Tensor, "n"],
        text: Float[Tensor, "n l d"],
        cameras: ClipCameras,
    ) -> Float[Tensor, "n c t h w"]:
        """Return the noise that the U-Net sees in each clip; cameras are not read.

        Raises:
            ValueError: if a clip is longer than the motion modules can count.
        """
        frames, most = noisy.shape[2], self.unet.config.motion_max_seq_length
        if frames > most:
            raise ValueError(
                f"A clip has {frames} frames; expected at most {most}, the positions that the "
                "motion modules know (they were trained on 16). Set data.single_view.num_frames."
            )
        # Spatial layers see frames as a batch, and the model repeats the timestep only.
        words = text.repeat_interleave(frames, dim=0)
        return self.unet(noisy, timesteps, encoder_hidden_states=words).sample


def _joined(unet: torch.nn.Module, adapter: torch.nn.Module, name: str) -> torch.nn.Module:
    """Return the image U-Net with the adapter's modules in it, frozen, where the U-Net is."""
    from diffusers import UNetMotionModel

    sizes = {
        "block_out_channels": (unet.config.block_out_channels, adapter.config.block_out_channels),
        "layers_per_block": (unet.config.layers_per_block, adapter.config.motion_layers_per_block),
    }
    for key, (own, other) in sizes.items():
        if _as_list(own, unet) != _as_list(other, unet):
            raise ValueError(
                f"The motion adapter has {key} {other}; expected {own}, as the U-Net of '{name}'. "
                "Choose an adapter of the same model family."
            )
    with _without_warnings():
        joined = UNetMotionModel.from_unet2d(unet, adapter)
    return joined.eval().requires_grad_(False).to(device=unet.device)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep diffusers from warning that its own cast of a joined model spares no layer in fp32."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _as_list(value: int | list[int], unet: torch.nn.Module) -> list[int]:
    blocks = len(unet.config.block_out_channels)
    return [value] * blocks if isinstance(value, int) else list(value)
