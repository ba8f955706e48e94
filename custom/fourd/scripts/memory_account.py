"""Account of the GPU memory of a training step of stage 3 with the published models, per module.

    python -m custom.fourd.scripts.memory_account --profile low_vram

No GPU is asked. A step's peak is, with M the frozen models, S the scene, R what the renderer keeps
for the backward pass and V what the autoencoder keeps,

    peak = (M + S + R + V + X) * (1 + RESERVE) + CONTEXT
    S = 16 bytes per trained number (value, gradient, two moments of Adam, all fp32)
    R = a K + b N        K samples with a gradient, N samples in all
    X = the largest of what comes and goes: noise predictions, encoding, or candidates of a ray

Derived: the models' parameters, V and the predictions' X, from the published architectures, run on
torch's meta device while every storage that lives is counted. Attention is fused: of it, only the
result counts. Measured, on the CPU at the config's own grid sizes: a and b, with the hash grid's
PyTorch twin, which is what a GPU runs without tiny-cuda-nn. Assumed: N is `SURVIVING` of all
candidates, and RESERVE and CONTEXT stand for the allocator's gaps, CUDA itself and its libraries.
Text encoders are gone before the first step.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from .live_bytes import FusedAttention, LiveBytes

ROOT = Path(__file__).resolve().parents[3]
STAGE_3 = ROOT / "custom/configs/fourdfy_stage_3.yaml"
GB = 1e9
RESERVE, CONTEXT = 0.10, 0.8 * GB
SURVIVING = 0.25
"""Share of the candidates that occupancy and pruning let through; an object that fills half of the
picture and half of each ray's way through the box."""
CANDIDATES_PER_PASS, BYTES_PER_CANDIDATE = 2**24, 32
"""The renderer's pass on a GPU: position, clamped position, cell index and flags of a candidate."""

SD21_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SD_VAE = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
}
MVDREAM_IMAGE, ZEROSCOPE_FRAME, TEXT = (256, 256), (320, 576), (77, 1024)


@dataclass(frozen=True)
class Row:
    """One entry of an account, in bytes; ``basis`` is "derived", "measured" or "assumed"."""

    module: str
    what: str
    size: float
    basis: str


def compose(config: Path, profile: str, overrides: tuple[str, ...] = ()) -> DictConfig:
    """The resolved experiment of a config file under a profile; nothing is checked or built."""
    from threestudio.launcher.profiles import deltas_of
    from threestudio.launcher.stages import Source
    from threestudio.utils.config_sources import (
        load_with_includes,
        parse_override,
        resolve_config,
    )

    file_cfg = load_with_includes(config, ROOT)
    source = Source(Path(config), file_cfg, tuple(parse_override(item) for item in overrides))
    return resolve_config(source.merged(deltas_of(file_cfg, ROOT)[profile]))


def build_models() -> dict[str, torch.nn.Module]:
    """The published models without weights, fp16, frozen: "mvdream", "zeroscope", their "vae"."""
    from diffusers import AutoencoderKL, UNet2DConditionModel, UNet3DConditionModel

    with torch.device("meta"):
        models = {
            "mvdream": UNet2DConditionModel(
                **SD21_UNET,
                class_embed_type="projection",
                projection_class_embeddings_input_dim=16,
            ),
            "zeroscope": UNet3DConditionModel(),
            "vae": AutoencoderKL(**SD_VAE),
        }
    return {name: model.half().requires_grad_(False).eval() for name, model in models.items()}


def prediction_bytes(unet: torch.nn.Module, latents: tuple[int, ...], **inputs) -> int:
    """Peak of a noise prediction of both halves of classifier-free guidance, beyond the weights."""
    batch = latents[0]
    arguments = {
        "sample": _meta(*latents),
        "timestep": _meta(batch),
        "encoder_hidden_states": _meta(batch, *TEXT),
        **inputs,
    }
    with torch.no_grad(), FusedAttention(), LiveBytes() as live:
        unet(**arguments)
    return live.peak


def encoding_bytes(vae: torch.nn.Module, images: int, size: tuple[int, int]) -> tuple[int, int]:
    """(kept for the backward pass, peak of both passes) of encoding images with a gradient."""
    rgb = _meta(images, 3, *size).requires_grad_()
    with LiveBytes() as live:
        latents = vae.encode(rgb).latent_dist.mean
        kept = live.now
        torch.autograd.grad(latents.float().sum(), rgb)
    return kept, live.peak


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=torch.float16)


def build_scene(system: DictConfig, backend: str = "torch") -> tuple:
    """(geometry, background, renderer) of the config, on the CPU, to measure what samples keep.

    The renderer is the one with a budget; it prunes nothing and finds every cell occupied, so that
    the number of samples is known.

    Args:
        backend: of the hash grids; "torch" keeps what a GPU without tiny-cuda-nn keeps, "cpu" what
            a compiled kernel does.
    """
    import threestudio

    grid = {**system.geometry.pos_encoding_config, "static": False, "backend": backend}
    geometry = threestudio.find(system.geometry_type)(
        {**system.geometry, "pos_encoding_config": grid}
    )
    material = threestudio.find(system.material_type)(system.material)
    background = threestudio.find(system.background_type)(system.background)
    renderer = threestudio.find("mask-nerf-volume-renderer")(
        {
            "radius": system.geometry.radius,
            "num_samples_per_ray": 64,
            "prune_alpha_threshold": False,
            "train_max_nums": 0,
        },
        geometry=geometry,
        material=material,
        background=background,
    )
    renderer.estimator.binaries.fill_(True)
    return geometry, background, renderer.train()


def sample_bytes(renderer, edge: int = 6) -> tuple[float, float]:
    """(a, b): bytes that a sample with a gradient, and any sample, keep until the backward pass.

    Two renders of the same rays differ in how many of their samples keep a gradient; a and b are
    the line through both. Fixed costs, such as the rays', count as the samples' too.
    """
    all_kept, n_samples = _render(renderer, edge)
    budget = n_samples // 4
    few_kept, _ = _render(renderer, edge, budget)
    per_gradient = (all_kept - few_kept) / (n_samples - budget)
    return per_gradient, (few_kept - per_gradient * budget) / n_samples


def _render(renderer, edge: int, budget: int | None = None) -> tuple[int, int]:
    """(bytes kept, samples) of a training render of two images through the middle of the box."""
    from threestudio.utils.ops import get_ray_directions, get_rays

    c2w = torch.tensor([[0.0, 0, 1, 3], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]).repeat(2, 1, 1)
    directions = get_ray_directions(edge, edge, edge * 2.0)[None].repeat(2, 1, 1, 1)
    rays_o, rays_d = get_rays(directions, c2w, keepdim=True, normalize=True)
    lights, times = torch.zeros(2, 3), torch.tensor([0.2, 0.2])
    with LiveBytes() as live:
        output = renderer(rays_o, rays_d, lights, frame_times=times, gradient_budget=budget)
        return live.now, output["weights"].shape[0]


def account(cfg: DictConfig, backend: str = "torch") -> dict[str, list[Row]]:
    """Rows of a "multi-view step" and a "video step" of a config of stage 3.

    Raises:
        ValueError: if the config's video prior is not Zeroscope, or it trains by VSD.
    """
    data, system = cfg.data, cfg.system
    if system.guidance_type_video != "zeroscope-guidance" or _draws_images(data):
        raise ValueError(
            f"the account knows steps of MVDream and Zeroscope only; expected guidance_type_video "
            f"zeroscope-guidance, not {system.guidance_type_video!r}, and "
            "data.single_view.prob_single_view_video 1.0. Use profile low_vram."
        )
    models = build_models()
    geometry, background, renderer = build_scene(system, backend)
    shared = [*_frozen_rows(models), _scene_row(geometry, background)]
    costs = sample_bytes(renderer)
    frames, views = data.single_view.num_frames, max(data.multi_view.batch_size)
    clip = (frames, data.single_view.height_vid, data.single_view.width_vid)
    group = (views, max(data.multi_view.height), max(data.multi_view.width))
    low_ram = system.guidance_video.low_ram_vae
    encoded = low_ram if low_ram > 0 else frames
    zeroscope = prediction_bytes(
        models["zeroscope"], (2, 4, frames, *(edge // 8 for edge in ZEROSCOPE_FRAME))
    )
    mvdream = prediction_bytes(
        models["mvdream"],
        (2 * views, 4, *(edge // 8 for edge in MVDREAM_IMAGE)),
        class_labels=_meta(2 * views, 16),
    )
    return {
        "video step": [
            *shared,
            *_render_rows(system, clip, frames, True, costs),
            *_guidance_rows(models["vae"], encoded, ZEROSCOPE_FRAME, "zeroscope", zeroscope),
        ],
        "multi-view step": [
            *shared,
            *_render_rows(system, group, 1, False, costs),
            *_guidance_rows(models["vae"], views, MVDREAM_IMAGE, "mvdream", mvdream),
        ],
    }


def _draws_images(data: DictConfig) -> bool:
    return data.prob_multi_view < 1 and data.single_view.prob_single_view_video != 1.0


def _frozen_rows(models: dict[str, torch.nn.Module]) -> list[Row]:
    rows = []
    for name in ("mvdream", "zeroscope"):
        for part, model in (("U-Net", models[name]), ("autoencoder", models["vae"])):
            count = sum(p.numel() for p in model.parameters())
            what = f"{part}, {count / 1e6:.0f} M numbers in fp16"
            rows.append(Row(name, what, 2.0 * count, "derived"))
    return rows


def _scene_row(geometry: torch.nn.Module, background: torch.nn.Module) -> Row:
    count = sum(p.numel() for module in (geometry, background) for p in module.parameters())
    return Row("scene", f"{count / 1e6:.1f} M numbers: value, gradient, Adam", 16.0 * count,
               "derived")  # fmt: skip


def gradient_samples(system: DictConfig, times: int, is_video: bool, samples: float) -> float:
    """K: samples with a gradient in a step of so many scene times, of ``samples`` in all."""
    renderer = system.renderer.get("base_renderer") or system.renderer
    budget = renderer.get("train_max_nums") or 0
    if not is_video and renderer.get("train_max_nums_static") is not None:
        budget = renderer.train_max_nums_static
    return min(samples, budget * times) if budget else samples


def _render_rows(
    system: DictConfig,
    images: tuple[int, int, int],
    times: int,
    is_video: bool,
    costs: tuple[float, float],
) -> list[Row]:
    count, height, width = images
    renderer = system.renderer
    per_ray = renderer.get("num_samples_per_ray") or renderer.base_renderer.num_samples_per_ray
    candidates = count * height * width * per_ray
    samples = SURVIVING * candidates
    kept = gradient_samples(system, times, is_video, samples)
    what = f"{count} x {height} x {width} rays"
    return [
        Row("renderer", f"{what}, {kept / 1e6:.2f} M samples with a gradient", costs[0] * kept,
            "measured"),
        Row("renderer", f"{what}, {samples / 1e6:.1f} M samples in all", costs[1] * samples,
            "measured"),
    ]  # fmt: skip


def _guidance_rows(
    vae: torch.nn.Module, images: int, size: tuple[int, int], name: str, prediction: int
) -> list[Row]:
    kept, peak = encoding_bytes(vae, images, size)
    passing = {
        "noise prediction": float(prediction),
        "encoding and its backward pass": float(peak - kept),
        "candidates of rays": float(CANDIDATES_PER_PASS * BYTES_PER_CANDIDATE),
    }
    largest = max(passing, key=passing.get)
    what = f"{images} images of {size[0]} x {size[1]} encoded with a gradient"
    return [
        Row(name, what, float(kept), "derived"),
        Row(name, f"passing: {largest}", passing[largest], "derived"),
    ]


def peak_bytes(rows: list[Row]) -> float:
    """The step's peak: its rows, the allocator's gaps and CUDA's own."""
    return sum(row.size for row in rows) * (1 + RESERVE) + CONTEXT


def format_account(phases: dict[str, list[Row]]) -> str:
    """The account as a table in Markdown."""
    lines = []
    for name, rows in phases.items():
        lines += [f"| {name} | | GB | |", "|---|---|---|---|"]
        lines += [f"| {r.module} | {r.what} | {r.size / GB:.2f} | {r.basis} |" for r in rows]
        gaps = sum(row.size for row in rows) * RESERVE
        lines += [
            f"| allocator | gaps, {RESERVE:.0%} | {gaps / GB:.2f} | assumed |",
            f"| CUDA | context and libraries | {CONTEXT / GB:.2f} | assumed |",
            f"| **sum** | | **{peak_bytes(rows) / GB:.2f}** | |",
            "",
        ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the account of a config."""
    from threestudio.kernels import hash_grid

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=STAGE_3)
    parser.add_argument("--profile", default="low_vram")
    parser.add_argument("--grid", default="torch", choices=hash_grid.BACKENDS[1:3],
                        help="hash grid: PyTorch's twin, or the compiled kernel")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args(argv)
    cfg = compose(arguments.config, arguments.profile, tuple(arguments.overrides))
    print(format_account(account(cfg, arguments.grid)))


if __name__ == "__main__":
    main()
