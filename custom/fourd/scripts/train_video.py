"""Train the embedded video prior: text encoder and U-Net together, on clips of the world.

It starts from the committed multi-view model, which knows shapes, colours and cameras, and learns
what the motions' words mean. Kill it at any time; the same command resumes.

    python -m custom.fourd.scripts.render_clips --work outputs/assets
    python -m custom.fourd.scripts.train_video --work outputs/assets --steps 6000
    python -m custom.fourd.scripts.train_video --work outputs/assets --steps 6000 --export

`--from-asset` starts from the committed video prior instead. A CUDA device is used where there is
one; on a CPU use one process with one thread per core, as for `train_multiview`.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from custom.fourd.diffusion.camera_vector import camera_and_time, spin_logit, with_words
from custom.fourd.diffusion.patch_autoencoder import PatchAutoencoder
from custom.fourd.world.grammar import WorldScene

from .embedded_models import ASSETS, VIDEO_FACTS, build_video_unet
from .embedded_training import (
    Batch,
    Trainer,
    committed_autoencoder,
    export,
    rendered,
    start,
    train_or_export,
)
from .world_clips import NUM_FRAMES, WorldClips, load_clips, recolour_clip, spinning_share, spins
from .world_views import FOVY_RAD, chance, colour_views, draw_backgrounds, say

TEXT_DROPOUT = 0.1
PAIR_SHARE = 0.35
SPIN_SHARE = 0.25
"""Of the clips: drawn among those in which something spins."""
CLASS_RATE_FACTOR = 4.0
"""The class embedding's learning rate: what a motion's word means depends on time alone."""
TIMESTEP_POWER = 0.4
"""Motion is decided where there is much noise."""
SPIN_LOSS_WEIGHT = 0.2
"""Of the cross entropy that teaches the text encoder to say how much of a scene spins."""
CLIP_LENGTHS = ((1, 0.70), (4, 0.10), (8, 0.14), (16, 0.06))
"""Frames that are joined in a step, and the share of the steps. Lone frames of many different clips
teach what a caption, a camera and a time look like; the others, that frames belong together."""


class ClipSource:
    """Draws training batches; batch n is a pure function of (seed, n)."""

    def __init__(self, clips: list[WorldClips], vae: PatchAutoencoder, seed: int) -> None:
        self.vae, self.seed = vae, seed
        every = [(part, i) for part in clips for i in range(len(part.scenes))]
        self.places = {
            count: [place for place in every if len(_scene(place).objects) == count]
            for count in (1, 2)
        }
        self.spinning = {
            count: [place for place in places if spins(_scene(place))] or places
            for count, places in self.places.items()
        }

    def batch(self, step: int, num_groups: int) -> Batch:
        """4 `num_groups` frames, of as many clips as the length that is drawn first allows."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        length = min(_draw_length(generator), 4 * num_groups)
        count = 4 * num_groups // length
        backgrounds = draw_backgrounds(count, generator)
        images, captions, vectors = [], [], []
        for number in range(count):
            among = self.spinning if chance(generator, SPIN_SHARE) else self.places
            places = among[1 + chance(generator, PAIR_SHARE)]
            part, index = places[int(torch.randint(len(places), (), generator=generator))]
            stride = NUM_FRAMES // length
            first = int(torch.randint(stride, (), generator=generator))
            frames = slice(first, None, stride)
            scene = recolour_clip(part.scenes[index], generator)
            layers = part.layers[index][frames]
            background = backgrounds[number].expand(length, 3)
            images.append(colour_views(layers, [scene] * length, background))
            caption = "" if chance(generator, TEXT_DROPOUT) else say(scene, generator)
            captions += [caption] * length
            poses = part.pose(index).expand(length, 4, 4)
            fovy = torch.full((length,), FOVY_RAD)
            vectors.append(camera_and_time(poses, fovy, part.frame_times(index)[frames]))
        with torch.no_grad():
            latents = self.vae.encode(torch.cat(images)).latent_dist.mode()
        return Batch(latents, captions, torch.cat(vectors), length)


def _scene(place: tuple[WorldClips, int]) -> WorldScene:
    clips, index = place
    return clips.scenes[index]


def spin_loss(captions: list[str], states: Tensor) -> Tensor:
    """Cross entropy of `spin_logit` with what the captions say."""
    shares = torch.tensor([spinning_share(caption) for caption in captions])
    logits = spin_logit(states)
    loss = functional.binary_cross_entropy_with_logits(logits, shares.to(logits))
    return SPIN_LOSS_WEIGHT * loss


def _draw_length(generator: torch.Generator) -> int:
    lengths, shares = zip(*CLIP_LENGTHS, strict=True)
    return lengths[int(torch.multinomial(torch.tensor(shares), 1, generator=generator))]


def main(argv: list[str] | None = None) -> int:
    args = start(argv, __doc__, "video", steps=6000, decay_steps=1500)
    clips = rendered(args.work, "clips", load_clips, "render_clips")
    vae = committed_autoencoder()
    trainer = Trainer(
        build_video_unet(),
        args.rate,
        args.ema,
        CLASS_RATE_FACTOR,
        TIMESTEP_POWER,
        with_words,
        spin_loss,
    )

    def begin(fresh: Trainer) -> None:
        fresh.load_asset(ASSETS / ("video" if args.from_asset else "multiview"))

    source = ClipSource(clips, vae, args.seed)
    write = partial(export, trainer, vae, "video", VIDEO_FACTS)
    return train_or_export(trainer, source, args, begin, write, "train_video")


if __name__ == "__main__":
    sys.exit(main())
