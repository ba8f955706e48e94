"""Score distillation from DeepFloyd IF's first stage, which works on pixels.

Dimensions: ``B`` images of the batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.guidance.image_distillation import ImageDistillation
from threestudio.models.guidance.latent_images import resize_images
from threestudio.models.guidance.noise_schedule import noise_schedule
from threestudio.models.guidance.score_distillation import sds_weight, weighted_residual
from threestudio.models.prompt_processors.base import PromptProcessorOutput
from threestudio.utils.diffusers_folder import load_model, read_config
from threestudio.utils.pretrained import RequiredModel, resolve_pretrained

COMPONENTS = ("unet", "scheduler")


@threestudio.register("deep-floyd-guidance")
class DeepFloydGuidance(ImageDistillation):
    """SDS in pixel space, at the edge that the model was trained for (64).

    The U-Net answers with the noise and, in as many further channels, its variance, which
    distillation does not read.
    """

    role = "if"

    @dataclass
    class Config(ImageDistillation.Config):
        """Keys of the contract."""

        pretrained_model_name_or_path: str | None = "DeepFloyd/IF-I-XL-v1.0"
        """Folder or hub id of the prior."""
        guidance_scale: Any = 20.0
        """s of eps_text + s (eps_text - eps_uncond); diffusers' scale is s + 1."""
        enable_channels_last_format: bool = True
        """Keep the U-Net's weights in channels-last layout."""

    cfg: Config

    @classmethod
    def required_models(cls, cfg: Mapping[str, Any]) -> list[str]:
        """List the models that a guidance of this configuration will load."""
        name = cfg.get("pretrained_model_name_or_path") or cls.Config.pretrained_model_name_or_path
        return [RequiredModel(name, COMPONENTS, cfg.get("revision"))]

    def configure(self) -> None:
        """Load the prior.

        Raises:
            ModelUnavailableError: if it cannot be had.
            ValueError: if it is no model of RGB images, such as a model of latents.
        """
        name = self.cfg.pretrained_model_name_or_path
        root = resolve_pretrained(name, self.cfg.revision, components=COMPONENTS)
        channels = read_config(root, "unet").get("in_channels")
        if channels != 3:
            raise ValueError(
                f"'{name}' takes images of {channels} channels; expected 3, those of DeepFloyd "
                "IF's first stage. Use stable-diffusion-guidance for a model of latents."
            )
        self.weights_dtype = self.weights_dtype_for(self.device)
        self.unet = load_model(root, "unet", self.device, self.weights_dtype)
        if self.cfg.enable_channels_last_format:
            self.unet.to(memory_format=torch.channels_last)
        self.image_size = int(self.unet.config.sample_size)
        self.setup_schedule(noise_schedule(read_config(root, "scheduler")))

    def __call__(
        self,
        rgb: Float[Tensor, "B H W 3"],
        prompt_utils: PromptProcessorOutput,
        elevation: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        camera_distances: Float[Tensor, "B"],
        rgb_as_latents: bool = False,
        guidance_eval: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the distillation loss of rendered images.

        Args:
            rgb: images in [0, 1].
            prompt_utils: embeddings from deep-floyd-prompt-processor.
            elevation: degrees. azimuth: degrees. camera_distances: world units.
            rgb_as_latents: refused, there are no latents.
            guidance_eval: add ``eval``, see `pictures`.
            **kwargs: further keys of the batch, ignored.

        Returns:
            ``loss_sds`` (differentiable in ``rgb``), ``grad_norm`` (a tensor), ``min_step``,
            ``max_step``, ``eval`` on request.

        Raises:
            ValueError: ``rgb_as_latents``.

        Random: the noise and one timestep per image, from the step's streams.
        """
        if rgb_as_latents:
            raise ValueError(
                "rgb_as_latents is true; expected false, since DeepFloyd IF works on pixels. Use "
                "stable-diffusion-guidance to train in latents."
            )
        size = (self.image_size, self.image_size)
        images = resize_images(rgb.permute(0, 3, 1, 2).float(), size) * 2.0 - 1.0
        angles = (elevation, azimuth, camera_distances)
        score = self.score(images, prompt_utils, angles)
        weight = sds_weight(self.cfg.weighting_strategy, score.signal, score.noise_scale)
        gradient = weighted_residual(score.noise_pred, score.noise, weight)
        out = self.distillation("loss_sds", images, gradient)
        if guidance_eval:
            out["eval"] = self.pictures(score, prompt_utils, angles)
        return out

    def model_output(
        self, noisy: Tensor, timesteps: Tensor, text: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Run the U-Net and leave its variance out; see `ImageDistillation.model_output`."""
        output = self.unet(
            noisy.to(self.weights_dtype),
            timesteps,
            encoder_hidden_states=text.to(self.weights_dtype),
        )
        return output.sample[:, : noisy.shape[1]].float()

    def decode(self, clean: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """Return images in [0, 1] of images in [-1, 1]."""
        return (clean * 0.5 + 0.5).clamp(0.0, 1.0)
