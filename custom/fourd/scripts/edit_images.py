"""Edit a folder of images by an instruction, all alike: they borrow the look of one of them.

    python -m custom.fourd.scripts.edit_images photos --output edited \\
        --instruction "make it look like a van gogh painting"
    python -m custom.fourd.scripts.edit_images renders --output edited --resize 64 \\
        --instruction "give it a random palette" --model embedded://edit

Results are PNG files of the same names and size, with `edit.json` beside them, which says how they
were made. Nothing is ever overwritten: the same command goes on where it was stopped, and any other
needs a folder of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from threestudio.utils import rng
from torch import Tensor

from custom.fourd.diffusion.edit_denoiser import ATTENTIONS
from custom.fourd.guidance.anchor_instructpix2pix_guidance import (
    Anchor,
    AnchorInstructPix2PixGuidance,
)
from custom.fourd.prompts.instruction_prompt_processor import InstructionPromptProcessor

from .exit_status import run_tool
from .result_folder import claim_output, encode_png, write_new

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
RECORD = "edit.json"


@dataclass
class Frames:
    """The images of a folder, in the order of their names."""

    paths: list[Path]

    def read(self, index: int) -> Float[Tensor, "h w 3"]:
        """An image in [0, 1].

        Raises:
            ValueError: it cannot be read.
        """
        import cv2

        data = np.fromfile(self.paths[index], dtype=np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
        if image is None:
            raise ValueError(
                f"{self.paths[index]} is damaged or no image; expected one of "
                f"{', '.join(IMAGE_SUFFIXES)}. Replace it or take it out of the folder."
            )
        return torch.from_numpy(cv2.cvtColor(image, cv2.COLOR_BGR2RGB)).float() / 255


def find_frames(folder: Path) -> Frames:
    """The images of a folder, each of them read once to see that all are whole and of one size.

    Raises:
        ValueError: there are none, two have the same name but for the ending, one is damaged, or
            their sizes differ.
    """
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(
            f"{folder} holds no images; expected files ending in {', '.join(IMAGE_SUFFIXES)}."
        )
    frames = Frames(paths)
    stems: dict[str, Path] = {}
    first = tuple(frames.read(0).shape[:2])
    for index, path in enumerate(paths):
        if path.stem in stems:
            raise ValueError(
                f"{path} and {stems[path.stem]} would both become {path.stem}.png; expected "
                "different names. Rename one."
            )
        stems[path.stem] = path
        size = tuple(frames.read(index).shape[:2])
        if size != first:
            raise ValueError(
                f"{path} has {size[0]} x {size[1]} pixels and {paths[0].name} {first[0]} x "
                f"{first[1]}; expected images of one size. Resize them first."
            )
    return frames


def edit_folder(
    guidance: AnchorInstructPix2PixGuidance,
    prompt_embeddings: Float[Tensor, "3 l d"],
    frames: Frames,
    output: Path,
    anchor_index: int,
    start: int,
    steps: int,
    window: int,
) -> int:
    """Edit what has no result yet; returns how many images were edited.

    Random: each image's noise, role "edit-noise", by its place in the folder; what all have in
    common, role "edit-noise-shared". So neither `window` nor a stop between changes a result,
    except with sparse_causal attention, which starts anew in each window, and with group norms that
    frames share.
    """
    todo = [i for i, p in enumerate(frames.paths) if not (output / f"{p.stem}.png").exists()]
    anchor_image = frames.read(anchor_index)
    for first in range(0, len(todo), window):
        indices = todo[first : first + window]
        images = torch.stack([frames.read(index) for index in indices])
        anchor = Anchor(anchor_image, anchor_image, rng.generator("edit-noise", 0, anchor_index))
        edited = guidance.edit(
            images,
            images,
            prompt_embeddings,
            start,
            steps,
            anchor,
            [rng.generator("edit-noise", 0, index) for index in indices],
            rng.generator("edit-noise-shared", 0),
        )
        for index, image in zip(indices, edited, strict=True):
            write_new(output / f"{frames.paths[index].stem}.png", encode_png(image))
        done = len(frames.paths) - len(todo) + first + len(indices)
        print(f"edited {done} of {len(frames.paths)} images", flush=True)
    return len(todo)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, help="folder of images of one size")
    parser.add_argument("--instruction", required=True, help="what to do to them")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--model", default="timbrooks/instruct-pix2pix", help="folder or hub id")
    parser.add_argument("--revision", default=None, help="commit of a hub id")
    parser.add_argument("--anchor", help="image whose look the others borrow; the first")
    parser.add_argument("--attention", choices=ATTENTIONS, default="anchor")
    parser.add_argument("--start", type=int, default=1000, help="T, strength, in training steps")
    parser.add_argument("--steps", type=int, default=20, help="n, denoising steps")
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--image-guidance-scale", type=float, default=1.5)
    parser.add_argument("--resize", type=int, default=None, help="longer edge at which to edit, px")
    parser.add_argument("--shared-noise", type=float, default=0.0, help="common share, 0 to 1")
    parser.add_argument("--share-group-norm", action="store_true", help="as published")
    parser.add_argument("--window", type=int, default=8, help="images in memory at once")
    parser.add_argument("--chunk-size", type=int, default=18, help="images in a U-Net call")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _anchor_index(frames: Frames, name: str | None) -> int:
    if name is None:
        return 0
    for index, path in enumerate(frames.paths):
        if name in (path.name, path.stem):
            return index
    raise ValueError(
        f"--anchor {name} is no image of the folder; expected one of "
        f"{', '.join(path.name for path in frames.paths[:5])}, ..."
    )


def _run(args: argparse.Namespace) -> None:
    if args.window < 1:
        raise ValueError(f"--window is {args.window}; expected 1 or more images.")
    frames = find_frames(args.images)
    anchor_index = _anchor_index(frames, args.anchor)
    said = {key: value for key, value in vars(args).items() if key not in ("output", "images")}
    # What does not change the results may differ from one start to the next.
    record = {k: v for k, v in said.items() if k not in ("window", "chunk_size")}
    record["images"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in frames.paths
    }
    model = {"pretrained_model_name_or_path": args.model, "revision": args.revision}
    rng.set_experiment_seed(args.seed)
    prompts = InstructionPromptProcessor({**model, "instruction": args.instruction})
    keys = ("attention", "resize", "shared_noise", "share_group_norm", "chunk_size")
    keys += ("guidance_scale", "image_guidance_scale")
    guidance = AnchorInstructPix2PixGuidance({**model, **{key: said[key] for key in keys}})
    claim_output(args.output, record, RECORD, "edit")
    edit_folder(
        guidance, prompts.embeddings(), frames, args.output, anchor_index,
        args.start, args.steps, args.window,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns 1 after a refusal, whose sentence it prints."""
    args = _parser().parse_args(argv)
    return run_tool("edit_images", lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
