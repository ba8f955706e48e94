"""Denoising of edited frames: three branches of each, in pieces that fit into memory.

Dimensions: ``f`` frames, ``b`` branches, ``c`` latent channels, ``n`` images of a U-Net call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from threestudio.models.guidance.noise_schedule import NoiseSchedule
from threestudio.models.guidance.score_distillation import diffusion_scales, split_prediction
from torch import Tensor

from .anchor_attention import (
    ANCHOR_MODES,
    KeyValue,
    remove_anchor_attention,
    set_anchor_attention,
)
from .instruct_pix2pix import NUM_BRANCHES, needed_branches, three_branch_guidance
from .samplers import denoise_ddim
from .shared_group_norm import shared_group_norm

ATTENTIONS = (*ANCHOR_MODES, "none")
Branches = tuple[int, ...]
"""Some of a frame's branches: 0 with text and image, 1 with the image alone, 2 with neither."""


@dataclass(frozen=True)
class EditInputs:
    """Everything about the frames of a call; the first is the anchor, unless features are kept."""

    latents: Float[Tensor, "f c h w"]
    """Noisy latents at the first timestep."""
    conditions: Float[Tensor, "f c h w"]
    """Latents of the frames before the edit."""
    text: Float[Tensor, "3 l d"]
    """Embeddings of [instruction, "", ""], in the U-Net's dtype."""


class EditDenoiser:
    """A U-Net of InstructPix2Pix with its schedule and an attention.

    Args:
        unet: frozen; its processors belong to this object from now on.
        schedule: the schedule it was trained with.
        final_alpha_cumprod: abar after the last step.
        attention: one of `ATTENTIONS`; "none" lets every frame attend to itself.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        schedule: NoiseSchedule,
        final_alpha_cumprod: float,
        attention: str = "none",
    ) -> None:
        parameter = next(unet.parameters())
        self.unet, self.device, self.dtype = unet, parameter.device, parameter.dtype
        self.prediction_type = schedule.prediction_type
        self.alphas_cumprod = schedule.alphas_cumprod.to(self.device)
        self.final_alpha_cumprod = final_alpha_cumprod
        self.set_attention(attention)

    def set_attention(self, attention: str) -> None:
        """Change what frames attend to.

        Raises:
            ValueError: for an unknown word.
        """
        if attention not in ATTENTIONS:
            raise ValueError(
                f"attention is {attention!r}; expected one of {', '.join(ATTENTIONS)}."
            )
        self.attention, self.shared = attention, None
        if attention == "none":
            remove_anchor_attention(self.unet)
        else:
            self.shared = set_anchor_attention(self.unet, attention)

    @torch.no_grad()
    def denoise(
        self,
        inputs: EditInputs,
        timesteps: Sequence[int],
        scales: tuple[float, float],
        chunk_size: int,
        share_group_norm: bool = False,
        kept: Sequence[dict[str, KeyValue]] | None = None,
        collected: list[dict[str, KeyValue]] | None = None,
    ) -> Float[Tensor, "f c h w"]:
        """Run all steps and return clean latents.

        Args:
            timesteps: falling, see `samplers.partial_timesteps`.
            scales: guidance scale of the text, and of the image.
            chunk_size: images in a U-Net call at most; changes memory, not the result.
            share_group_norm: pool group norms over all frames; a branch is then one call.
            kept: features of an anchor at each step, which is then not among the frames.
            collected: takes the features of the first frame at each step.
        """
        places = {step: place for place, step in enumerate(timesteps)}
        asked = needed_branches(*scales)

        def predict(latents: Tensor, step: int) -> tuple[Tensor, Tensor]:
            if self.shared is not None and kept is not None:
                self.shared.recall(kept[places[step]])
            if share_group_norm:
                found = self._whole_branches(inputs, latents, step, asked)
            else:
                found = self._pieces(inputs, latents, step, chunk_size, asked, kept is not None)
            if collected is not None:
                collected.append(self.shared.snapshot())
            now = torch.full((len(latents),), step, device=self.device)
            levels = diffusion_scales(self.alphas_cumprod, now)
            # What is not asked for has no weight.
            branches = found.new_zeros(NUM_BRANCHES, *latents.shape)
            branches[list(asked)] = found
            guided = three_branch_guidance(*branches, *scales)
            return split_prediction(guided, latents, *levels, self.prediction_type)

        try:
            return denoise_ddim(
                predict, inputs.latents, self.alphas_cumprod, timesteps, self.final_alpha_cumprod
            )
        finally:
            if self.shared is not None:
                self.shared.forget()

    def _whole_branches(
        self, inputs: EditInputs, latents: Float[Tensor, "f c h w"], step: int, asked: Branches
    ) -> Float[Tensor, "b f c h w"]:
        """One call for each branch, all frames in it."""
        frames = range(len(latents))
        if self.shared is not None:
            self.shared.joint(len(latents))
        with shared_group_norm(self.unet, len(latents)):
            rows = [[(frame, branch) for frame in frames] for branch in asked]
            return torch.stack([self._call(inputs, latents, step, part) for part in rows])

    def _pieces(
        self,
        inputs: EditInputs,
        latents: Float[Tensor, "f c h w"],
        step: int,
        size: int,
        asked: Branches,
        anchor_is_kept: bool,
    ) -> Float[Tensor, "b f c h w"]:
        """Calls of at most ``size`` images, the branches of a frame beside each other."""
        rows = [(frame, branch) for frame in range(len(latents)) for branch in asked]
        parts = []
        if self.shared is not None and not anchor_is_kept:
            parts.append(self._anchor(inputs, latents, step, rows[: len(asked)], size))
            rows = rows[len(asked) :]
        for first in range(0, len(rows), size):
            piece = rows[first : first + size]
            if self.shared is not None:
                self.shared.frames([asked.index(branch) for _, branch in piece])
            parts.append(self._call(inputs, latents, step, piece))
        return torch.cat(parts).unflatten(0, (len(latents), len(asked))).transpose(0, 1)

    def _anchor(
        self,
        inputs: EditInputs,
        latents: Tensor,
        step: int,
        rows: list[tuple[int, int]],
        size: int,
    ) -> Tensor:
        """The anchor's branches; its features are kept, those of several calls joined."""
        outputs, features = [], []
        for first in range(0, len(rows), size):
            self.shared.anchors()
            outputs.append(self._call(inputs, latents, step, rows[first : first + size]))
            features.append(self.shared.snapshot())
        joined = {
            layer: tuple(torch.cat(parts) for parts in zip(*(f[layer] for f in features)))
            for layer in features[0]
        }
        self.shared.recall(joined)
        return torch.cat(outputs)

    def _call(
        self, inputs: EditInputs, latents: Tensor, step: int, rows: list[tuple[int, int]]
    ) -> Float[Tensor, "n c h w"]:
        """The U-Net's prediction for (frame, branch) rows; the last branch sees no image."""
        frames = [frame for frame, _ in rows]
        branches = torch.tensor([branch for _, branch in rows], device=self.device)
        sees = (branches < NUM_BRANCHES - 1).view(-1, 1, 1, 1)
        both = torch.cat((latents[frames], inputs.conditions[frames] * sees), dim=1)
        output = self.unet(
            both.to(self.dtype),
            torch.full((len(rows),), step, device=self.device),
            encoder_hidden_states=inputs.text[branches],
        )
        return output.sample.float()
