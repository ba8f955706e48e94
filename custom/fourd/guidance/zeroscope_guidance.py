"""Score distillation from Zeroscope (ModelScope's text-to-video model, tuned at 576 x 320 pixels).

The model is diffusers' 3D U-Net over the latents of an image autoencoder; it is told neither a
frame rate nor a camera.
"""

from dataclasses import dataclass
from typing import Any

import threestudio
from jaxtyping import Float, Int
from threestudio.models.guidance.base import PRIOR_COMPONENTS
from threestudio.models.guidance.noise_schedule import noise_schedule
from threestudio.utils.diffusers_folder import load_model, read_config
from threestudio.utils.pretrained import resolve_pretrained
from torch import Tensor

from .video_guidance import (
    ClipCameras,
    VideoDiffusionGuidance,
    require_schedule,
    use_channels_last,
)


@threestudio.register("zeroscope-guidance")
class ZeroscopeGuidance(VideoDiffusionGuidance):
    """Video SDS of 4D-fy, w (eps_hat - eps) with eps_hat = eps_text + s (eps_text - eps_uncond)."""

    @dataclass
    class Config(VideoDiffusionGuidance.Config):
        """Keys of the original, and the size of the frames."""

        pretrained_model_name_or_path: str | None = "cerspense/zeroscope_v2_576w"
        """Folder or hub id with unet (`UNet3DConditionModel`), vae and scheduler."""
        guidance_scale: Any = 100.0
        """s of eps_text + s (eps_text - eps_uncond); diffusers' scale is s + 1."""
        width: int = 576
        """Width of the frames that the model sees, pixels; renders are resized to it."""
        height: int = 320
        """Their height."""

    cfg: Config
    guidance_convention = "threestudio"

    def configure(self) -> None:
        """Load the prior.

        Raises:
            ModelUnavailableError: if it cannot be had.
            ValueError: if it is no 3D U-Net, has another schedule than Zeroscope, or a key asks for
                what is not provided.
        """
        name = self.cfg.pretrained_model_name_or_path
        root = resolve_pretrained(name, self.cfg.revision, components=PRIOR_COMPONENTS)
        kind = read_config(root, "unet").get("_class_name")
        if kind != "UNet3DConditionModel":
            raise ValueError(
                f"The U-Net of '{name}' is a {kind}; expected UNet3DConditionModel. Choose a video "
                "model, or the guidance_type_video that fits this one."
            )
        schedule = noise_schedule(read_config(root, "scheduler"))
        require_schedule(schedule, name)
        self.weights_dtype = self.weights_dtype_for(self.device)
        self.unet = load_model(root, "unet", self.device, self.weights_dtype)
        self.vae = load_model(root, "vae", self.device, self.weights_dtype)
        if self.cfg.enable_channels_last_format:
            use_channels_last(self.unet)
        self.frame_size = (self.cfg.height, self.cfg.width)
        self.setup_schedule(schedule)

    def predict(
        self,
        noisy: Float[Tensor, "n c t h w"],
        timesteps: Int[Tensor, "n"],
        text: Float[Tensor, "n l d"],
        cameras: ClipCameras,
    ) -> Float[Tensor, "n c t h w"]:
        """Return the noise that the U-Net sees in each clip; cameras are not read."""
        return self.unet(noisy, timesteps, encoder_hidden_states=text).sample
