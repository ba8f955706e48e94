"""Base class of backgrounds, and the random colours that replace them while training."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from threestudio.utils.base import BaseModule
from threestudio.utils.misc import get_rank
from threestudio.utils.ops import chunk_batch
from threestudio.utils.rng import rand_items


class BaseBackground(BaseModule):
    """Colour seen along a ray that meets nothing."""

    @dataclass
    class Config(BaseModule.Config):
        pass

    cfg: Config

    def configure(self) -> None:
        pass

    def forward(self, dirs: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B H W Nc"]:
        """Return the colour along unit directions in the world."""
        raise NotImplementedError


class AugmentedBackground(BaseBackground):
    """A background that, while training, a flat random colour replaces now and then.

    A scene that hides in its background, or leaks into it, cannot keep doing so when the
    background changes. The coin and the colour are drawn once per image, with ``share_aug_bg``
    once per group of views, and for the frames of a clip always once per clip: a background that
    flickers is motion to a video prior.
    """

    @dataclass
    class Config(BaseBackground.Config):
        n_output_dims: int = 3
        """Colour channels (4 for latents)."""
        random_aug: bool = False
        """Replace the background by a random colour now and then, in training only."""
        random_aug_prob: float = 0.5
        """Probability of the replacement, per group."""
        random_aug_gray: bool = False
        """Draw greys: the same value in all channels."""
        share_aug_bg: bool = False
        """One coin and one colour for a whole view group instead of one per image."""
        share_aug: bool = False
        """The same key as upstream's 4D-fy configs spell it."""
        aug_group_size: int = 0
        """Images per group when shared; 0 takes what the batch says, else the whole batch."""
        eval_color: tuple[float, float, float] | None = None
        """Colour in evaluation; None shows the trained background."""

    cfg: Config

    def configure(self) -> None:
        super().configure()
        self._step = 0
        if self.cfg.eval_color is not None and len(self.cfg.eval_color) != self.cfg.n_output_dims:
            raise ValueError(
                f"eval_color has {len(self.cfg.eval_color)} values; expected n_output_dims = "
                f"{self.cfg.n_output_dims}. Give one value per channel."
            )

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self._step = global_step

    def color(self, dirs: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B H W Nc"]:
        """Return the background's own colour along unit directions in the world."""
        raise NotImplementedError

    def forward(
        self,
        dirs: Float[Tensor, "B H W 3"],
        images_per_group: int | None = None,
        is_video: bool = False,
    ) -> Float[Tensor, "B H W Nc"]:
        """Return the colour along unit directions; see `augment` for what is random."""
        evaluation = self.evaluation_color(dirs)
        if evaluation is not None:
            return evaluation
        return self.augment(self.color(dirs), images_per_group, is_video)

    def evaluation_color(self, dirs: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B H W Nc"] | None:
        """Return the evaluation colour over all rays, or None where it does not apply."""
        if self.training or self.cfg.eval_color is None:
            return None
        color = torch.tensor(list(self.cfg.eval_color), dtype=dirs.dtype, device=dirs.device)
        return color.expand(*dirs.shape[:-1], -1)

    def augment(
        self,
        color: Float[Tensor, "B H W Nc"],
        images_per_group: int | None = None,
        is_video: bool = False,
    ) -> Float[Tensor, "B H W Nc"]:
        """Replace the colours of some images by one flat random colour each.

        Args:
            color: the background itself; images of one group, or frames of one clip, are
                neighbours.
            images_per_group: views of an object, or frames of a clip; None is the whole batch.
            is_video: the groups are clips, and share their draw whatever the config says.

        Random: from the role "background" of the current step, one stream per group, whose index
        counts over all ranks. Replaced images give the background zero gradient.
        """
        if not (self.training and self.cfg.random_aug):
            return color
        group_size = 1
        if is_video:
            group_size = images_per_group or color.shape[0]
        elif self.cfg.share_aug_bg or self.cfg.share_aug:
            group_size = self.cfg.aug_group_size or images_per_group or color.shape[0]
        replaced, flat = self._draw(color.shape[0], color.shape[-1], group_size, color.device)
        keep = (~replaced).to(color).view(-1, 1, 1, 1)
        return color * keep + (flat.to(color) * replaced[:, None].to(color))[:, None, None]

    def _draw(
        self, batch_size: int, channels: int, group_size: int, device: torch.device
    ) -> tuple[Bool[Tensor, "B"], Float[Tensor, "B Nc"]]:
        n_groups = -(-batch_size // group_size)
        draws = rand_items(
            (n_groups, 1 + channels), "background", self._step, get_rank() * n_groups, device
        ).repeat_interleave(group_size, dim=0)[:batch_size]
        flat = draws[:, 1:2].expand(-1, channels) if self.cfg.random_aug_gray else draws[:, 1:]
        return draws[:, 0] < self.cfg.random_aug_prob, flat


def background_of_batch(
    background: BaseBackground, dirs: Float[Tensor, "B H W 3"], batch: dict[str, Any]
) -> Float[Tensor, "B H W Nc"]:
    """Ask for the background of a batch's images, which may stand in groups.

    The batch's keys ``images_per_group`` and ``is_video`` reach a background that takes them; a
    foreign one is asked for the directions alone.
    """
    taken = inspect.signature(type(background).forward).parameters
    groups = {
        key: batch[key]
        for key in ("images_per_group", "is_video")
        if key in taken and batch.get(key) is not None
    }
    return background(dirs=dirs, **groups)


def background_in_slices(
    background: BaseBackground, rays_d: Float[Tensor, "B H W 3"], chunk_size: int
) -> Float[Tensor, "B H W Nc"]:
    """Ask for the background in slices of rays, which bounds memory whatever the image size."""
    flat = rays_d.reshape(-1, 1, 1, 3)
    return chunk_batch(
        lambda dirs: background(dirs=dirs.view(1, -1, 1, 3)).view(dirs.shape[0], -1),
        chunk_size,
        flat,
    ).view(*rays_d.shape[:-1], -1)
