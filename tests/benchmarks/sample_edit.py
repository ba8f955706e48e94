"""Edit images of the world by sentences with the embedded edit model; compare with the truth.

    python tests/benchmarks/sample_edit.py [--steps 3] [--guidance-scale 1] [--write]

Edits are of seven kinds, each in turn seen and held out (a look, or a change of a word, that the
training never showed); four cameras and times of every scene, white background, frames edited one
by one. Prints PSNR of the edited and of the unedited images against the true edited world, and
means by split and by kind; `--write` stores them under tests/benchmarks/results/, with a sheet of
originals above edits above their truth. Where several answers are right, the nearest one counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from jaxtyping import Float  # noqa: E402
from sampling import (  # noqa: E402
    DISTANCE,
    FOVY_RAD,
    SIZE_PX,
    Sample,
    load_text,
    parse_arguments,
    report,
)
from torch import Tensor  # noqa: E402

from custom.fourd.diffusion.edit_denoiser import EditDenoiser, EditInputs  # noqa: E402
from custom.fourd.diffusion.instruct_pix2pix import (  # noqa: E402
    EditPrior,
    condition_latents,
    load_edit_prior,
)
from custom.fourd.diffusion.samplers import trailing_timesteps  # noqa: E402
from custom.fourd.metrics.image_quality import psnr  # noqa: E402
from custom.fourd.ops.camera import camera_from_orbit  # noqa: E402
from custom.fourd.scripts.world_edits import say_edit  # noqa: E402
from custom.fourd.world import vocabulary as world  # noqa: E402
from custom.fourd.world.edits import (  # noqa: E402
    STYLE_WORDS,
    EditedScene,
    EditError,
    Instruction,
    is_held_out_edit,
)
from custom.fourd.world.grammar import WorldObject, WorldScene  # noqa: E402

KINDS = ("colour", "style", "shape", "material", "size", "random colour", "random palette")
SPLITS = ("seen", "held out")
NUM_VIEWS, CHUNK_SIZE = 4, 36


@dataclass(frozen=True)
class WorldEdit:
    """A sentence, the scene that it is said of, and every scene that it may become."""

    text: str
    before: WorldScene
    answers: tuple[EditedScene, ...]
    kind: str
    split: str


def drawn_edits(count: int, seed: int = 0) -> list[WorldEdit]:
    """Edits of all kinds in turn, each kind first seen and then held out; scenes move by halves."""
    generator = torch.Generator().manual_seed(seed)
    edits: list[WorldEdit] = []
    while len(edits) < count:
        number = len(edits)
        split, kind = SPLITS[number % 2], KINDS[number // 2 % len(KINDS)]
        edit = _draw_edit(kind, split, 1 + number // len(SPLITS * len(KINDS)) % 2, generator)
        if edit is not None and edit not in edits:
            edits.append(edit)
    return edits


def _draw_edit(
    kind: str, split: str, num_objects: int, generator: torch.Generator
) -> WorldEdit | None:
    """One edit, None where the draw is none of the kind and split."""

    def pick(items):
        return items[int(torch.randint(len(items), (), generator=generator))]

    def drawn_object() -> WorldObject:
        material = "plain" if pick((True, True, False)) else pick(world.MATERIALS)
        look = pick(world.SHAPES), pick(tuple(world.COLOURS)), pick(tuple(world.SIZES))
        return WorldObject(*look, material, pick((None, pick(world.MOTIONS))))

    objects = tuple(drawn_object() for _ in range(num_objects))
    scene = WorldScene(objects, pick(world.RELATIONS))
    target = "it" if num_objects == 1 else f"the {objects[0].colour} {objects[0].shape}"
    words = {"colour": tuple(world.COLOURS), "shape": world.SHAPES, "material": world.MATERIALS,
             "size": tuple(world.SIZES), "style": sorted(set(STYLE_WORDS.values()))}  # fmt: skip
    if kind.startswith("random "):
        instruction = Instruction(target, random=kind.removeprefix("random "))
    else:
        instruction = Instruction(target, **{kind: pick(words[kind])})
    whole_scene = kind in ("style", "random palette")
    if not whole_scene and len(instruction.meant(scene)) != 1:
        return None
    try:
        answers = instruction.answers(scene)
    except EditError:
        return None
    answers = tuple(answer for answer in answers if answer != EditedScene(scene))
    unseen = [is_held_out_edit(scene, answer) for answer in answers]
    unseen_motion = scene.has_held_out_motion or any(a.scene.has_held_out_motion for a in answers)
    # Of several answers, seen are those of which any is, held out those of which none is.
    if not answers or unseen_motion or all(unseen) != (split == "held out"):
        return None
    text = say_edit(instruction, scene, generator)
    return WorldEdit(text, scene, answers, kind, split)


def cameras(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Poses on an arc of 60 degrees about a random azimuth, fields of view, scene times."""
    azimuths = torch.rand(1, generator=generator) * 360 + torch.linspace(-30, 30, NUM_VIEWS)
    elevation = 5 + torch.rand(1, generator=generator) * 20
    c2w = camera_from_orbit(elevation.expand(NUM_VIEWS), azimuths, torch.full((4,), DISTANCE))
    times = torch.linspace(0, 1, NUM_VIEWS)
    return c2w, torch.full((NUM_VIEWS,), FOVY_RAD), times


@torch.no_grad()
def edit_images(
    prior: EditPrior,
    text: Float[Tensor, "3 l d"],
    images: Float[Tensor, "b 64 64 3"],
    steps: int,
    scales: tuple[float, float],
    generator: torch.Generator,
) -> Float[Tensor, "b 64 64 3"]:
    """Edited images in [0, 1], from pure noise; `text` is of [instruction, "", ""]."""
    conditions = condition_latents(prior.autoencoder, images.movedim(-1, 1))
    noise = torch.randn(conditions.shape, generator=generator)
    denoiser = EditDenoiser(prior.unet, prior.schedule, prior.final_alpha_cumprod)
    timesteps = trailing_timesteps(len(prior.schedule.alphas_cumprod), steps)
    inputs = EditInputs(noise, conditions, text)
    latents = denoiser.denoise(inputs, timesteps, scales, CHUNK_SIZE)
    return (prior.autoencoder.decode(latents).sample.movedim(1, -1) * 0.5 + 0.5).clamp(0, 1)


def nearest(images: Tensor, answers: Sequence[Tensor]) -> tuple[Tensor, float]:
    """The answer, of all views, that images are nearest to, and the mean PSNR against it."""
    figures = [float(psnr(images, answer).mean()) for answer in answers]
    best = max(range(len(answers)), key=figures.__getitem__)
    return answers[best], figures[best]


def sample(number: int, edit: WorldEdit, prior: EditPrior, encode, args) -> Sample:
    """Four frames of a scene, edited one by one, between the originals and their truth."""
    generator = torch.Generator().manual_seed(3000 + number)
    c2w, fovy, times = cameras(generator)

    def film(scene: EditedScene) -> Tensor:
        return scene.render(c2w, fovy, SIZE_PX, SIZE_PX, times, samples_per_axis=3).rgb

    images = film(EditedScene(edit.before))
    scales = (args.guidance_scale, args.image_guidance_scale)
    text = encode([edit.text, "", ""])
    edited = edit_images(prior, text, images, args.steps, scales, generator)
    answers = [film(answer) for answer in edit.answers]
    truth, reached = nearest(edited, answers)
    row = {
        "caption": edit.before.caption,
        "instruction": edit.text,
        "kind": edit.kind,
        "split": edit.split,
        "psnr": reached,
        "unedited": nearest(images, answers)[1],
    }
    picture = torch.cat([torch.cat(list(part), dim=1) for part in (images, edited, truth)])
    return Sample(row, picture)


def main() -> None:
    args = parse_arguments(
        __doc__,
        "custom/fourd/assets/edit",
        image_guidance_scale=1.0,
        captions=4 * len(KINDS),
        guidance_scale=1.0,
    )
    prior, encode = load_edit_prior(str(args.folder)), load_text(args.folder)
    samples, started = [], time.monotonic()
    for number, edit in enumerate(drawn_edits(args.captions)):
        samples.append(sample(number, edit, prior, encode, args))
        row = samples[-1].row
        print(
            f"{row['psnr']:6.2f} dB (unedited {row['unedited']:5.2f})  {row['split']:8}  "
            f"{row['instruction']}  <-  {row['caption']}",
            flush=True,
        )
    report("sample_edit", samples, ("split", "kind"), args, started)


if __name__ == "__main__":
    main()
