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


def parse_arguments(description: str, folder: str) -> argparse.Namespace:
    """The flags that every such benchmark has; `folder` is the model's."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(folder))
    parser.add_argument("--captions", type=int, default=24)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--sheet", type=Path, help="write samples and their truth here")
    parser.add_argument("--write", action="store_true", help="store the result under results/")
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


def report(
    name: str, samples: list[Sample], group: str, args: argparse.Namespace, started: float
) -> None:
    """Print the mean PSNR of each value of the column `group`, and store what `args` ask for."""
    values = list(dict.fromkeys(sample.row[group] for sample in samples))
    means = {}
    for value in values:
        figures = [sample.row["psnr"] for sample in samples if sample.row[group] == value]
        means[str(value)] = sum(figures) / len(figures)
        print(f"mean over {group} {value}: {means[str(value)]:.2f} dB")
    sampler = f"DDIM (eta 0), {args.steps} steps, guidance {args.guidance_scale}"
    print(f"{sampler}; {time.monotonic() - started:.0f} s")
    if args.write:
        facts = {
            **describe_circumstances(threads=torch.get_num_threads()),
            "sampler": sampler,
            "means": means,
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
