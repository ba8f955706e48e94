"""Train the embedded multi-view model: text encoder and U-Net together, on views of the world.

The learning rate is constant after a warm-up and falls linearly to zero over the last
`--decay-steps`, so a run can be lengthened by resuming it with a larger `--steps`: training goes
on from the last checkpoint before the decay. Kill it at any time; the same command resumes.

    python -m custom.fourd.scripts.render_views --work outputs/assets
    python -m custom.fourd.scripts.train_multiview --work outputs/assets --steps 12000
    python -m custom.fourd.scripts.train_multiview --work outputs/assets --steps 12000 --export

`--from-asset` starts from the committed weights instead of fresh ones. A CUDA device is used where
there is one. On a CPU, one process with one thread per core is much faster than one process with
many threads:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m custom.fourd.scripts.train_multiview ...
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

from custom.fourd.diffusion.camera_vector import camera_vector
from custom.fourd.diffusion.patch_autoencoder import PatchAutoencoder

from .embedded_models import ASSETS, MULTIVIEW_FACTS, build_multiview_unet
from .embedded_training import (
    Batch,
    Trainer,
    committed_autoencoder,
    export,
    rendered,
    start,
    train_or_export,
)
from .world_views import (
    FOVY_RAD,
    NUM_VIEWS,
    ViewGroups,
    chance,
    colour_views,
    draw_backgrounds,
    group_cameras,
    load_groups,
    recolour,
    say,
    view_suffix,
)

TEXT_DROPOUT = 0.1
SINGLE_VIEW_SHARE = 0.08
"""Of the steps: single images without a camera, whose words name the view."""
LONE_VIEW_SHARE = 0.42
"""Of the steps: one view of each of four times as many objects, with its camera."""


class ViewSource:
    """Draws training batches; batch n is a pure function of (seed, n)."""

    def __init__(self, groups: list[ViewGroups], vae: PatchAutoencoder, seed: int) -> None:
        self.groups, self.vae, self.seed = groups, vae, seed
        self.poses = [group_cameras(part.cameras) for part in groups]
        self.with_count = {
            k: [i for i, part in enumerate(groups) if len(part.scenes[0].objects) == k]
            for k in (1, 2)
        }

    def batch(self, step: int, num_groups: int) -> Batch:
        """Half the objects are alone, half in pairs; the kind of step is drawn first."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        kind = float(torch.rand((), generator=generator))
        single = kind < SINGLE_VIEW_SHARE
        lone = single or kind < SINGLE_VIEW_SHARE + LONE_VIEW_SHARE
        count = num_groups * NUM_VIEWS if lone else num_groups
        backgrounds = draw_backgrounds(count, generator)
        images, captions, cameras = [], [], []
        for number in range(count):
            view = int(torch.randint(NUM_VIEWS, (), generator=generator))
            views = slice(view, view + 1) if lone else slice(0, NUM_VIEWS)
            parts = self.with_count[1 + number % 2]
            part = parts[int(torch.randint(len(parts), (), generator=generator))]
            group = int(torch.randint(len(self.groups[part].scenes), (), generator=generator))
            scene = recolour(self.groups[part].scenes[group], generator)
            layers = self.groups[part].layers[group][views]
            background = backgrounds[number].expand(len(layers), 3)
            images.append(colour_views(layers, [scene] * len(layers), background))
            caption = "" if chance(generator, TEXT_DROPOUT) else say(scene, generator)
            with_view = caption and (single or chance(generator, 0.1))
            captions += [
                f"{caption}, {view_suffix(float(azimuth))}" if with_view else caption
                for azimuth in self.poses[part][1][group][views]
            ]
            poses = self.poses[part][0][group][views]
            cameras.append(camera_vector(poses, torch.full((len(poses),), FOVY_RAD), "embedded"))
        with torch.no_grad():
            latents = self.vae.encode(torch.cat(images)).latent_dist.mode()
        views = 1 if lone else NUM_VIEWS
        vectors = torch.cat(cameras)
        # A zero vector stands for no camera: the words alone say which view it is.
        return Batch(latents, captions, vectors * (not single), views)


def fit_autoencoder(groups: list[ViewGroups]) -> PatchAutoencoder:
    """The family's autoencoder: principal components of training views, remade identically."""
    vae = PatchAutoencoder()
    generator = torch.Generator().manual_seed(1)
    images = []
    for part in groups:
        for index in range(0, min(600, len(part.scenes)), 2):
            scene = recolour(part.scenes[index], generator)
            background = draw_backgrounds(1, generator).expand(NUM_VIEWS, 3)
            images.append(colour_views(part.layers[index], [scene] * NUM_VIEWS, background))
    vae.fit(torch.cat(images))
    return vae


def family_autoencoder(groups: list[ViewGroups], assets: Path = ASSETS) -> PatchAutoencoder:
    """The committed autoencoder, which fixes what latents mean; fitted only where there is none."""
    folder = assets / "multiview" / "vae"
    if folder.is_dir():
        return committed_autoencoder(assets)
    return fit_autoencoder(groups)


def main(argv: list[str] | None = None) -> int:
    args = start(argv, __doc__, "multiview", steps=12000, decay_steps=2500)
    groups = rendered(args.work, "views", load_groups, "render_views")
    vae = family_autoencoder(groups)
    trainer = Trainer(build_multiview_unet(), args.rate, args.ema)

    def begin(fresh: Trainer) -> None:
        if args.from_asset:
            fresh.load_asset(ASSETS / "multiview")

    source = ViewSource(groups, vae, args.seed)
    write = partial(export, trainer, vae, "multiview", MULTIVIEW_FACTS)
    return train_or_export(trainer, source, args, begin, write, "train_multiview")


if __name__ == "__main__":
    sys.exit(main())
