"""Score distillation from VideoCrafter2 (Chen et al. 2024), 4D-fy's second video model.

The model is a 3D U-Net over the latents of an image autoencoder, told the frame rate of the clip.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import threestudio
from jaxtyping import Float, Int
from threestudio.models.guidance.base import PRIOR_COMPONENTS
from threestudio.models.guidance.noise_schedule import noise_schedule
from threestudio.utils.diffusers_folder import load_model, read_config
from threestudio.utils.pretrained import RequiredModel, model_table, resolve_pretrained
from torch import Tensor

from .video_guidance import (
    ClipCameras,
    VideoDiffusionGuidance,
    require_schedule,
    use_channels_last,
)

# Above this timestep the clean latents of the training were scaled by a constant.
LAST_SCALED_TIMESTEP = 399


@threestudio.register("videocrafter-guidance")
class VideoCrafterGuidance(VideoDiffusionGuidance):
    """Video SDS, w (eps_hat - eps) with eps_hat = eps_text + s (eps_text - eps_uncond).

    4D-fy distils from it with amplified motion and a range of timesteps that falls from .98 to .50:
    ``max_step_percent: [0, 0.98, 0.5, 5000]``.
    """

    @dataclass
    class Config(VideoDiffusionGuidance.Config):
        """Keys of the original, and the size of the frames."""

        pretrained_model_name_or_path: str | None = "VideoCrafter/VideoCrafter2"
        """Folder or hub id with unet (`VideoCrafterUNet`), vae and scheduler. The original's id is
        looked up in configs/models.yaml, since it holds one pickle and no diffusers folder."""
        guidance_scale: Any = 100.0
        """s of eps_text + s (eps_text - eps_uncond); diffusers' scale is s + 1."""
        motion_amp_scale: float = 30.0
        """Factor of what changes between the frames of the gradient; see `amplify_motion`."""
        fps: int = 8
        """Frames per second that the model is told; fewer ask for larger steps between frames."""
        signal_scale_end: float = 1.0
        """Factor of the clean latents in noisy ones from timestep 400 on, reached linearly from 1.
        VideoCrafter2's training used 0.7; 4D-fy's published step leaves it out, which is 1."""
        width: int = 512
        """Width of the frames that the model sees, pixels; renders are resized to it."""
        height: int = 320
        """Their height."""
        config: str | None = None
        """Accepted for upstream's configs, unused: the model's folder says what it is."""
        width_vid: int = 128
        """Accepted for upstream's configs, unused: the data module renders at its own size."""
        height_vid: int = 80
        """The same."""
        use_hifa: bool = False
        """Not provided; true is refused."""

    cfg: Config
    guidance_convention = "threestudio"

    @classmethod
    def required_models(cls, cfg: Mapping[str, Any]) -> list[str]:
        """List the model that a guidance of this configuration will load."""
        (model,) = super().required_models(cfg)
        return [RequiredModel(_diffusers_name(model), model.components, model.revision)]

    def configure(self) -> None:
        """Load the prior.

        Raises:
            ModelUnavailableError: if it cannot be had.
            ValueError: if its U-Net knows no frame rate, its schedule is not VideoCrafter2's, or a
                key has a value that is not provided.
        """
        if self.cfg.use_hifa:
            raise ValueError("use_hifa is true; expected false, since HiFA is not provided.")
        if self.cfg.fps < 1 or not 0.0 < self.cfg.signal_scale_end <= 1.0:
            raise ValueError(
                f"fps is {self.cfg.fps} and signal_scale_end {self.cfg.signal_scale_end}; expected "
                "fps >= 1 and 0 < signal_scale_end <= 1."
            )
        name = _diffusers_name(self.cfg.pretrained_model_name_or_path)
        root = resolve_pretrained(name, self.cfg.revision, components=PRIOR_COMPONENTS)
        schedule = noise_schedule(read_config(root, "scheduler"))
        require_schedule(schedule, name)
        self.weights_dtype = self.weights_dtype_for(self.device)
        self.unet = load_model(root, "unet", self.device, self.weights_dtype)
        if not hasattr(self.unet, "fps_embedding"):
            raise ValueError(
                f"The U-Net of '{name}' is a {type(self.unet).__name__}, which knows no frame "
                "rate; expected VideoCrafterUNet. Choose the guidance_type_video that fits this "
                "model."
            )
        self.vae = load_model(root, "vae", self.device, self.weights_dtype)
        if self.cfg.enable_channels_last_format:
            use_channels_last(self.unet)
        self.frame_size = (self.cfg.height, self.cfg.width)
        self.setup_schedule(schedule)

    def scales(self, timesteps: Int[Tensor, "B"]) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Return (signal_scale, noise_scale) of each clip; see ``signal_scale_end``."""
        signal, noise = super().scales(timesteps)
        progress = (timesteps / LAST_SCALED_TIMESTEP).clamp(max=1.0)
        return signal * (1.0 + (self.cfg.signal_scale_end - 1.0) * progress), noise

    def predict(
        self,
        noisy: Float[Tensor, "n c t h w"],
        timesteps: Int[Tensor, "n"],
        text: Float[Tensor, "n l d"],
        cameras: ClipCameras,
    ) -> Float[Tensor, "n c t h w"]:
        """Return the noise that the U-Net sees in each clip; cameras are not read."""
        return self.unet(noisy, timesteps, text, fps=self.cfg.fps).sample


def _diffusers_name(name: str) -> str:
    """Return the diffusers folder of the original's id, any other name as it is."""
    return model_table("diffusers_folders").get(name, name)
