"""Convert a full-size MVDream checkpoint from its original layout, and ask it for one gradient.

    python tests/benchmarks/full_size_mvdream_call.py [--tiny] [--folder DIR] [--save]

The checkpoint has every tensor of sd-v2.1-base-4view.pt by its original name and in its size, with
random fp16 weights (about 3 GB in a temporary folder, twice). The command's conversion writes the
diffusers folder, text encoder included; the guidance loads it and scores four views once, as
4D-fy's first stage does. This measures time and memory of a real-sized model on this machine, and
nothing else. Takes several minutes and about 9 GiB on a CPU; ``--tiny`` takes seconds.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import threestudio  # noqa: E402

import custom.fourd  # noqa: E402, F401
from custom.fourd.scripts import convert_checkpoint  # noqa: E402
from tests.benchmarks.circumstances import describe_circumstances, result_path  # noqa: E402
from tests.benchmarks.full_layout_two_steps import _timed, _views  # noqa: E402
from tests.fixtures.model_folders import write_clip_tokenizer  # noqa: E402
from tests.fixtures.original_layouts import OPEN_CLIP, checkpoint_shapes, random_state  # noqa: E402


def one_call(folder: Path, full: bool) -> dict:
    """Write, convert, load, encode a prompt, score four views once; return a report."""
    seconds: dict[str, float] = {}
    source = folder / "sd-v2.1-base-4view.pt"
    with _timed(seconds, "write_original"):
        n_tensors = _write_original(source, full)
    write_clip_tokenizer(folder / "words" / "tokenizer")
    with _timed(seconds, "convert"):
        model = convert_checkpoint.convert(
            "mvdream", source, folder / "mvdream", str(folder / "words")
        )
    find = threestudio.find
    with _timed(seconds, "encode_prompt"):
        prompt = find("stable-diffusion-prompt-processor")({
            "prompt": "a red cube",
            "pretrained_model_name_or_path": str(model),
            "cache_dir": str(folder / "cache"),
        })()  # fmt: skip
    with _timed(seconds, "load"):
        guidance = find("multiview-diffusion-guidance")(
            {
                "pretrained_model_name_or_path": str(model),
                "guidance_scale": 50.0,
                # The small autoencoder has two resolutions, so 256 pixels would be many tokens.
                "image_size": 256 if full else 16,
            }
        )
    rgb = torch.full((4, 64, 64, 3), 0.5, device=guidance.device, requires_grad=True)
    guidance.update_step(0, 0)
    with _timed(seconds, "forward"):
        loss = guidance(rgb, prompt, **_views())["loss_sds"]
    with _timed(seconds, "backward"):
        loss.backward()
    return {
        "layout": "full" if full else "tiny",
        "original_tensors": n_tensors,
        "unet_parameters_millions": round(
            sum(p.numel() for p in guidance.unet.parameters()) / 1e6, 1
        ),
        "views": 4,
        "image_pixels": guidance.image_size,
        "loss": loss.item(),
        "gradient_norm": rgb.grad.norm().item(),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "processor_seconds": round(time.process_time(), 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "device": str(guidance.device),
        "threads": torch.get_num_threads(),
    }


def _write_original(path: Path, full: bool) -> int:
    """Write every tensor of the layout; a small one knows the words of the small tokenizer."""
    shapes = checkpoint_shapes("mvdream", tiny=not full)
    if not full:
        name = f"{OPEN_CLIP}token_embedding.weight"
        shapes[name] = (2 * 256 + 4, *shapes[name][1:])
        shapes[f"{OPEN_CLIP}positional_embedding"] = (77, *shapes[name][1:])
    state = {}
    for number, (key, shape) in enumerate(shapes.items()):
        # One by one, so that only half precision is ever held of all of them.
        state[key] = random_state({key: shape}, seed=number)[key].half()
    torch.save(state, path)
    return len(state)


def main() -> None:
    """Run from the command line; print the report, and keep it with --save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small model, seconds")
    parser.add_argument("--folder", type=Path, help="where the models are written; kept")
    parser.add_argument("--save", action="store_true", help="write it to results/")
    arguments = parser.parse_args()
    circumstances = describe_circumstances(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as temporary:
        report = one_call(arguments.folder or Path(temporary), full=not arguments.tiny)
    text = json.dumps({**circumstances, **report}, indent=1)
    print(text)
    if arguments.save:
        result_path("full_size_mvdream_call", "json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
