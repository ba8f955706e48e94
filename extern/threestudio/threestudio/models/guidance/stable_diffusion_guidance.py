"""Score distillation from a single-image latent diffusion model (DreamFusion; SJC; HiFA's extras).

Dimensions: ``B`` images of the batch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.guidance.base import PRIOR_COMPONENTS
from threestudio.models.guidance.image_distillation import ImageDistillation, ImageScore
from threestudio.models.guidance.latent_images import (
    decode_latents,
    encode_renders,
    resize_images,
)
from threestudio.models.guidance.multiview_facts import (
    camera_vector_function,
    read_multiview_facts,
)
from threestudio.models.guidance.noise_schedule import noise_schedule
from threestudio.models.guidance.score_distillation import (
    score_distillation_loss,
    sds_weight,
    weighted_residual,
)
from threestudio.models.prompt_processors.base import PromptProcessorOutput
from threestudio.utils.diffusers_folder import load_model, read_config
from threestudio.utils.misc import C
from threestudio.utils.pretrained import resolve_pretrained


@threestudio.register("stable-diffusion-guidance")
class StableDiffusionGuidance(ImageDistillation):
    """SDS from Stable Diffusion, or from a multi-view checkpoint used one image at a time.

    A multi-view U-Net keeps its camera class vector: with views unjoined it is asked about each
    camera alone. ``multiview.json`` of its folder names that vector, an extension computes it.
    """

    role = "sd"

    @dataclass
    class Config(ImageDistillation.Config):
        """Keys of the contract."""

        pretrained_model_name_or_path: str | None = "runwayml/stable-diffusion-v1-5"
        """Folder, hub id or ``embedded://name`` of the prior."""
        image_size: int | None = None
        """Edge of the images that the model sees; None takes 512, or what multiview.json says."""
        use_sjc: bool = False
        """Score Jacobian Chaining's gradient instead of DreamFusion's."""
        var_red: bool = True
        """Subtract the drawn noise in the SJC gradient (lower variance)."""
        token_merging: bool = False
        """Not provided; true is refused."""
        token_merging_params: dict | None = None
        """Accepted for upstream's configs, unused."""
        sqrt_anneal: bool = False
        """Use one timestep that falls with the square root of the progress (HiFA)."""
        trainer_max_steps: int = 25000
        """Steps over which ``sqrt_anneal`` falls."""
        use_img_loss: bool = False
        """Add HiFA's loss between the image and the decoded clean latent."""

    cfg: Config

    def configure(self) -> None:
        """Load the prior.

        Raises:
            ModelUnavailableError: if it cannot be had.
            ValueError: for keys that ask for what is not provided.
        """
        if self.cfg.token_merging:
            raise ValueError(
                "token_merging is true; expected false, since token merging is not provided."
            )
        root = resolve_pretrained(
            self.cfg.pretrained_model_name_or_path, self.cfg.revision, components=PRIOR_COMPONENTS
        )
        self._load(root)
        self.setup_schedule(noise_schedule(read_config(root, "scheduler")))

    def _load(self, root: Path) -> None:
        dtype = self.weights_dtype_for(self.device)
        self.unet = load_model(root, "unet", self.device, dtype)
        self.vae = load_model(root, "vae", self.device, dtype)
        self.weights_dtype = dtype
        if self.cfg.enable_channels_last_format:
            self.unet.to(memory_format=torch.channels_last)
        self._camera_vector, model_size = None, 512
        if self.unet.config.class_embed_type == "projection":
            facts = read_multiview_facts(root)
            self._camera_vector = camera_vector_function(facts.camera_vector)
            model_size = facts.image_size
        self.image_size = self.cfg.image_size or model_size

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Evaluate every scheduled key; with ``sqrt_anneal`` the range is one timestep."""
        super().update_step(epoch, global_step, on_load_weights)
        if self.cfg.sqrt_anneal:
            low = C(self.cfg.min_step_percent, epoch, global_step)
            high = C(self.cfg.max_step_percent, epoch, global_step)
            progress = min(global_step / self.cfg.trainer_max_steps, 1.0) ** 0.5
            percent = high + (low - high) * progress
            self.set_min_max_steps(percent, percent)

    def __call__(
        self,
        rgb: Float[Tensor, "B H W C"],
        prompt_utils: PromptProcessorOutput,
        elevation: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        camera_distances: Float[Tensor, "B"],
        rgb_as_latents: bool = False,
        c2w: Float[Tensor, "B 4 4"] | None = None,
        fovy: Float[Tensor, "B"] | None = None,
        guidance_eval: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the distillation loss of rendered images.

        Args:
            rgb: images in [0, 1], or latents when ``rgb_as_latents``.
            prompt_utils: embeddings from the prompt processor.
            elevation: degrees. azimuth: degrees. camera_distances: world units.
            rgb_as_latents: ``rgb`` already holds latents, of the model's channels.
            c2w: camera-to-world matrices; only a prior with a camera vector reads them.
            fovy: vertical fields of view in radians; likewise.
            guidance_eval: add ``eval``, see `pictures`.
            **kwargs: further keys of the batch, ignored.

        Returns:
            ``loss_sds`` (differentiable in ``rgb``), ``loss_sds_img`` with ``use_img_loss``,
            ``grad_norm`` (a tensor), ``min_step``, ``max_step``, ``eval`` on request.

        Random: the posterior, the noise and one timestep per image, from the step's streams.
        """
        latents = encode_renders(
            self.vae,
            rgb,
            self.image_size,
            lambda shape: self.draw_noise("sd-posterior", shape),
            rgb_as_latents,
        )
        angles = (elevation, azimuth, camera_distances)
        labels = self._class_labels(c2w, fovy)
        score = self.score(latents, prompt_utils, angles, labels)
        weight = self._weight(score)
        # SJC's gradient is uniform SDS, and without variance reduction the prediction alone.
        keep = self.cfg.use_sjc and not self.cfg.var_red
        reference = torch.zeros_like(score.noise) if keep else score.noise
        gradient = weighted_residual(score.noise_pred, reference, weight)
        out = self.distillation("loss_sds", latents, gradient)
        if self.cfg.use_img_loss and not rgb_as_latents:
            out["loss_sds_img"] = self._image_loss(rgb, score, weight)
        if guidance_eval:
            out["eval"] = self.pictures(score, prompt_utils, angles, labels)
        return out

    def _weight(self, score: ImageScore) -> Float[Tensor, "B"]:
        strategy = "uniform" if self.cfg.use_sjc else self.cfg.weighting_strategy
        return sds_weight(strategy, score.signal, score.noise_scale)

    def _image_loss(
        self, rgb: Float[Tensor, "B H W 3"], score: ImageScore, weight: Float[Tensor, "B"]
    ) -> Float[Tensor, ""]:
        images = resize_images(rgb.permute(0, 3, 1, 2).float(), (self.image_size, self.image_size))
        ratio = (weight * score.signal / score.noise_scale.clamp_min(1e-8)).view(-1, 1, 1, 1)
        pull = ratio * (images.detach() - decode_latents(self.vae, score.denoised))
        return score_distillation_loss(images, pull, self.grad_clip_val)[0]

    def model_output(
        self, noisy: Tensor, timesteps: Tensor, text: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Run the U-Net; see `ImageDistillation.model_output`."""
        output = self.unet(
            noisy.to(self.weights_dtype),
            timesteps,
            encoder_hidden_states=text.to(self.weights_dtype),
            class_labels=None if labels is None else labels.to(self.weights_dtype),
        )
        return output.sample.float()

    def decode(self, clean: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 h2 w2"]:
        """Return images in [0, 1] of scaled latents."""
        return decode_latents(self.vae, clean)

    def _class_labels(self, c2w: Tensor | None, fovy: Tensor | None) -> Tensor | None:
        if self._camera_vector is None:
            return None
        if c2w is None or fovy is None:
            raise ValueError(
                f"The prior '{self.cfg.pretrained_model_name_or_path}' reads cameras; expected the "
                "batch to hold c2w and fovy. Pass **batch to the guidance."
            )
        return self._camera_vector(c2w.to(self.device), fovy.to(self.device))
