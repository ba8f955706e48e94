"""Score distillation from the embedded video prior, an image U-Net that joins a clip's frames.

It is told the camera and the scene time of each frame, so the words need not name the view.
"""

from dataclasses import dataclass
from typing import Any

import threestudio
from jaxtyping import Float, Int
from torch import Tensor

from ..diffusion.camera_vector import video_class_vector
from ..diffusion.cross_view_attention import cross_view_attention_size, set_cross_view_attention
from ..diffusion.video_prior import load_video_prior
from .video_guidance import ClipCameras, VideoDiffusionGuidance, use_channels_last


@threestudio.register("joint-frames-guidance")
class JointFramesGuidance(VideoDiffusionGuidance):
    """Pulls a clip to the model's own clean latents, their contrast restored over all its frames.

    That equals SDS with weight sigma / alpha; ``recon_loss: false`` is SDS with
    ``weighting_strategy``.
    """

    @dataclass
    class Config(VideoDiffusionGuidance.Config):
        """Where the model comes from, and what it sees."""

        pretrained_model_name_or_path: str | None = "embedded://video"
        """Folder, hub id or ``embedded://name`` with a ``video.json``."""
        guidance_scale: Any = 5.0
        """s of eps_uncond + s (eps_text - eps_uncond)."""
        view_dependent_prompting: bool = False
        """The model sees the cameras, so the words need not name the view."""
        image_size: int | None = None
        """Edge of the frames that the model sees, pixels; None takes what video.json says."""
        recon_loss: bool = True
        """Reconstruct the clean latents instead of the SDS gradient."""
        recon_std_rescale: float = 0.5
        """Strength of the contrast rescale of ``recon_loss``, 0 to 1."""

    cfg: Config

    def configure(self) -> None:
        """Load the prior.

        Raises:
            ModelUnavailableError: if it cannot be had.
            ValueError: if it is no embedded video prior, or a key asks for what is not provided.
        """
        self.weights_dtype = self.weights_dtype_for(self.device)
        prior = load_video_prior(
            self.cfg.pretrained_model_name_or_path,
            self.cfg.revision,
            self.device,
            self.weights_dtype,
        )
        self.unet, self.vae, self.facts = prior.unet, prior.autoencoder, prior.facts
        if self.cfg.enable_channels_last_format:
            use_channels_last(self.unet)
        edge = self.cfg.image_size or self.facts.image_size
        self.frame_size = (edge, edge)
        self.setup_schedule(prior.schedule)

    def predict(
        self,
        noisy: Float[Tensor, "n c t h w"],
        timesteps: Int[Tensor, "n"],
        text: Float[Tensor, "n l d"],
        cameras: ClipCameras,
    ) -> Float[Tensor, "n c t h w"]:
        """Return the prediction for each clip, whose frames see each other.

        Raises:
            ValueError: if the batch does not say where and when the frames were seen, or a clip has
                more frames than the model was trained with.
        """
        clips, length = noisy.shape[0], noisy.shape[2]
        self._check(cameras, length)
        if cross_view_attention_size(self.unet) != length:
            set_cross_view_attention(self.unet, length)
        text = text.repeat_interleave(length, dim=0)
        vectors = video_class_vector(
            cameras.c2w.flatten(0, 1), cameras.fovy.flatten(), cameras.frame_times.flatten(), text
        )
        output = self.unet(
            noisy.transpose(1, 2).flatten(0, 1),
            timesteps.repeat_interleave(length),
            encoder_hidden_states=text,
            class_labels=vectors.to(self.weights_dtype),
        ).sample
        return output.unflatten(0, (clips, length)).transpose(1, 2)

    def _check(self, cameras: ClipCameras, length: int) -> None:
        model = self.cfg.pretrained_model_name_or_path
        missing = [key for key in ("c2w", "fovy", "frame_times") if getattr(cameras, key) is None]
        if missing:
            raise ValueError(
                f"The prior '{model}' is told camera and time of each frame; expected the batch to "
                f"hold {', '.join(missing)}. Pass **batch to the guidance."
            )
        if length > self.facts.num_frames:
            raise ValueError(
                f"The clips hold {length} frames; expected at most {self.facts.num_frames}, with "
                f"which the prior '{model}' was trained. Lower data.single_view.num_frames."
            )
