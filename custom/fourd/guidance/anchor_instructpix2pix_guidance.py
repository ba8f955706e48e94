"""Edits frames by an instruction, all alike: InstructPix2Pix with anchor attention.

Dimensions: ``f`` frames, ``c`` latent channels, ``l`` text tokens, ``d`` text width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import threestudio
import torch
from jaxtyping import Float
from threestudio.models.guidance.base import DiffusionGuidance
from threestudio.models.guidance.latent_images import (
    decode_latents,
    encode_images,
    pixels_per_latent,
    resize_images,
)
from threestudio.models.guidance.score_distillation import add_noise, diffusion_scales
from threestudio.utils.misc import C
from torch import Tensor

from custom.fourd.diffusion.anchor_attention import KeyValue
from custom.fourd.diffusion.edit_denoiser import EditDenoiser, EditInputs
from custom.fourd.diffusion.instruct_pix2pix import (
    NUM_BRANCHES,
    condition_latents,
    draw_frames,
    editing_size,
    load_edit_prior,
)
from custom.fourd.diffusion.samplers import SPACINGS, partial_timesteps


@dataclass(frozen=True)
class Anchor:
    """The frame whose look the others borrow; it is edited along, and its own result dropped."""

    image: Float[Tensor, "h w 3"]
    """Where its denoising starts from, RGB in [0, 1]: usually the frame as already edited."""
    condition: Float[Tensor, "h w 3"]
    """The same frame before any edit."""
    generator: torch.Generator
    """Draws its noise."""


@dataclass(frozen=True)
class AnchorFeatures:
    """An anchor's keys and values at every denoising step, to be used for many windows."""

    steps: tuple[dict[str, KeyValue], ...]
    start: int
    size: tuple[int, int]
    """Height and width at which it was edited."""


@threestudio.register("anchor-instructpix2pix-guidance")
class AnchorInstructPix2PixGuidance(DiffusionGuidance):
    """`edit` is all there is: nothing is differentiable, and no loss comes from here."""

    @dataclass
    class Config(DiffusionGuidance.Config):
        """Keys beside those of every guidance; those of score distillation are unused."""

        pretrained_model_name_or_path: str | None = "timbrooks/instruct-pix2pix"
        """Folder, hub id or ``embedded://name`` of the model."""
        image_guidance_scale: Any = 1.5
        """How much the result keeps of the original frame; a number or a schedule."""
        attention: str = "anchor"
        """What frames attend to: anchor, anchor_self, sparse_causal, or none (each to itself)."""
        share_group_norm: bool = False
        """Pool group norms over the frames of a call, as published. Frames then depend on those
        beside them, a branch goes through the U-Net as one piece, and `chunk_size` is ignored."""
        chunk_size: int = 18
        """Images in a U-Net call at most; a frame makes three. The result does not depend on it."""
        resize: int | None = None
        """Edit at about this longer edge in pixels, and resize back; None edits at full size."""
        timestep_spacing: str = "leading"
        """Where the steps of a denoising lie; see `partial_timesteps`. Models whose schedule ends
        in pure noise can begin there with "trailing", in few steps."""
        shared_noise: float = 0.0
        """Share of the noise's variance, 0 to 1, that is common to all frames."""

    cfg: Config

    def configure(self) -> None:
        """Load the model.

        Raises:
            ModelUnavailableError: if it cannot be had.
            ValueError: if it is no image editor, or a key is out of its range.
        """
        self._check_keys()
        self.weights_dtype = self.weights_dtype_for(self.device)
        prior = load_edit_prior(
            self.cfg.pretrained_model_name_or_path,
            self.cfg.revision,
            self.device,
            self.weights_dtype,
            self.cfg.enable_channels_last_format,
        )
        self.unet, self.vae = prior.unet, prior.autoencoder
        self.final_alpha_cumprod = prior.final_alpha_cumprod
        self.setup_schedule(prior.schedule)
        self._build_denoiser(self.cfg.attention)

    def _build_denoiser(self, attention: str) -> None:
        self.denoiser = EditDenoiser(self.unet, self.schedule, self.final_alpha_cumprod, attention)

    def move_to(self, device: torch.device) -> None:
        """Edit on another device from now on; results come from there."""
        self.device = device
        self.unet, self.vae = self.unet.to(device), self.vae.to(device)
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        self._build_denoiser(self.denoiser.attention)

    def _check_keys(self) -> None:
        if self.cfg.chunk_size < 1:
            raise ValueError(
                f"chunk_size is {self.cfg.chunk_size}; expected 1 or more images in a U-Net call."
            )
        if self.cfg.timestep_spacing not in SPACINGS:
            raise ValueError(
                f"timestep_spacing is {self.cfg.timestep_spacing!r}; expected one of "
                f"{', '.join(SPACINGS)}."
            )
        if not 0.0 <= self.cfg.shared_noise <= 1.0:
            raise ValueError(
                f"shared_noise is {self.cfg.shared_noise}; expected a share from 0 to 1."
            )

    def set_attention(self, attention: str) -> None:
        """Change what frames attend to from the next `edit` on; see the key ``attention``.

        Raises:
            ValueError: for an unknown word.
        """
        self.denoiser.set_attention(attention)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Evaluate every scheduled key at a step."""
        super().update_step(epoch, global_step, on_load_weights)
        self.image_guidance_scale = float(C(self.cfg.image_guidance_scale, epoch, global_step))

    @torch.no_grad()
    def edit(
        self,
        images: Float[Tensor, "f h w 3"],
        conditions: Float[Tensor, "f h w 3"],
        prompt_embeddings: Float[Tensor, "3 l d"],
        start: int,
        steps: int,
        anchor: Anchor | AnchorFeatures | None,
        generators: Sequence[torch.Generator],
        shared_generator: torch.Generator | None = None,
    ) -> Float[Tensor, "f h w 3"]:
        """Edit frames together: noise them part of the way, then denoise them by the instruction.

        Args:
            images: where denoising starts from, RGB in [0, 1]: originals, or what a warp painted.
            conditions: the original frames, of the same size.
            prompt_embeddings: of [instruction, "", ""].
            start: T, the strength, in training steps; see `partial_timesteps`.
            steps: n, the number of denoising steps.
            anchor: the frame that all look at, or what `anchor_features` made of it; None takes
                the first of ``images``, whose result then counts.
            generators: one for each frame; it draws the frame's posterior (of an autoencoder that
                has one) and then its noise. They are advanced.
            shared_generator: draws what the frames' noise has in common, wanted with
                ``shared_noise`` above 0. One in the same state gives every window the same.

        Returns:
            Edited frames at the size of ``images``, in fp32, on this guidance's device.

        Raises:
            ValueError: if sizes or numbers do not fit, or T and n are out of range.
        """
        timesteps = self._timesteps(start, steps)
        self._check_frames(images, conditions, prompt_embeddings, generators)
        given = list(generators)
        kept = anchor if isinstance(anchor, AnchorFeatures) else None
        if kept is not None:
            self._check_features(kept, start, steps, self._size(images))
        if isinstance(anchor, Anchor):
            images = torch.cat((anchor.image[None].to(images), images))
            conditions = torch.cat((anchor.condition[None].to(conditions), conditions))
            given = [anchor.generator, *given]
        inputs = self._prepare(
            images, conditions, prompt_embeddings, timesteps[0], given, shared_generator
        )
        latents = self._denoise(inputs, timesteps, kept=kept.steps if kept else None)
        if isinstance(anchor, Anchor):
            latents = latents[1:]
        return self._decode(latents, tuple(images.shape[1:3]))

    @torch.no_grad()
    def anchor_features(
        self,
        anchor: Anchor,
        prompt_embeddings: Float[Tensor, "3 l d"],
        start: int,
        steps: int,
        shared_generator: torch.Generator | None = None,
    ) -> AnchorFeatures:
        """Denoise an anchor once and keep what frames of later calls look at.

        They then need not carry it along. Costs memory: keys and values of every layer, branch and
        step. Arguments as for `edit`.

        Raises:
            ValueError: without anchor attention, or with group norms that frames share.
        """
        self._check_keeping()
        timesteps = self._timesteps(start, steps)
        images, conditions = anchor.image[None], anchor.condition[None]
        generators = [anchor.generator]
        self._check_frames(images, conditions, prompt_embeddings, generators)
        inputs = self._prepare(
            images, conditions, prompt_embeddings, timesteps[0], generators, shared_generator
        )
        found: list[dict[str, KeyValue]] = []
        self._denoise(inputs, timesteps, collected=found)
        return AnchorFeatures(tuple(found), start, self._size(images))

    def _timesteps(self, start: int, steps: int) -> list[int]:
        spacing = self.cfg.timestep_spacing
        return partial_timesteps(start, steps, self.num_train_timesteps, spacing)

    def _size(self, images: Float[Tensor, "f h w 3"]) -> tuple[int, int]:
        height, width = images.shape[1:3]
        return editing_size(height, width, pixels_per_latent(self.vae), self.cfg.resize)

    def _prepare(
        self,
        images: Float[Tensor, "f h w 3"],
        conditions: Float[Tensor, "f h w 3"],
        text: Float[Tensor, "3 l d"],
        first_timestep: int,
        generators: list[torch.Generator],
        shared_generator: torch.Generator | None,
    ) -> EditInputs:
        """Encode frame by frame, so that memory does not grow with their number."""
        size = self._size(images)
        clean, originals = [], []
        for image, condition, generator in zip(images, conditions, generators, strict=True):
            clean.append(
                encode_images(
                    self.vae,
                    self._resized(image, size),
                    lambda shape, g=generator: draw_frames(shape, [g]).to(self.device),
                )
            )
            originals.append(condition_latents(self.vae, self._resized(condition, size)))
        clean = torch.cat(clean)
        shared = None
        if self.cfg.shared_noise > 0:
            if shared_generator is None:
                raise ValueError(
                    f"shared_noise is {self.cfg.shared_noise} and shared_generator is missing; "
                    "expected the generator of the noise that frames have in common."
                )
            shared = draw_frames((1, *clean.shape[1:]), [shared_generator])[0]
        noise = draw_frames(tuple(clean.shape), generators, shared, self.cfg.shared_noise)
        now = torch.full((len(clean),), first_timestep, device=self.device)
        scales = diffusion_scales(self.alphas_cumprod, now)
        return EditInputs(
            add_noise(clean, noise.to(clean), *scales),
            torch.cat(originals),
            text.to(self.device, self.weights_dtype),
        )

    def _resized(self, image: Float[Tensor, "h w 3"], size: tuple[int, int]) -> Tensor:
        return resize_images(image.to(self.device).float().permute(2, 0, 1)[None], size)

    def _denoise(self, inputs: EditInputs, timesteps: list[int], **features: Any) -> Tensor:
        scales = (self.guidance_scale, self.image_guidance_scale)
        return self.denoiser.denoise(
            inputs, timesteps, scales, self.cfg.chunk_size, self.cfg.share_group_norm, **features
        )

    def _decode(
        self, latents: Float[Tensor, "f c h w"], size: tuple[int, int]
    ) -> Float[Tensor, "f h w 3"]:
        frames = [resize_images(decode_latents(self.vae, frame[None]), size) for frame in latents]
        return torch.cat(frames).permute(0, 2, 3, 1).clamp(0.0, 1.0)

    def _check_frames(
        self,
        images: Tensor,
        conditions: Tensor,
        text: Tensor,
        generators: Sequence[torch.Generator],
    ) -> None:
        if images.shape != conditions.shape or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"images have shape {tuple(images.shape)} and conditions "
                f"{tuple(conditions.shape)}; expected both to be (frames, height, width, 3)."
            )
        if len(text) != NUM_BRANCHES:
            raise ValueError(
                f"prompt_embeddings holds {len(text)} rows; expected {NUM_BRANCHES}, of "
                '[instruction, "", ""].'
            )
        if len(generators) != len(images):
            raise ValueError(
                f"there are {len(generators)} generators for {len(images)} frames; expected one "
                "for each, for example rng.generator('edit-noise', step, item)."
            )

    def _check_keeping(self) -> None:
        if self.denoiser.shared is None or self.cfg.share_group_norm:
            raise ValueError(
                f"features of an anchor were asked for with attention {self.denoiser.attention!r} "
                f"and share_group_norm {self.cfg.share_group_norm}; expected anchor attention and "
                "group norms that are not shared. Pass the Anchor itself to edit instead."
            )

    def _check_features(
        self, kept: AnchorFeatures, start: int, steps: int, size: tuple[int, int]
    ) -> None:
        self._check_keeping()
        if (kept.start, len(kept.steps), kept.size) != (start, steps, size):
            raise ValueError(
                f"the anchor's features are of start={kept.start}, steps={len(kept.steps)}, size "
                f"{kept.size}; expected start={start}, steps={steps}, size {size} as for the "
                "frames. Make them again with anchor_features."
            )
