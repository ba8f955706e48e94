"""Sample the embedded multi-view prior by text and camera, and compare with the truth.

    python tests/benchmarks/sample_multiview.py [--steps 3] [--guidance-scale 1.5] [--write]

Captions are held out from all training (at least one object's appearance is); four views each, 90
degrees apart from a random azimuth, white background. Prints PSNR per caption, means for one and
two objects, and the sampler's settings; `--write` stores them under tests/benchmarks/results/,
with a sheet of samples beside their truth.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from circumstances import describe_circumstances, result_path  # noqa: E402

from custom.fourd.diffusion.camera_vector import camera_vector  # noqa: E402
from custom.fourd.diffusion.multiview_prior import load_multiview_prior  # noqa: E402
from custom.fourd.diffusion.samplers import sample_ddim  # noqa: E402
from custom.fourd.metrics.image_quality import psnr  # noqa: E402
from custom.fourd.ops.camera import camera_from_orbit  # noqa: E402
from custom.fourd.world import vocabulary as world  # noqa: E402
from custom.fourd.world.grammar import (  # noqa: E402
    WorldObject,
    WorldScene,
    all_appearances,
    is_held_out_appearance,  # noqa: E402
    parse_caption,
)
from custom.fourd.world.render import render  # noqa: E402

FOVY_RAD = math.radians(40)


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


def load_text(folder: Path):
    from transformers import AutoTokenizer, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval()

    @torch.no_grad()
    def encode(texts):
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return encoder(tokens.input_ids).last_hidden_state

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("custom/fourd/assets/multiview"))
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--sheet", type=Path, help="write samples beside their truth here")
    parser.add_argument("--write", action="store_true", help="store the result under results/")
    args = parser.parse_args()
    prior = load_multiview_prior(str(args.folder))
    encode = load_text(args.folder)
    rows, table, started = [], [], time.monotonic()
    for number, caption in enumerate(held_out_captions(args.captions)):
        generator = torch.Generator().manual_seed(1000 + number)
        start = float(torch.rand((), generator=generator)) * 90
        elevation = 5 + float(torch.rand((), generator=generator)) * 20
        azimuths = start + torch.arange(4) * 90.0
        c2w = camera_from_orbit(torch.full((4,), elevation), azimuths, torch.full((4,), 3.0))
        fovy = torch.full((4,), FOVY_RAD)
        latents = sample_ddim(
            prior.unet,
            prior.schedule,
            encode([caption] * 4 + [""] * 4),
            camera_vector(c2w, fovy, "embedded"),
            (4, 16, 16, 16),
            steps=args.steps,
            guidance_scale=args.guidance_scale,
            generator=generator,
        )
        with torch.no_grad():
            images = prior.autoencoder.decode(latents).sample.movedim(1, -1) * 0.5 + 0.5
        images = images.clamp(0, 1)
        truth = render(parse_caption(caption), c2w, fovy, 64, 64, samples_per_axis=3).rgb
        value = float(psnr(images, truth).mean())
        white = float(psnr(torch.ones_like(truth), truth).mean())
        objects = len(parse_caption(caption).objects)
        table.append({"caption": caption, "objects": objects, "psnr": value, "white": white})
        print(f"{value:6.2f} dB (white {white:5.2f})  {caption}", flush=True)
        rows.append(torch.cat((torch.cat(list(images), 1), torch.cat(list(truth), 1)), dim=1))
    means = {
        str(k): sum(r["psnr"] for r in table if r["objects"] == k)
        / max(1, sum(r["objects"] == k for r in table))
        for k in (1, 2)
    }
    print(f"mean over one-object captions {means['1']:.2f} dB, two objects {means['2']:.2f} dB")
    sampler = f"DDIM (eta 0), {args.steps} steps, guidance {args.guidance_scale}"
    print(f"{sampler}; {time.monotonic() - started:.0f} s")
    if args.write:
        report = {
            **describe_circumstances(threads=torch.get_num_threads()),
            "sampler": sampler,
            "means": means,
            "rows": table,
        }
        result_path("sample_multiview", "json").write_text(json.dumps(report, indent=1) + "\n")
    sheet = args.sheet or (result_path("sample_multiview", "png") if args.write else None)
    if sheet:
        write_sheet(rows, sheet)


def write_sheet(rows: list[torch.Tensor], path: Path) -> None:
    """The pictures of the captions, one below the other in two columns."""
    import cv2

    half = (len(rows) + 1) // 2
    columns = [torch.cat(rows[:half]), torch.cat(rows[half:])]
    height = max(len(column) for column in columns)
    columns = [torch.nn.functional.pad(c, (0, 0, 0, 0, 0, height - len(c))) for c in columns]
    picture = torch.cat(columns, dim=1).flip(-1)
    cv2.imwrite(str(path), (picture.numpy() * 255).round().astype("uint8"))


if __name__ == "__main__":
    main()
