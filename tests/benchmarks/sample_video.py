"""Sample the embedded video prior by text, camera and times, and compare with the truth.

    python tests/benchmarks/sample_video.py [--steps 3] [--guidance-scale 1.5] [--write]

Half of the captions are held out by appearance, half by the pair of shape and motion; sixteen
frames each from one random camera, white background. Prints PSNR per caption beside that of the
best static picture (the truth's mean over time) and of a white image; `--write` stores them under
tests/benchmarks/results/, with a sheet of samples above their truth.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
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

from custom.fourd.diffusion.camera_vector import video_class_vector  # noqa: E402
from custom.fourd.diffusion.cross_view_attention import set_cross_view_attention  # noqa: E402
from custom.fourd.diffusion.video_prior import load_video_prior  # noqa: E402
from custom.fourd.metrics.image_quality import psnr  # noqa: E402
from custom.fourd.ops.camera import camera_from_orbit  # noqa: E402
from custom.fourd.world import vocabulary as world  # noqa: E402
from custom.fourd.world.grammar import (  # noqa: E402
    WorldObject,
    WorldScene,
    is_held_out_appearance,
    is_held_out_motion,
    parse_caption,
)
from custom.fourd.world.render import render  # noqa: E402

NUM_FRAMES = 16
SHEET_FRAMES = 8


def held_out_captions(count: int, seed: int = 0) -> list[str]:
    """Captions of moving scenes; in turn an appearance, or a (shape, motion) pair, is held out."""
    generator = torch.Generator().manual_seed(seed)

    def pick(items):
        return items[int(torch.randint(len(items), (), generator=generator))]

    def moving_object(wants_appearance: bool | None) -> WorldObject:
        while True:
            shape, motion = pick(world.SHAPES), pick(world.MOTIONS)
            material = "plain" if torch.rand((), generator=generator) < 0.5 else "striped"
            colour, size = pick(tuple(world.COLOURS)), pick(tuple(world.SIZES))
            new_look = is_held_out_appearance(shape, colour, material)
            new_motion = is_held_out_motion(shape, motion)
            if (new_look, new_motion) == (wants_appearance is True, wants_appearance is False):
                return WorldObject(shape, colour, size, material, motion)

    captions: list[str] = []
    while len(captions) < count:
        number = len(captions)
        objects = (moving_object(number % 2 == 0),)
        if number % 4 > 1:
            other = moving_object(None)
            objects += (replace(other, motion=pick((None, other.motion))),)
        caption = WorldScene(objects, pick(world.RELATIONS)).caption
        if caption not in captions:
            captions.append(caption)
    return captions


def sample(number: int, caption: str, prior, encode, args) -> Sample:
    """A clip of one caption from one camera, above its truth."""
    generator = torch.Generator().manual_seed(2000 + number)
    azimuth = torch.rand(1, generator=generator) * 360
    elevation = 5 + torch.rand(1, generator=generator) * 20
    c2w = camera_from_orbit(elevation, azimuth, torch.full((1,), DISTANCE))
    c2w = c2w.expand(NUM_FRAMES, 4, 4)
    fovy = torch.full((NUM_FRAMES,), FOVY_RAD)
    times = torch.arange(NUM_FRAMES) / NUM_FRAMES
    text = encode([caption, ""]).repeat_interleave(NUM_FRAMES, dim=0)
    cameras = (c2w.repeat(2, 1, 1), fovy.repeat(2), times.repeat(2))
    images = sample_images(prior, text, video_class_vector(*cameras, text), args, generator)
    scene = parse_caption(caption)
    truth = render(scene, c2w, fovy, SIZE_PX, SIZE_PX, times, samples_per_axis=3).rgb
    still = truth.mean(dim=0, keepdim=True).expand_as(truth)
    row = {
        "caption": caption,
        "held_out": "appearance" if number % 2 == 0 else "motion",
        "psnr": float(psnr(images, truth).mean()),
        "best_static": float(psnr(still, truth).mean()),
        "white": float(psnr(torch.ones_like(truth), truth).mean()),
    }
    shown = slice(None, None, NUM_FRAMES // SHEET_FRAMES)
    picture = torch.cat([torch.cat(list(x[shown]), dim=1) for x in (images, truth)])
    return Sample(row, picture)


def main() -> None:
    args = parse_arguments(__doc__, "custom/fourd/assets/video")
    prior, encode = load_video_prior(str(args.folder)), load_text(args.folder)
    set_cross_view_attention(prior.unet, NUM_FRAMES)
    samples, started = [], time.monotonic()
    for number, caption in enumerate(held_out_captions(args.captions)):
        samples.append(sample(number, caption, prior, encode, args))
        row = samples[-1].row
        print(
            f"{row['psnr']:6.2f} dB (best static {row['best_static']:5.2f}, "
            f"white {row['white']:5.2f})  {caption}",
            flush=True,
        )
    report("sample_video", samples, ("held_out",), args, started)


if __name__ == "__main__":
    main()
