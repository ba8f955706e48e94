"""What the benchmarks share that sample an embedded prior and compare with the truth."""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from circumstances import describe_circumstances, result_path
from jaxtyping import Float
from torch import Tensor

from custom.fourd.diffusion.samplers import sample_ddim

FOVY_RAD = math.radians(40)
DISTANCE = 3.0
SIZE_PX = 64


def parse_arguments(
    description: str, folder: str, image_guidance_scale: float | None = None, **defaults: Any
) -> argparse.Namespace:
    """The flags that every such benchmark has; `folder` is the model's.

    Args:
        image_guidance_scale: default of the flag of that name, which only editors have.
        defaults: of the other flags, where they differ.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(folder))
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    if image_guidance_scale is not None:
        parser.add_argument("--image-guidance-scale", type=float, default=image_guidance_scale)
    parser.add_argument("--sheet", type=Path, help="write samples and their truth here")
    parser.add_argument("--write", action="store_true", help="store the result under results/")
    parser.set_defaults(**defaults)
    return parser.parse_args()


def load_text(folder: Path):
    """A function from texts to the token states of a model's own text encoder."""
    from transformers import AutoTokenizer, CLIPTextModel

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval()

    @torch.no_grad()
    def encode(texts: list[str]) -> Float[Tensor, "b l d"]:
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return encoder(tokens.input_ids).last_hidden_state

    return encode


@torch.no_grad()
def sample_images(
    prior: Any,
    text: Tensor,
    class_vectors: Tensor,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> Float[Tensor, "b 64 64 3"]:
    """Images in [0, 1]; `text` holds the captions' states, then as many of the empty text."""
    latents = sample_ddim(
        prior.unet,
        prior.schedule,
        text,
        class_vectors,
        (len(text) // 2, 16, 16, 16),
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        generator=generator,
    )
    images = prior.autoencoder.decode(latents).sample.movedim(1, -1) * 0.5 + 0.5
    return images.clamp(0, 1)


@dataclass
class Sample:
    """A row of the table, and its pictures."""

    row: dict[str, Any]
    picture: Float[Tensor, "h w 3"]


def mean_of(samples: list[Sample], group: str, column: str = "psnr") -> dict[str, float]:
    """The mean of `column` for each value of the column `group`."""
    figures: dict[str, list[float]] = {}
    for sample in samples:
        figures.setdefault(str(sample.row[group]), []).append(sample.row[column])
    return {value: sum(found) / len(found) for value, found in figures.items()}


def report(
    name: str,
    samples: list[Sample],
    groups: tuple[str, ...],
    args: argparse.Namespace,
    started: float,
) -> None:
    """Print the mean PSNR of each value of the columns `groups`, and store what `args` ask for."""
    means, unedited = {}, {}
    for group in groups:
        found = mean_of(samples, group)
        before = mean_of(samples, group, "unedited") if "unedited" in samples[0].row else {}
        for value, mean in found.items():
            beside = f" (unedited {before[value]:.2f})" if before else ""
            print(f"mean over {group} {value}: {mean:.2f} dB{beside}")
        means |= found
        unedited |= before
    sampler = f"DDIM (eta 0), {args.steps} steps, guidance {args.guidance_scale}"
    if "image_guidance_scale" in args:
        sampler += f", of the image {args.image_guidance_scale}"
    print(f"{sampler}; {time.monotonic() - started:.0f} s")
    if args.write:
        facts = {
            **describe_circumstances(threads=torch.get_num_threads()),
            "sampler": sampler,
            "means": means,
            **({"unedited": unedited} if unedited else {}),
            "rows": [sample.row for sample in samples],
        }
        result_path(name, "json").write_text(json.dumps(facts, indent=1) + "\n")
    sheet = args.sheet or (result_path(name, "png") if args.write else None)
    if sheet:
        _write_sheet([sample.picture for sample in samples], sheet)


def _write_sheet(pictures: list[Tensor], path: Path) -> None:
    """The pictures of the captions, one below the other in two columns."""
    import cv2

    half = (len(pictures) + 1) // 2
    columns = [torch.cat(part) for part in (pictures[:half], pictures[half:]) if part]
    height = max(len(column) for column in columns)
    columns = [torch.nn.functional.pad(c, (0, 0, 0, 0, 0, height - len(c))) for c in columns]
    picture = torch.cat(columns, dim=1).flip(-1)
    cv2.imwrite(str(path), (picture.numpy() * 255).round().astype("uint8"))
