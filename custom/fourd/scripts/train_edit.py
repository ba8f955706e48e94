"""Train the embedded edit model, an InstructPix2Pix: text encoder and U-Net, on edits of the world.

It starts from the committed multi-view model, which knows shapes, colours and words, and learns
what instructions make of an image. Kill it at any time; the same command resumes.

    python -m custom.fourd.scripts.render_edits --work outputs/assets
    python -m custom.fourd.scripts.train_edit --work outputs/assets --steps 6000
    python -m custom.fourd.scripts.train_edit --work outputs/assets --steps 6000 --export

`--from-asset` starts from the committed edit model instead. A CUDA device is used where there is
one; on a CPU use one process with one thread per core, as for `train_multiview`.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from custom.fourd.diffusion.anchor_attention import ANCHOR_MODES
from custom.fourd.diffusion.patch_autoencoder import PatchAutoencoder

from .embedded_models import ASSETS, EDIT_FACTS, build_edit_unet
from .embedded_training import (
    Batch,
    Trainer,
    committed_autoencoder,
    export,
    rendered,
    start,
    train_or_export,
)
from .world_edits import (
    ANCHORED_LOOK_EDITS,
    LOOK_EDITS,
    NUM_VIEWS,
    EditGroups,
    draw_pair,
    load_edit_groups,
)
from .world_views import chance, draw, draw_backgrounds

NO_TEXT_SHARE, NO_IMAGE_SHARE = 0.05, 0.05
"""Of the pairs: without the instruction, and without both. InstructPix2Pix also leaves out the
image alone; no branch of its guidance does, so this small model need not learn that."""
ANCHOR_SHARE = 0.25
"""Of the steps: frames of a scene edited alike, looking at the first of them. The published model
never saw that, and is large enough not to mind; this one is small."""
TIMESTEP_POWER = 0.55


class EditSource:
    """Draws training batches; batch n is a pure function of (seed, n)."""

    def __init__(self, groups: list[EditGroups], vae: PatchAutoencoder, seed: int) -> None:
        self.vae, self.seed = vae, seed
        every = [(part, i) for part in groups for i in range(len(part.before))]
        self.places = {
            count: [(part, i) for part, i in every if len(part.before[i].objects) == count]
            for count in (1, 2)
        }

    def batch(self, step: int, num_groups: int) -> Batch:
        """4 `num_groups` pairs, half of them of lone objects; groups or single frames first."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        joined = chance(generator, ANCHOR_SHARE)
        mode = draw(generator, ANCHOR_MODES)
        length, looks = (NUM_VIEWS, ANCHORED_LOOK_EDITS) if joined else (1, LOOK_EDITS)
        count = num_groups * NUM_VIEWS // length
        backgrounds = draw_backgrounds(count, generator)
        images, edited, captions, sees = [], [], [], []
        for number in range(count):
            places = self.places[1 + number % 2] or self.places[2 - number % 2]
            part, index = places[int(torch.randint(len(places), (), generator=generator))]
            first = 0 if joined else int(torch.randint(NUM_VIEWS, (), generator=generator))
            views = slice(first, first + length)
            pair = draw_pair(part, index, views, backgrounds[number], generator, looks)
            dropped = float(torch.rand((), generator=generator))
            images.append(pair.images)
            edited.append(pair.edited)
            captions += [
                "" if dropped < NO_TEXT_SHARE + NO_IMAGE_SHARE else pair.instruction
            ] * length
            sees += [dropped >= NO_IMAGE_SHARE] * length
        with torch.no_grad():
            latents = self.vae.encode(torch.cat(edited)).latent_dist.mode()
            conditions = self.vae.encode(torch.cat(images)).latent_dist.mode()
        conditions = conditions * torch.tensor(sees).view(-1, 1, 1, 1)
        return Batch(latents, captions, None, length, conditions, mode if joined else "joint")


def edit_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the edit U-Net that does what the multi-view one does without a camera.

    The class embedding of the zero vector is a constant, which moves into the time embedding; the
    condition begins without influence.
    """
    weights = dict(weights)
    part = {
        name: weights.pop(name) for name in list(weights) if name.startswith("class_embedding.")
    }
    hidden = functional.silu(part["class_embedding.linear_1.bias"])
    constant = part["class_embedding.linear_2.weight"] @ hidden
    constant = constant + part["class_embedding.linear_2.bias"]
    weights["time_embedding.linear_2.bias"] = weights["time_embedding.linear_2.bias"] + constant
    first = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat((first, torch.zeros_like(first)), dim=1)
    return weights


def main(argv: list[str] | None = None) -> int:
    args = start(argv, __doc__, "edit", steps=6000, decay_steps=1500)
    groups = rendered(args.work, "edits", load_edit_groups, "render_edits")
    vae = committed_autoencoder()
    trainer = Trainer(build_edit_unet(), args.rate, args.ema, timestep_power=TIMESTEP_POWER)

    def begin(fresh: Trainer) -> None:
        if args.from_asset:
            fresh.load_asset(ASSETS / "edit")
        else:
            fresh.load_asset(ASSETS / "multiview", edit_weights)

    source = EditSource(groups, vae, args.seed)
    pipeline = "StableDiffusionInstructPix2PixPipeline"
    write = partial(export, trainer, vae, "edit", EDIT_FACTS, pipeline=pipeline)
    return train_or_export(trainer, source, args, begin, write, "train_edit")


if __name__ == "__main__":
    sys.exit(main())
