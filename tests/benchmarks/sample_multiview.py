"""Sample the embedded multi-view prior by text and camera, and compare with the truth.

    python tests/benchmarks/sample_multiview.py [--steps 3] [--guidance-scale 1.5] [--write]

Captions are held out from all training (at least one object's appearance is); four views each, 90
degrees apart from a random azimuth, white background. Prints PSNR per caption, means for one and
two objects, and the sampler's settings; `--write` stores them under tests/benchmarks/results/,
with a sheet of samples beside their truth.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from sampling import (  # noqa: E402
    DISTANCE,
    FOVY_RAD,
    SIZE_PX,
    Sample,
    load_text,
    parse_arguments,
    report,
    sample_images,
)

from custom.fourd.diffusion.camera_vector import camera_vector  # noqa: E402
from custom.fourd.diffusion.multiview_prior import load_multiview_prior  # noqa: E402
from custom.fourd.metrics.image_quality import psnr  # noqa: E402
from custom.fourd.ops.camera import camera_from_orbit  # noqa: E402
from custom.fourd.world import vocabulary as world  # noqa: E402
from custom.fourd.world.grammar import (  # noqa: E402
    WorldObject,
    WorldScene,
    all_appearances,
    is_held_out_appearance,
    parse_caption,
)
from custom.fourd.world.render import render  # noqa: E402


def held_out_captions(count: int, seed: int = 0) -> list[str]:
    """Captions in turn of one and two objects; at least one appearance of each is held out."""
    generator = torch.Generator().manual_seed(seed)

    def pick(items):
        return items[int(torch.randint(len(items), (), generator=generator))]

    held = [a for a in all_appearances() if is_held_out_appearance(*a)]
    plain = [a for a in held if a[2] == "plain"]
    seen = [a for a in all_appearances() if a[2] == "plain" and a not in held]
    captions: list[str] = []
    while len(captions) < count:
        number = len(captions)
        group = plain if number % 4 < 2 else held
        shape, colour, material = pick(group)
        first = WorldObject(shape, colour, pick(tuple(world.SIZES)), material)
        objects = (first,)
        if number % 2:
            shape, colour, material = pick(seen)
            objects += (WorldObject(shape, colour, pick(tuple(world.SIZES)), material),)
        caption = WorldScene(objects, pick(world.RELATIONS)).caption
        if caption not in captions:
            captions.append(caption)
    return captions


def sample(number: int, caption: str, prior, encode, args) -> Sample:
    """Four views of one caption, beside their truth."""
    generator = torch.Generator().manual_seed(1000 + number)
    start = float(torch.rand((), generator=generator)) * 90
    elevation = 5 + float(torch.rand((), generator=generator)) * 20
    azimuths = start + torch.arange(4) * 90.0
    c2w = camera_from_orbit(torch.full((4,), elevation), azimuths, torch.full((4,), DISTANCE))
    fovy = torch.full((4,), FOVY_RAD)
    text = encode([caption] * 4 + [""] * 4)
    images = sample_images(prior, text, camera_vector(c2w, fovy, "embedded"), args, generator)
    scene = parse_caption(caption)
    truth = render(scene, c2w, fovy, SIZE_PX, SIZE_PX, samples_per_axis=3).rgb
    row = {
        "caption": caption,
        "objects": len(scene.objects),
        "psnr": float(psnr(images, truth).mean()),
        "white": float(psnr(torch.ones_like(truth), truth).mean()),
    }
    picture = torch.cat((torch.cat(list(images), 1), torch.cat(list(truth), 1)), dim=1)
    return Sample(row, picture)


def main() -> None:
    args = parse_arguments(__doc__, "custom/fourd/assets/multiview")
    prior, encode = load_multiview_prior(str(args.folder)), load_text(args.folder)
    samples, started = [], time.monotonic()
    for number, caption in enumerate(held_out_captions(args.captions)):
        samples.append(sample(number, caption, prior, encode, args))
        row = samples[-1].row
        print(f"{row['psnr']:6.2f} dB (white {row['white']:5.2f})  {caption}", flush=True)
    report("sample_multiview", samples, ("objects",), args, started)


if __name__ == "__main__":
    main()
