"""Score distillation from a multi-view diffusion model, MVDream (Shi et al. 2023) or embedded.

Dimensions: ``B`` images, the ``n`` views of each object next to each other; ``l`` and ``d`` tokens
and width of a text; ``k`` numbers of a camera vector.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import threestudio
import torch
from jaxtyping import Float, Int
from threestudio.models.guidance.base import PRIOR_COMPONENTS, DiffusionGuidance
from threestudio.models.guidance.latent_images import encode_renders
from threestudio.models.guidance.score_distillation import (
    add_noise,
    diffusion_scales,
    rescale_denoised,
    sds_weight,
    split_prediction,
    weighted_residual,
)
from threestudio.models.prompt_processors.base import PromptProcessorOutput
from threestudio.utils.pretrained import RequiredModel, model_table
from torch import Tensor

from ..diffusion.camera_vector import camera_vector
from ..diffusion.multiview_prior import load_multiview_prior


@threestudio.register("multiview-diffusion-guidance")
class MultiviewDiffusionGuidance(DiffusionGuidance):
    """MVDream's guidance: all views of an object are denoised together, given their cameras.

    ``recon_loss`` pulls the latents to the model's own clean latents (their contrast restored),
    which equals SDS with weight sigma / alpha; otherwise it is SDS with ``weighting_strategy``.
    """

    @dataclass
    class Config(DiffusionGuidance.Config):
        """Keys of the MVDream extension, and where the model comes from."""

        model_name: str = "sd-v2.1-base-4view"
        """The original code's name; looked up in configs/models.yaml when nothing else is given."""
        ckpt_path: str | None = None
        """Original ldm checkpoint (.pt, .safetensors, or owner/name/file on the hub)."""
        guidance_scale: Any = 50.0
        """s of eps_uncond + s (eps_text - eps_uncond)."""
        camera_condition_type: str = "rotation"
        """What the model is told of cameras; only "rotation" (unit-length translation) exists."""
        view_dependent_prompting: bool = False
        """The model sees the cameras, so the words need not name the view."""
        n_view: int | None = None
        """Views of one object; None takes the model's own number (MVDream: 4)."""
        image_size: int | None = None
        """Edge of the images that the model sees; None takes the model's own (MVDream: 256)."""
        recon_loss: bool = True
        """Reconstruct the clean latents instead of the SDS gradient."""
        recon_std_rescale: float = 0.5
        """Strength of the contrast rescale of ``recon_loss``, 0 to 1."""
        weighting_strategy: str = "sds"
        """Weight of the SDS gradient where ``recon_loss`` is false."""

    cfg: Config

    @classmethod
    def required_models(cls, cfg: Mapping[str, Any]) -> list[str]:
        """List the model that a guidance of this configuration will load."""
        return [RequiredModel(_model_of(cfg.get), PRIOR_COMPONENTS, cfg.get("revision"))]

    def configure(self) -> None:
        """Load the prior.

        Raises:
            ModelUnavailableError: if it cannot be had.
            ValueError: for keys that ask for what is not provided, or do not fit the model.
        """
        if self.cfg.camera_condition_type != "rotation":
            raise ValueError(
                f"camera_condition_type is {self.cfg.camera_condition_type!r}; expected 'rotation'."
            )
        name = _model_of(self.cfg.get)
        prior = load_multiview_prior(
            name,
            revision=self.cfg.revision,
            device=self.device,
            dtype=self.weights_dtype_for(self.device),
            channels_last=self.cfg.enable_channels_last_format,
        )
        self.unet, self.vae, self.facts = prior.unet, prior.autoencoder, prior.facts
        self.weights_dtype = self.weights_dtype_for(self.device)
        self.n_view = self.cfg.n_view or self.facts.num_views
        if self.n_view != self.facts.num_views:
            raise ValueError(
                f"n_view is {self.n_view}; expected {self.facts.num_views}, the number of views "
                f"that the model '{name}' joins."
            )
        self.image_size = self.cfg.image_size or self.facts.image_size
        self.setup_schedule(prior.schedule)

    def __call__(
        self,
        rgb: Float[Tensor, "B H W C"],
        prompt_utils: PromptProcessorOutput,
        elevation: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        camera_distances: Float[Tensor, "B"],
        c2w: Float[Tensor, "B 4 4"],
        rgb_as_latents: bool = False,
        fovy: Float[Tensor, "B"] | None = None,
        timestep: Int[Tensor, ""] | int | None = None,
        text_embeddings: Float[Tensor, "2*B l d"] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the distillation loss of the rendered views of one or several objects.

        Args:
            rgb: images in [0, 1], or latents of the model's channels when ``rgb_as_latents``.
            prompt_utils: embeddings from the prompt processor.
            elevation: degrees. azimuth: degrees. camera_distances: world units.
            c2w: camera-to-world matrices; never written to.
            rgb_as_latents: ``rgb`` already holds latents.
            fovy: vertical fields of view in radians; MVDream does not read them.
            timestep: uses this timestep instead of drawing one.
            text_embeddings: uses these instead of ``prompt_utils``; conditional rows first.
            **kwargs: further keys of the batch, ignored.

        Returns:
            ``loss_sds`` (differentiable in ``rgb``), ``grad_norm`` (a tensor), ``min_step``,
            ``max_step``.

        Raises:
            ValueError: if the batch holds no whole view groups, or a camera vector needs fovy.

        Random: one timestep for the whole step; noise (and the posterior) of each view, all from
        the step's streams.
        """
        batch = rgb.shape[0]
        if batch % self.n_view:
            raise ValueError(
                f"The batch holds {batch} images; expected a multiple of n_view={self.n_view}, the "
                "views of each object next to each other. Set data.batch_size and data.n_view."
            )
        if text_embeddings is None:
            text_embeddings = prompt_utils.get_text_embeddings(
                elevation, azimuth, camera_distances, self.cfg.view_dependent_prompting
            )
        latents = self.encode(rgb, rgb_as_latents)
        if timestep is None:
            timesteps = self.draw_timesteps("mv-timestep", batch, shared=True)
        else:
            timesteps = torch.as_tensor(timestep, device=self.device).expand(batch)
        noise = self.draw_noise("mv-noise", tuple(latents.shape))
        camera = self.camera_vectors(c2w, fovy)
        gradient = self.gradient(latents.detach(), noise, timesteps, text_embeddings, camera)
        return self.distillation("loss_sds", latents, gradient)

    def encode(
        self, rgb: Float[Tensor, "B H W C"], rgb_as_latents: bool = False
    ) -> Float[Tensor, "B c h w"]:
        """Return scaled latents of images in [0, 1], or latents resized; differentiable."""
        return encode_renders(
            self.vae,
            rgb,
            self.image_size,
            lambda shape: self.draw_noise("mv-posterior", shape),
            rgb_as_latents,
        )

    def camera_vectors(
        self, c2w: Float[Tensor, "B 4 4"], fovy: Float[Tensor, "B"] | None
    ) -> Float[Tensor, "B k"]:
        """Return the class vector of each view.

        Raises:
            ValueError: if the model's vector holds the field of view and ``fovy`` is None.
        """
        kind = self.facts.camera_vector
        if fovy is None:
            if kind != "mvdream":
                raise ValueError(
                    f"The model's camera vector {kind!r} holds the field of view; expected fovy in "
                    "the batch, radians. Pass **batch to the guidance."
                )
            fovy = torch.ones_like(c2w[:, 0, 0])
        return camera_vector(c2w.to(self.device).float(), fovy.to(self.device).float(), kind)

    @torch.no_grad()
    def gradient(
        self,
        latents: Float[Tensor, "B c h w"],
        noise: Float[Tensor, "B c h w"],
        timesteps: Int[Tensor, "B"],
        text_embeddings: Float[Tensor, "2*B l d"],
        camera: Float[Tensor, "B k"],
    ) -> Float[Tensor, "B c h w"]:
        """Return the gradient of the loss times B with respect to the latents.

        With ``recon_loss`` it is latents - x0*, x0* the rescaled clean latent; else
        w (noise_pred - noise).
        """
        signal, noise_scale = diffusion_scales(self.alphas_cumprod, timesteps)
        noisy = add_noise(latents, noise, signal, noise_scale)
        rescale = self.cfg.recon_std_rescale if self.cfg.recon_loss else 0.0

        def predict(halves: int, text: Tensor) -> Tensor:
            return self.unet(
                noisy.to(self.weights_dtype).repeat(halves, 1, 1, 1),
                timesteps.repeat(halves),
                encoder_hidden_states=text.to(noisy.device, self.weights_dtype),
                class_labels=camera.to(self.weights_dtype).repeat(halves, 1),
            ).sample

        cond, guided = self.guided_prediction(predict, text_embeddings, rescale > 0)
        kind = self.schedule.prediction_type
        denoised, noise_pred = split_prediction(guided, noisy, signal, noise_scale, kind)
        if not self.cfg.recon_loss:
            weight = sds_weight(self.cfg.weighting_strategy, signal, noise_scale)
            return weighted_residual(noise_pred, noise, weight)
        if rescale > 0 and self.guidance_scale != 1.0:
            denoised_cond, _ = split_prediction(cond, noisy, signal, noise_scale, kind)
            denoised = rescale_denoised(denoised, denoised_cond, self.n_view, rescale)
        return latents - denoised


def _model_of(get: Any) -> str:
    """Return the model that a configuration names; ``get`` is the configuration's own ``get``."""
    named = get("ckpt_path", None) or get("pretrained_model_name_or_path", None)
    if named:
        return named
    model_name = get("model_name", None) or MultiviewDiffusionGuidance.Config.model_name
    names = model_table("model_names")
    if model_name not in names:
        raise ValueError(
            f"model_name is {model_name!r}; expected one of {', '.join(sorted(names)) or 'none'}. "
            "Or set pretrained_model_name_or_path or ckpt_path."
        )
    return names[model_name]
