"""Evaluation of a scene against the world: the truth for a prompt, and how far renders are off."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from custom.fourd.metrics.image_quality import alpha_iou, dilated_union, psnr, ssim
from custom.fourd.renderers.scene import SceneImages
from custom.fourd.world.grammar import CaptionError, WorldScene, parse_caption
from custom.fourd.world.render import WorldImages, render

TRUTH_SAMPLES_PER_AXIS = 3


def scene_of_prompt(prompt: str) -> WorldScene | None:
    """The world's scene for a prompt, None where the prompt is not of the world."""
    try:
        return parse_caption(prompt)
    except CaptionError:
        return None


@dataclass
class WorldEvaluation:
    """Collects renders over white and compares each with the true view.

    Metrics are means over views: `psnr` over the full frame, `psnr_object` inside the dilated
    union of both silhouettes, `psnr_white` of an empty white image in place of the render,
    `psnr_object_white` of that inside the same region, `ssim` and `alpha_iou`.
    """

    scene: WorldScene
    values: dict[str, list[float]] = field(default_factory=dict)

    def truth(
        self,
        c2w: Float[Tensor, "b 4 4"],
        fovy: Float[Tensor, "b"],
        height: int,
        width: int,
        frame_times: Float[Tensor, "b"] | None = None,
    ) -> WorldImages:
        """The true images over white."""
        return render(
            self.scene,
            c2w.cpu(),
            fovy.cpu(),
            height,
            width,
            None if frame_times is None else frame_times.cpu(),
            samples_per_axis=TRUTH_SAMPLES_PER_AXIS,
        )

    def add(
        self,
        images: SceneImages,
        c2w: Float[Tensor, "b 4 4"],
        fovy: Float[Tensor, "b"],
        frame_times: Float[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b h w 3"]:
        """Score renders over white of these cameras; returns the truth."""
        rgb, alpha = images.rgb.cpu(), images.alpha.cpu()
        truth = self.truth(c2w, fovy, rgb.shape[1], rgb.shape[2], frame_times)
        region = dilated_union(alpha, truth.alpha)
        white = torch.ones_like(rgb)
        for name, value in (
            ("psnr", psnr(rgb, truth.rgb)),
            ("psnr_object", psnr(rgb, truth.rgb, region)),
            ("psnr_white", psnr(white, truth.rgb)),
            ("psnr_object_white", psnr(white, truth.rgb, region)),
            ("ssim", ssim(rgb, truth.rgb)),
            ("alpha_iou", alpha_iou(alpha, truth.alpha)),
        ):
            self.values.setdefault(name, []).extend(value.tolist())
        return truth.rgb

    def summary(self) -> dict[str, float]:
        """Mean of every metric, and the lowest view's PSNR and IoU."""
        means = {name: sum(v) / len(v) for name, v in self.values.items()}
        lowest = {f"{name}_min": min(self.values[name]) for name in ("psnr", "alpha_iou")}
        return {**means, **lowest}
