"""Score distillation from a single-image latent diffusion model (DreamFusion; SJC; HiFA's extras).

Dimensions: ``B`` images of the batch, ``l`` and ``d`` tokens and width of a text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import threestudio
from threestudio.models.guidance.base import PRIOR_COMPONENTS, DiffusionGuidance
from threestudio.models.guidance.latent_images import (
    decode_latents,
    encode_images,
    latent_size,
    resize_images,
)
from threestudio.models.guidance.multiview_facts import (
    camera_vector_function,
    read_multiview_facts,
)
from threestudio.models.guidance.noise_schedule import noise_schedule
from threestudio.models.guidance.score_distillation import (
    add_noise,
    classifier_free_guidance,
    diffusion_scales,
    perp_neg_guidance,
    score_distillation_loss,
    sds_weight,
    split_prediction,
    weighted_residual,
)
from threestudio.models.prompt_processors.base import PromptProcessorOutput
from threestudio.utils.diffusers_folder import load_model, read_config
from threestudio.utils.misc import C
from threestudio.utils.pretrained import resolve_pretrained


@threestudio.register("stable-diffusion-guidance")
class StableDiffusionGuidance(DiffusionGuidance):
    """SDS from Stable Diffusion, or from a multi-view checkpoint used one image at a time.

    A multi-view U-Net keeps its camera class vector: with views unjoined it is asked about each
    camera alone. ``multiview.json`` of its folder names that vector, an extension computes it.
    """

    @dataclass
    class Config(DiffusionGuidance.Config):
        """Keys of the contract."""

        pretrained_model_name_or_path: str | None = "runwayml/stable-diffusion-v1-5"
        """Folder, hub id or ``embedded://name`` of the prior."""
        guidance_scale: Any = 100.0
        """s of eps_text + s (eps_text - eps_uncond); diffusers' scale is s + 1."""
        image_size: int | None = None
        """Edge of the images that the model sees; None takes 512, or what multiview.json says."""
        use_sjc: bool = False
        """Score Jacobian Chaining's gradient instead of DreamFusion's."""
        var_red: bool = True
        """Subtract the drawn noise in the SJC gradient (lower variance)."""
        weighting_strategy: str = "sds"
        """ "sds", "uniform" or "fantasia3d"; see `sds_weight`."""
        token_merging: bool = False
        """Not provided; true is refused."""
        token_merging_params: dict | None = None
        """Accepted for upstream's configs, unused."""
        max_items_eval: int = 4
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
            **kwargs: further keys of the batch, ignored.

        Returns:
            ``loss_sds`` (differentiable in ``rgb``), ``loss_sds_img`` with ``use_img_loss``,
            ``grad_norm`` (a tensor), ``min_step``, ``max_step``.

        Random: the posterior, the noise and one timestep per image, from the step's streams.
        """
        images = resize_images(rgb.permute(0, 3, 1, 2).float(), (self.image_size, self.image_size))
        if rgb_as_latents:
            size = latent_size(self.vae, self.image_size)
            latents = resize_images(rgb.permute(0, 3, 1, 2).float(), (size, size))
        else:
            latents = encode_images(
                self.vae, images, lambda shape: self.draw_noise("sd-posterior", shape)
            )
        timesteps = self.draw_timesteps("sd-timestep", rgb.shape[0], shared=False)
        noise = self.draw_noise("sd-noise", tuple(latents.shape))
        angles = (elevation, azimuth, camera_distances)
        with torch.no_grad():
            labels = self._class_labels(c2w, fovy)
            noise_pred, denoised = self.predict(
                latents, noise, timesteps, prompt_utils, angles, labels
            )
            signal, noise_scale = diffusion_scales(self.alphas_cumprod, timesteps)
            weight = sds_weight(
                "uniform" if self.cfg.use_sjc else self.cfg.weighting_strategy, signal, noise_scale
            )
            # SJC's gradient is uniform SDS, and without variance reduction the prediction alone.
            keep = self.cfg.use_sjc and not self.cfg.var_red
            reference = torch.zeros_like(noise) if keep else noise
            gradient = weighted_residual(noise_pred, reference, weight)
        loss, used = score_distillation_loss(latents, gradient, self.grad_clip_val)
        out = {
            "loss_sds": loss,
            "grad_norm": used.norm(),
            "min_step": self.min_step,
            "max_step": self.max_step,
        }
        if self.cfg.use_img_loss and not rgb_as_latents:
            ratio = (weight * signal / noise_scale.clamp_min(1e-8)).view(-1, 1, 1, 1)
            pull = ratio * (images.detach() - decode_latents(self.vae, denoised))
            out["loss_sds_img"], _ = score_distillation_loss(images, pull, self.grad_clip_val)
        return out

    @torch.no_grad()
    def predict(
        self,
        latents: Float[Tensor, "B c h w"],
        noise: Float[Tensor, "B c h w"],
        timesteps: Int[Tensor, "B"],
        prompt_utils: PromptProcessorOutput,
        angles: tuple[Tensor, Tensor, Tensor],
        labels: Float[Tensor, "B k"] | None = None,
    ) -> tuple[Float[Tensor, "B c h w"], Float[Tensor, "B c h w"]]:
        """Return (noise_pred, denoised) after guidance, in fp32.

        Args:
            latents: clean latents. noise: what is added to them. timesteps: how much.
            prompt_utils: embeddings; `angles` (elevation, azimuth, camera_distances) choose them.
            labels: class vector of each image, for a prior that has one.
        """
        signal, noise_scale = diffusion_scales(self.alphas_cumprod, timesteps)
        noisy = add_noise(latents, noise, signal, noise_scale)
        vd = self.cfg.view_dependent_prompting
        if prompt_utils.use_perp_neg:
            text, weights = prompt_utils.get_text_embeddings_perp_neg(*angles, vd)
        else:
            text, weights = prompt_utils.get_text_embeddings(*angles, vd), None
        batch, copies = len(latents), text.shape[0] // len(latents)
        output = self._forward_unet(noisy, timesteps, text, labels, copies)
        kind = self.schedule.prediction_type
        # Guidance is linear in the prediction, so its kind may be guided before it is converted,
        # except for Perp-Neg, whose projection is defined on the predicted noise.
        if weights is None:
            cond, uncond = output.chunk(2)
            guided = classifier_free_guidance(cond, uncond, self.guidance_scale, "threestudio")
            denoised, noise_pred = split_prediction(guided, noisy, signal, noise_scale, kind)
            return noise_pred, denoised
        tiled = [x.repeat(2, *[1] * (x.ndim - 1)) for x in (noisy, signal, noise_scale)]
        _, pair = split_prediction(output[: 2 * batch], *tiled, kind)
        twice = [x.repeat_interleave(2, dim=0) for x in (noisy, signal, noise_scale)]
        _, others = split_prediction(output[2 * batch :], *twice, kind)
        noise_pred = perp_neg_guidance(
            *pair.chunk(2),
            others.unflatten(0, (batch, 2)),
            weights.to(others),
            self.guidance_scale,
        )
        # Where no signal is left the noise alone cannot give the clean latent; only the image loss
        # reads it, whose weight is zero there.
        signal = signal.clamp_min(1e-4)
        denoised, _ = split_prediction(noise_pred, noisy, signal, noise_scale, "epsilon")
        return noise_pred, denoised

    def _forward_unet(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        labels: Tensor | None,
        copies: int,
    ) -> Tensor:
        """Run the U-Net on ``copies`` texts of each latent, in the order of the text embeddings.

        The first two texts of all items come first, item by item; further ones are grouped by item.
        """
        index = torch.arange(len(noisy), device=noisy.device)
        order = torch.cat([index.repeat(2), index.repeat_interleave(copies - 2)])
        output = self.unet(
            noisy[order].to(self.weights_dtype),
            timesteps[order],
            encoder_hidden_states=text.to(noisy.device, self.weights_dtype),
            class_labels=None if labels is None else labels[order].to(self.weights_dtype),
        )
        return output.sample.float()

    def _class_labels(self, c2w: Tensor | None, fovy: Tensor | None) -> Tensor | None:
        if self._camera_vector is None:
            return None
        if c2w is None or fovy is None:
            raise ValueError(
                f"The prior '{self.cfg.pretrained_model_name_or_path}' reads cameras; expected the "
                "batch to hold c2w and fovy. Pass **batch to the guidance."
            )
        return self._camera_vector(c2w.to(self.device), fovy.to(self.device))
