"""Sample the embedded video prior by text, camera and times, and compare with the truth.

    python tests/benchmarks/sample_video.py [--steps 3] [--guidance-scale 1.5] [--write]

Half of the captions are held out by appearance, half by the pair of shape and motion; sixteen
frames each from one random camera, white background. Prints PSNR per caption beside that of the
best static picture (the truth's mean over time) and of a white image; `--write` stores them under
tests/benchmarks/results/, with a sheet of samples above their truth.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from circumstances import describe_circumstances, result_path  # noqa: E402
from sample_multiview import FOVY_RAD, load_text, write_sheet  # noqa: E402

from custom.fourd.diffusion.camera_vector import video_class_vector  # noqa: E402
from custom.fourd.diffusion.cross_view_attention import set_cross_view_attention  # noqa: E402
from custom.fourd.diffusion.samplers import sample_ddim  # noqa: E402
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("custom/fourd/assets/video"))
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--sheet", type=Path, help="write samples above their truth here")
    parser.add_argument("--write", action="store_true", help="store the result under results/")
    args = parser.parse_args()
    prior = load_video_prior(str(args.folder))
    set_cross_view_attention(prior.unet, NUM_FRAMES)
    encode = load_text(args.folder)
    rows, table, started = [], [], time.monotonic()
    for number, caption in enumerate(held_out_captions(args.captions)):
        generator = torch.Generator().manual_seed(2000 + number)
        azimuth = torch.rand(1, generator=generator) * 360
        elevation = 5 + torch.rand(1, generator=generator) * 20
        c2w = camera_from_orbit(elevation, azimuth, torch.full((1,), 3.0))
        c2w = c2w.expand(NUM_FRAMES, 4, 4)
        fovy = torch.full((NUM_FRAMES,), FOVY_RAD)
        times = torch.arange(NUM_FRAMES) / NUM_FRAMES
        text = encode([caption, ""]).repeat_interleave(NUM_FRAMES, dim=0)
        cameras = (c2w.repeat(2, 1, 1), fovy.repeat(2), times.repeat(2))
        latents = sample_ddim(
            prior.unet,
            prior.schedule,
            text,
            video_class_vector(*cameras, text),
            (NUM_FRAMES, 16, 16, 16),
            steps=args.steps,
            guidance_scale=args.guidance_scale,
            generator=generator,
        )
        with torch.no_grad():
            images = prior.autoencoder.decode(latents).sample.movedim(1, -1) * 0.5 + 0.5
        images = images.clamp(0, 1)
        truth = render(parse_caption(caption), c2w, fovy, 64, 64, times, samples_per_axis=3).rgb
        still = truth.mean(dim=0, keepdim=True).expand_as(truth)
        row = {
            "caption": caption,
            "held_out": "appearance" if number % 2 == 0 else "motion",
            "psnr": float(psnr(images, truth).mean()),
            "best_static": float(psnr(still, truth).mean()),
            "white": float(psnr(torch.ones_like(truth), truth).mean()),
        }
        table.append(row)
        print(
            f"{row['psnr']:6.2f} dB (best static {row['best_static']:5.2f}, "
            f"white {row['white']:5.2f})  {caption}",
            flush=True,
        )
        shown = slice(None, None, NUM_FRAMES // SHEET_FRAMES)
        rows.append(torch.cat([torch.cat(list(x[shown]), dim=1) for x in (images, truth)]))
    means = {
        name: sum(r["psnr"] for r in table if r["held_out"] == name)
        / max(1, sum(r["held_out"] == name for r in table))
        for name in ("appearance", "motion")
    }
    print(f"mean: held-out look {means['appearance']:.2f} dB, motion {means['motion']:.2f} dB")
    sampler = f"DDIM (eta 0), {args.steps} steps, guidance {args.guidance_scale}"
    print(f"{sampler}; {time.monotonic() - started:.0f} s")
    if args.write:
        report = {
            **describe_circumstances(threads=torch.get_num_threads()),
            "sampler": sampler,
            "means": means,
            "rows": table,
        }
        result_path("sample_video", "json").write_text(json.dumps(report, indent=1) + "\n")
    sheet = args.sheet or (result_path("sample_video", "png") if args.write else None)
    if sheet:
        write_sheet(rows, sheet)


if __name__ == "__main__":
    main()
