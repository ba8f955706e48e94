"""Build the guidance and the prompt processor on models of MVDream's and SD 2.1's full size.

    python tests/benchmarks/full_layout_two_steps.py [--tiny] [--folder DIR]

Weights are random (fp16 safetensors, about 5 GB in a temporary folder): this measures whether the
full layout loads and steps on this machine, with its time and peak memory, and nothing else. Takes
several minutes and about 12 GiB on a CPU. ``--tiny`` runs the same on small models in seconds.
"""

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import threestudio  # noqa: E402
from threestudio.utils.camera import camera_from_orbit  # noqa: E402

import custom.fourd  # noqa: E402, F401
from tests.fixtures.model_folders import (  # noqa: E402
    write_multiview_folder,
    write_stable_diffusion_folder,
)


def two_steps(folder: Path, full: bool) -> dict:
    """Write the models, build on them, take two optimizer steps on four views; return a report."""
    seconds = {}
    with _timed(seconds, "write"):
        mvdream = write_multiview_folder(folder / "mvdream", full=full)
        text = write_stable_diffusion_folder(folder / "sd21", full=full)
    find = threestudio.find
    with _timed(seconds, "prompt"):
        prompt = find("stable-diffusion-prompt-processor")(
            {
                "prompt": "a red cube",
                "pretrained_model_name_or_path": str(text),
                "cache_dir": str(folder / "cache"),
            }
        )()
    with _timed(seconds, "load"):
        guidance = find("multiview-diffusion-guidance")(
            {"pretrained_model_name_or_path": str(mvdream), "guidance_scale": 50.0}
        )
    batch = _views()
    rgb = torch.full((4, 64, 64, 3), 0.5, device=guidance.device, requires_grad=True)
    optimizer = torch.optim.AdamW([rgb], lr=0.01)
    losses = []
    for step in range(2):
        with _timed(seconds, f"step_{step}"):
            guidance.update_step(0, step)
            loss = guidance(rgb, prompt, **batch)["loss_sds"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return {
        "layout": "full" if full else "tiny",
        "parameters_millions": round(sum(p.numel() for p in guidance.unet.parameters()) / 1e6, 1),
        "losses": losses,
        "moved": bool((rgb.detach() != 0.5).any()),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "device": str(guidance.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def _views() -> dict[str, torch.Tensor]:
    angles = {"elevation": torch.full((4,), 15.0), "azimuth": torch.arange(4) * 90.0}
    distances = torch.full((4,), 2.5)
    c2w = camera_from_orbit(angles["elevation"], angles["azimuth"], distances)
    return {**angles, "camera_distances": distances, "c2w": c2w, "fovy": torch.full((4,), 0.7)}


class _timed:
    """Add the seconds of a block to a dict."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error) -> None:
        self.seconds[self.name] = time.perf_counter() - self.start


def main() -> None:
    """Run from the command line and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small models, seconds")
    parser.add_argument("--folder", type=Path, help="where the models are written; kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        report = two_steps(arguments.folder or Path(temporary), full=not arguments.tiny)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
