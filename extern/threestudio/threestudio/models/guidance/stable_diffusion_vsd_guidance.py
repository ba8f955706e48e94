"""Variational score distillation from a latent diffusion model (ProlificDreamer, Wang et al. 2023).

Dimensions: ``B`` images of the batch; ``c h w`` one latent; ``m`` numbers of a camera condition.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

import threestudio
from threestudio.models.guidance.base import PRIOR_COMPONENTS, DiffusionGuidance
from threestudio.models.guidance.latent_images import encode_renders
from threestudio.models.guidance.multiview_facts import (
    camera_vector_function,
    read_multiview_facts,
)
from threestudio.models.guidance.noise_schedule import NoiseSchedule, noise_schedule
from threestudio.models.guidance.score_distillation import (
    add_noise,
    diffusion_scales,
    prediction_target,
    sds_weight,
    weighted_residual,
)
from threestudio.models.guidance.vsd_score_model import (
    CAMERA_CONDITION_SIZE,
    FrozenScore,
    TunedScore,
    camera_condition,
)
from threestudio.models.prompt_processors.base import PromptProcessorOutput
from threestudio.utils import rng
from threestudio.utils.base import BaseModule
from threestudio.utils.diffusers_folder import load_model, read_config
from threestudio.utils.misc import C, get_rank
from threestudio.utils.pretrained import RequiredModel, resolve_pretrained

SECOND_SCORE_COMPONENTS = ("unet", "scheduler")
SECOND_SCORES = ("trained", "frozen")
CAMERA_DROPOUT = 0.1


@threestudio.register("stable-diffusion-vsd-guidance")
class StableDiffusionVSDGuidance(BaseModule, DiffusionGuidance):
    """VSD: the prior's score minus the score of the renders, which a LoRA of the prior learns.

    The gradient of the latents is (1 - abar) (eps_prior - eps_second) at one noisy latent that both
    scores see (ProlificDreamer, eq. 9). The prior reads view-dependent prompts and is guided; the
    second score reads the plain prompt and the camera. Its LoRA and camera embedding are this
    module's only parameters, trained by ``loss_lora``; frozen weights are no part of its state.

    With ``second_score: frozen`` the second score is the second model as it is, guided with
    ``guidance_scale_lora``: nothing is trained, and there is no ``loss_lora``.

    A multi-view model serves as either side one image at a time, in its single-image mode (the
    zero camera vector) unless ``prior_sees_cameras``.
    """

    @dataclass
    class Config(DiffusionGuidance.Config, BaseModule.Config):
        """Keys of the contract, and which second score to use."""

        pretrained_model_name_or_path: str | None = "stabilityai/stable-diffusion-2-1-base"
        """Folder, hub id or ``embedded://name`` of the prior."""
        pretrained_model_name_or_path_lora: str = "stabilityai/stable-diffusion-2-1"
        """The same of the second score; the same model is held in memory once."""
        revision_lora: str | None = None
        """Commit of the second score's hub id; None is unverified."""
        guidance_scale: Any = 7.5
        """s of eps_uncond + s (eps_text - eps_uncond), the prior's side."""
        guidance_scale_lora: Any = 1.0
        """The same of the second score; a number or a schedule."""
        lora_cfg_training: bool = True
        """Hide the cameras from the LoRA's training in a tenth of the steps."""
        lora_n_timestamp_samples: int = 1
        """How many noisy latents of each image train the LoRA in a step."""
        max_step_percent_annealed: Any = 0.5
        """Highest noise after ``anneal_start_step``, as a fraction of the training steps."""
        anneal_start_step: int | None = 5000
        """Last step of ``max_step_percent``; None keeps it."""
        camera_condition_type: str = "extrinsics"
        """ "extrinsics", "mvp" or "spherical"; see `camera_condition`."""
        second_score: str = "trained"
        """ "trained" (LoRA) or "frozen" (close to classifier score distillation)."""
        image_size: int | None = None
        """Edge of the images that the models see; None takes 512, or what multiview.json says."""
        prior_sees_cameras: bool = False
        """Tell a multi-view model each image's camera, rather than that it is a single image."""

    cfg: Config

    @classmethod
    def required_models(cls, cfg: Mapping[str, Any]) -> list[str]:
        """List the models that a guidance of this configuration will load."""
        name = (
            cfg.get("pretrained_model_name_or_path_lora")
            or cls.Config.pretrained_model_name_or_path_lora
        )
        second = RequiredModel(name, SECOND_SCORE_COMPONENTS, cfg.get("revision_lora"))
        return [*super().required_models(cfg), second]

    def configure(self) -> None:
        """Load both scores.

        Raises:
            ModelUnavailableError: if a model cannot be had.
            ValueError: for keys that ask for what is not provided, or two models that cannot score
                the same noisy latent with the same text.
        """
        self._check_keys()
        root = resolve_pretrained(
            self.cfg.pretrained_model_name_or_path, self.cfg.revision, components=PRIOR_COMPONENTS
        )
        second_root = resolve_pretrained(
            self.cfg.pretrained_model_name_or_path_lora,
            self.cfg.revision_lora,
            components=SECOND_SCORE_COMPONENTS,
        )
        prior, schedule = self._load_score(root)
        second = prior
        if second_root != root:
            second, second_schedule = self._load_score(second_root)
            self._check_pair(prior, schedule, second, second_schedule)
        if self.cfg.second_score == "trained":
            second = TunedScore(second, CAMERA_CONDITION_SIZE[self.cfg.camera_condition_type])
            self.lora_layers = second.lora_layers
            self.camera_embedding = second.camera_embedding
        # In a tuple they are no submodules: frozen weights enter no state dict.
        self._scores = (prior, second)
        self._frozen = (load_model(root, "vae", self.device, self.weights_dtype),)
        self._set_image_facts(root, prior)
        self.setup_schedule(schedule)

    def _check_keys(self) -> None:
        for key, allowed in (
            ("second_score", SECOND_SCORES),
            ("camera_condition_type", tuple(CAMERA_CONDITION_SIZE)),
        ):
            if self.cfg[key] not in allowed:
                raise ValueError(
                    f"{key} is {self.cfg[key]!r}; expected one of {', '.join(map(repr, allowed))}."
                )
        if self.cfg.lora_n_timestamp_samples < 1:
            raise ValueError(
                f"lora_n_timestamp_samples is {self.cfg.lora_n_timestamp_samples}; expected 1 or "
                "more. Set second_score=frozen to train no LoRA."
            )

    def _load_score(self, root: Path) -> tuple[FrozenScore, NoiseSchedule]:
        self.weights_dtype = self.weights_dtype_for(self.device)
        unet = load_model(root, "unet", self.device, self.weights_dtype)
        if self.cfg.enable_channels_last_format:
            unet.to(memory_format=torch.channels_last)
        schedule = noise_schedule(read_config(root, "scheduler"))
        return FrozenScore(unet, schedule.prediction_type), schedule

    def _check_pair(
        self,
        prior: FrozenScore,
        schedule: NoiseSchedule,
        second: FrozenScore,
        second_schedule: NoiseSchedule,
    ) -> None:
        names = (
            f"'{self.cfg.pretrained_model_name_or_path}' and "
            f"'{self.cfg.pretrained_model_name_or_path_lora}'"
        )
        for key in ("in_channels", "cross_attention_dim"):
            values = prior.unet.config[key], second.unet.config[key]
            if values[0] != values[1]:
                raise ValueError(
                    f"{names} have {key} {values[0]} and {values[1]}; expected equal numbers, "
                    "since both score the same latent with the same text encoder. Choose models "
                    "of one family, or the same model twice."
                )
        ours, theirs = schedule.alphas_cumprod, second_schedule.alphas_cumprod
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=1e-4):
            raise ValueError(
                f"{names} have different noise schedules; expected the same betas, since both "
                "score the same noisy latent. Choose models of one family, or the same one twice."
            )

    def _set_image_facts(self, root: Path, prior: FrozenScore) -> None:
        self._camera_vector, model_size = None, 512
        if prior.class_vector_size:
            facts = read_multiview_facts(root)
            model_size = facts.image_size
            if self.cfg.prior_sees_cameras:
                self._camera_vector = camera_vector_function(facts.camera_vector)
        self.image_size = self.cfg.image_size or model_size

    @property
    def unet(self) -> nn.Module:
        """The prior's frozen U-Net."""
        return self._scores[0].unet

    @property
    def unet_lora(self) -> nn.Module:
        """The second score's U-Net, LoRA included."""
        return self._scores[1].unet

    @property
    def vae(self) -> nn.Module:
        """The frozen autoencoder."""
        return self._frozen[0]

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return LoRA and camera embedding, nothing where the second score is frozen."""
        return dict(self.named_parameters())

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Evaluate every scheduled key at a step, whatever steps were visited before."""
        super().update_step(epoch, global_step, on_load_weights)
        self.guidance_scale_lora = float(C(self.cfg.guidance_scale_lora, epoch, global_step))
        if self.cfg.anneal_start_step is not None and global_step > self.cfg.anneal_start_step:
            self.set_min_max_steps(
                C(self.cfg.min_step_percent, epoch, global_step),
                C(self.cfg.max_step_percent_annealed, epoch, global_step),
            )

    def forward(
        self,
        rgb: Float[Tensor, "B H W C"],
        prompt_utils: PromptProcessorOutput,
        elevation: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        camera_distances: Float[Tensor, "B"],
        mvp_mtx: Float[Tensor, "B 4 4"] | None = None,
        c2w: Float[Tensor, "B 4 4"] | None = None,
        rgb_as_latents: bool = False,
        fovy: Float[Tensor, "B"] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the distillation loss of rendered images and the loss that trains the LoRA.

        Args:
            rgb: images in [0, 1], or latents when ``rgb_as_latents``.
            prompt_utils: embeddings from the prompt processor.
            elevation: degrees. azimuth: degrees. camera_distances: world units.
            mvp_mtx: model-view-projection matrices. c2w: camera-to-world matrices. Which of them
                is read, ``camera_condition_type`` says.
            rgb_as_latents: ``rgb`` already holds latents, of the model's channels.
            fovy: vertical fields of view in radians, read with ``prior_sees_cameras``.
            **kwargs: further keys of the batch, ignored.

        Returns:
            ``loss_vsd``, differentiable in ``rgb`` alone; ``loss_lora``, differentiable in LoRA and
            camera embedding alone, absent with ``second_score: frozen``; ``grad_norm`` (a tensor),
            ``min_step``, ``max_step``.

        Raises:
            ValueError: if the batch lacks a camera matrix, or the prompt asks for Perp-Neg.

        Random: posterior, noise and timestep of each image, those of each LoRA sample, and one
        coin for the step that hides the cameras, all from the step's streams.
        """
        if prompt_utils.use_perp_neg:
            raise ValueError(
                "use_perp_neg is true; expected false, since VSD has no negative prompts of its "
                "own. Set use_perp_neg=false in the prompt processor."
            )
        angles = (elevation, azimuth, camera_distances)
        camera = None
        if self.cfg.second_score == "trained":
            camera = camera_condition(self.cfg.camera_condition_type, c2w, mvp_mtx, angles)
            camera = camera.to(self.device)
        vectors = self._class_vectors(c2w, fovy)
        latents = self.encode(rgb, rgb_as_latents)
        with torch.no_grad():
            prior_text = prompt_utils.get_text_embeddings(
                *angles, self.cfg.view_dependent_prompting
            )
            plain_text = prompt_utils.get_text_embeddings(*angles, False)
            gradient = self.gradient(latents, prior_text, plain_text, vectors, camera)
        out = self.distillation("loss_vsd", latents, gradient)
        if camera is not None:
            text = plain_text[: len(latents)]
            out["loss_lora"] = self.lora_loss(latents.detach(), text, vectors, camera)
        return out

    def encode(
        self, rgb: Float[Tensor, "B H W C"], rgb_as_latents: bool = False
    ) -> Float[Tensor, "B c h w"]:
        """Return scaled latents of images in [0, 1], or latents resized; differentiable."""
        return encode_renders(
            self.vae,
            rgb,
            self.image_size,
            lambda shape: self.draw_noise("vsd-posterior", shape),
            rgb_as_latents,
        )

    @torch.no_grad()
    def gradient(
        self,
        latents: Float[Tensor, "B c h w"],
        prior_text: Float[Tensor, "2*B l d"],
        plain_text: Float[Tensor, "2*B l d"],
        vectors: Float[Tensor, "B k"] | None = None,
        camera: Float[Tensor, "B m"] | None = None,
    ) -> Float[Tensor, "B c h w"]:
        """Return w (eps_prior - eps_second), the gradient of ``loss_vsd`` times B.

        Args:
            latents: clean latents.
            prior_text: the prior's embeddings. plain_text: the second score's; both conditional
                rows first.
            vectors: class vectors of multi-view models. camera: the second score's condition.
        """
        timesteps = self.draw_timesteps("vsd-timestep", len(latents), shared=False)
        noise = self.draw_noise("vsd-noise", tuple(latents.shape))
        scales = diffusion_scales(self.alphas_cumprod, timesteps)
        noisy = add_noise(latents, noise, *scales)
        prior, second = self._scores
        prior_noise = prior.guided_noise(
            noisy, timesteps, scales, prior_text, self.guidance_scale, vectors
        )
        second_noise = second.guided_noise(
            noisy, timesteps, scales, plain_text, self.guidance_scale_lora, vectors, camera
        )
        return weighted_residual(prior_noise, second_noise, sds_weight("sds", *scales))

    def lora_loss(
        self,
        latents: Float[Tensor, "B c h w"],
        text: Float[Tensor, "B l d"],
        vectors: Float[Tensor, "B k"] | None,
        camera: Float[Tensor, "B m"],
    ) -> Float[Tensor, ""]:
        """Return the mean squared error of the tuned score's own training, at any noise.

        Differentiable in LoRA and camera embedding; ``latents`` are constants. The tuned score
        learns what the model predicts (noise or velocity) of the renders' noisy latents.

        Args:
            latents: clean latents of the renders. text: plain prompt of each.
            vectors: class vectors of multi-view models. camera: condition of each.
        """
        count = self.cfg.lora_n_timestamp_samples
        # Samples of one image are neighbours, so that a row's global index never depends on ranks.
        latents, text, camera = (
            x.detach().repeat_interleave(count, dim=0) for x in (latents, text, camera)
        )
        if vectors is not None:
            vectors = vectors.repeat_interleave(count, dim=0)
        if self.cfg.lora_cfg_training and self._hides_cameras():
            camera = torch.zeros_like(camera)
        rows = len(latents)
        share = rng.rand_items(
            (rows,), "vsd-lora-timestep", self._step, first_item=get_rank() * rows
        )
        last = self.num_train_timesteps - 1
        timesteps = (share * self.num_train_timesteps).long().clamp_max(last).to(self.device)
        noise = self.draw_noise("vsd-lora-noise", tuple(latents.shape))
        scales = diffusion_scales(self.alphas_cumprod, timesteps)
        score = self._scores[1]
        noisy = add_noise(latents, noise, *scales)
        target = prediction_target(latents, noise, *scales, score.prediction_type)
        prediction = score.predict(noisy, timesteps, text, vectors, camera)
        return functional.mse_loss(prediction, target)

    def _hides_cameras(self) -> bool:
        coin = torch.rand((), generator=rng.generator("vsd-camera-dropout", self._step))
        return bool(coin < CAMERA_DROPOUT)

    def _class_vectors(self, c2w: Tensor | None, fovy: Tensor | None) -> Tensor | None:
        if self._camera_vector is None:
            return None
        if c2w is None or fovy is None:
            raise ValueError(
                "prior_sees_cameras is true; expected the batch to hold c2w and fovy. Pass "
                "**batch to the guidance, or set prior_sees_cameras=false."
            )
        return self._camera_vector(c2w.to(self.device).float(), fovy.to(self.device).float())
