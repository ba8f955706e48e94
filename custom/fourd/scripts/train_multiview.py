"""Train the embedded multi-view model: text encoder and U-Net together, on views of the world.

The learning rate is constant after a warm-up and falls linearly to zero over the last
`--decay-steps`, so a run can be lengthened by resuming it with a larger `--steps`: training goes
on from the last checkpoint before the decay. Kill it at any time; the same command resumes.

    python -m custom.fourd.scripts.render_views --work outputs/assets
    python -m custom.fourd.scripts.train_multiview --work outputs/assets --steps 12000
    python -m custom.fourd.scripts.train_multiview --work outputs/assets --steps 12000 --export

`--from-asset` starts from the committed weights instead of fresh ones. A CUDA device is used where
there is one. On a CPU, one process with one thread per core is much faster than one process with
many threads:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m custom.fourd.scripts.train_multiview ...
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from threestudio.utils.misc import get_device
from torch import Tensor
from torch.nn import functional

from custom.fourd.diffusion.camera_vector import CAMERA_VECTOR_SIZE, camera_vector
from custom.fourd.diffusion.cross_view_attention import set_cross_view_attention
from custom.fourd.diffusion.patch_autoencoder import PatchAutoencoder

from .embedded_models import (
    ASSETS,
    MULTIVIEW_FACTS,
    build_multiview_unet,
    build_scheduler,
    build_text_encoder,
    write_manifest_entry,
)
from .make_family import make_tokenizer
from .muon import Muon
from .world_views import (
    FOVY_RAD,
    NUM_VIEWS,
    ViewGroups,
    chance,
    colour_views,
    draw_backgrounds,
    group_cameras,
    load_groups,
    recolour,
    say,
    view_suffix,
)

TEXT_DROPOUT = 0.1
SINGLE_VIEW_SHARE = 0.08
"""Of the steps: single images without a camera, whose words name the view."""
LONE_VIEW_SHARE = 0.42
"""Of the steps: one view of each of four times as many objects, with its camera."""
TIMESTEP_POWER = 0.55
WEIGHT_DECAY = 0.01


@dataclass
class Batch:
    """Latents of view groups, their words, and their cameras (None in single-image mode)."""

    latents: Tensor
    captions: list[str]
    cameras: Tensor | None
    num_views: int


class ViewSource:
    """Draws training batches; batch n is a pure function of (seed, n)."""

    def __init__(self, groups: list[ViewGroups], vae: PatchAutoencoder, seed: int) -> None:
        self.groups, self.vae, self.seed = groups, vae, seed
        self.poses = [group_cameras(part.cameras) for part in groups]
        self.with_count = {
            k: [i for i, part in enumerate(groups) if len(part.scenes[0].objects) == k]
            for k in (1, 2)
        }

    def batch(self, step: int, num_groups: int) -> Batch:
        """Half the objects are alone, half in pairs; the kind of step is drawn first."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        kind = float(torch.rand((), generator=generator))
        single = kind < SINGLE_VIEW_SHARE
        lone = single or kind < SINGLE_VIEW_SHARE + LONE_VIEW_SHARE
        count = num_groups * NUM_VIEWS if lone else num_groups
        backgrounds = draw_backgrounds(count, generator)
        images, captions, cameras = [], [], []
        for number in range(count):
            view = int(torch.randint(NUM_VIEWS, (), generator=generator))
            views = slice(view, view + 1) if lone else slice(0, NUM_VIEWS)
            parts = self.with_count[1 + number % 2]
            part = parts[int(torch.randint(len(parts), (), generator=generator))]
            group = int(torch.randint(len(self.groups[part].scenes), (), generator=generator))
            scene = recolour(self.groups[part].scenes[group], generator)
            layers = self.groups[part].layers[group][views]
            background = backgrounds[number].expand(len(layers), 3)
            images.append(colour_views(layers, [scene] * len(layers), background))
            caption = "" if chance(generator, TEXT_DROPOUT) else say(scene, generator)
            with_view = caption and (single or chance(generator, 0.1))
            captions += [
                f"{caption}, {view_suffix(float(azimuth))}" if with_view else caption
                for azimuth in self.poses[part][1][group][views]
            ]
            poses = self.poses[part][0][group][views]
            cameras.append(camera_vector(poses, torch.full((len(poses),), FOVY_RAD), "embedded"))
        with torch.no_grad():
            latents = self.vae.encode(torch.cat(images)).latent_dist.mode()
        views = 1 if lone else NUM_VIEWS
        return Batch(latents, captions, None if single else torch.cat(cameras), views)


def _split_parameters(modules: torch.nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden matrices for Muon; embeddings, first and last layers, biases and norms for AdamW."""
    outer = ("embed", "conv_in", "conv_out", "class_embedding")
    matrices, others = [], []
    for name, parameter in modules.named_parameters():
        is_hidden = parameter.ndim >= 2 and not any(word in name for word in outer)
        (matrices if is_hidden else others).append(parameter)
    return matrices, others


class Trainer:
    """Text encoder, U-Net, their running averages, and their two optimizers."""

    def __init__(self, rate: float, ema_decay: float) -> None:
        self.text_encoder, self.unet = build_text_encoder(), build_multiview_unet()
        set_cross_view_attention(self.unet, NUM_VIEWS)
        self.tokenizer, self.scheduler = make_tokenizer(), build_scheduler()
        self.device = get_device()
        self.modules = torch.nn.ModuleDict({"text": self.text_encoder, "unet": self.unet})
        self.modules.to(self.device)
        matrices, others = _split_parameters(self.modules)
        self.optimizers = (
            Muon(matrices, lr=rate, weight_decay=WEIGHT_DECAY),
            torch.optim.AdamW(
                others, lr=rate, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY, fused=True
            ),
        )
        self.rate, self.ema_decay = rate, ema_decay
        self.ema = {name: value.clone() for name, value in self.modules.state_dict().items()}
        self.step_count = 0

    def encode(self, captions: list[str]) -> Tensor:
        """Token states of captions, each different caption computed once."""
        unique = sorted(set(captions))
        tokens = self.tokenizer(
            unique, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        states = self.text_encoder(tokens.to(self.device)).last_hidden_state
        return states[torch.tensor([unique.index(caption) for caption in captions])]

    def train_step(self, batch: Batch, scale: float, seed: int) -> float:
        """One update with the learning rate times `scale`; returns the velocity loss."""
        generator = torch.Generator().manual_seed(seed)
        views = batch.num_views
        count = len(batch.latents)
        drawn = torch.rand((count // views,), generator=generator) ** TIMESTEP_POWER
        timesteps = (drawn * 1000).long().clamp(0, 999).repeat_interleave(views)
        noise = torch.randn(batch.latents.shape, generator=generator)
        timesteps, noise = timesteps.to(self.device), noise.to(self.device)
        latents = batch.latents.to(self.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        size = CAMERA_VECTOR_SIZE["embedded"]
        cameras = noisy.new_zeros(count, size) if batch.cameras is None else batch.cameras
        cameras = cameras.to(self.device)
        set_cross_view_attention(self.unet, views)
        states = self.encode(batch.captions)
        predicted = self.unet(noisy, timesteps, states, class_labels=cameras).sample
        loss = functional.mse_loss(predicted, target)
        self.modules.zero_grad(set_to_none=True)
        loss.backward()
        self._share_gradients()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * scale
            optimizer.step()
        self.step_count += 1
        self._average()
        return float(loss.detach())

    def _share_gradients(self) -> None:
        """Replace gradients by their mean over the processes, in one message."""
        if not dist.is_initialized():
            return
        gradients = [p.grad for p in self.modules.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.ema_decay, (1 + self.step_count) / (10 + self.step_count))
        ours, theirs = [], []
        for name, value in self.modules.state_dict().items():
            if value.is_floating_point():
                ours.append(self.ema[name])
                theirs.append(value)
        torch._foreach_lerp_(ours, theirs, 1 - decay)

    def load_asset(self, folder: Path) -> None:
        """Take the weights of an exported model; optimizers and step start anew."""
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        for ours, stored in (
            (self.unet, UNet2DConditionModel.from_pretrained(folder / "unet")),
            (self.text_encoder, CLIPTextModel.from_pretrained(folder / "text_encoder")),
        ):
            ours.load_state_dict(stored.float().state_dict())
        self.ema = {name: value.clone() for name, value in self.modules.state_dict().items()}

    def state(self) -> dict:
        return {
            "model": self.modules.state_dict(),
            "ema": self.ema,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step_count,
        }

    def load(self, state: dict) -> None:
        self.modules.load_state_dict(state["model"])
        self.ema = state["ema"]
        for optimizer, saved in zip(self.optimizers, state.get("optimizers", ()), strict=False):
            optimizer.load_state_dict(saved)
        self.step_count = state["step"]


def rate_scale(step: int, steps: int, warmup: int, decay: int) -> float:
    """Warm-up, constant, linear decay to zero."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / decay))


def fit_autoencoder(groups: list[ViewGroups]) -> PatchAutoencoder:
    """The family's autoencoder: principal components of training views, remade identically."""
    vae = PatchAutoencoder()
    generator = torch.Generator().manual_seed(1)
    images = []
    for part in groups:
        for index in range(0, min(600, len(part.scenes)), 2):
            scene = recolour(part.scenes[index], generator)
            background = draw_backgrounds(1, generator).expand(NUM_VIEWS, 3)
            images.append(colour_views(part.layers[index], [scene] * NUM_VIEWS, background))
    vae.fit(torch.cat(images))
    return vae


def family_autoencoder(groups: list[ViewGroups], assets: Path = ASSETS) -> PatchAutoencoder:
    """The committed autoencoder, which fixes what latents mean; fitted only where there is none."""
    folder = assets / "multiview" / "vae"
    if folder.is_dir():
        return PatchAutoencoder.from_pretrained(folder)
    return fit_autoencoder(groups)


def save_atomically(payload: dict, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(payload, part)
    part.rename(path)


def export(trainer: Trainer, vae: PatchAutoencoder, recipe: dict, assets: Path = ASSETS) -> Path:
    """Write the averaged weights as an fp16 diffusers folder with its manifest entry."""
    import json

    trainer.modules.load_state_dict(trainer.ema)
    folder = assets / "multiview"
    set_cross_view_attention(trainer.unet, 1)
    trainer.unet.half().save_pretrained(folder / "unet")
    trainer.text_encoder.half().save_pretrained(folder / "text_encoder")
    vae.save_pretrained(folder / "vae")
    trainer.tokenizer.save_pretrained(folder / "tokenizer")
    trainer.scheduler.save_pretrained(folder / "scheduler")
    (folder / "multiview.json").write_text(json.dumps(MULTIVIEW_FACTS) + "\n")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["custom.fourd.diffusion.patch_autoencoder", "PatchAutoencoder"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    write_manifest_entry("multiview", recipe, assets)
    return folder


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("outputs/assets"))
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--decay-steps", type=int, default=2500)
    parser.add_argument("--groups", type=int, default=8, help="4-view groups in the joint batch")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="multiview", help="of the checkpoint in --work")
    parser.add_argument("--from-asset", action="store_true", help="start from committed weights")
    parser.add_argument("--export", action="store_true", help="write the asset, do not train")
    return parser.parse_args(argv)


def checkpoint_paths(args: argparse.Namespace) -> tuple[Path, Path]:
    """The newest checkpoint, and the newest one of the constant learning rate."""
    return args.work / f"{args.name}.pt", args.work / f"{args.name}_stable.pt"


def restore(trainer: Trainer, args: argparse.Namespace) -> None:
    """Continue where the work folder stands; a decay that was made for other steps is undone."""
    path, stable = checkpoint_paths(args)
    for candidate in (path, stable):
        if not candidate.exists():
            continue
        state = torch.load(candidate, weights_only=True, map_location=trainer.device)
        has_decayed = state["steps"] != args.steps and state["step"] > state["decay_from"]
        if candidate == path and has_decayed:
            continue
        trainer.load(state)
        return
    if args.from_asset:
        trainer.load_asset(ASSETS / "multiview")


def train(
    trainer: Trainer, source: ViewSource, args: argparse.Namespace, rank: int, ranks: int
) -> None:
    """Step until `args.steps`; process 0 logs every 50 steps and saves every two minutes."""
    path, stable = checkpoint_paths(args)
    decay_from = args.steps - args.decay_steps
    start = saved = time.monotonic()
    losses: list[float] = []
    while trainer.step_count < args.steps:
        step = trainer.step_count
        scale = rate_scale(step, args.steps, args.warmup_steps, args.decay_steps)
        item = step * ranks + rank
        batch = source.batch(item, args.groups // ranks)
        losses.append(trainer.train_step(batch, scale, args.seed * 7_000_003 + item))
        now = time.monotonic()
        if rank > 0:
            continue
        if trainer.step_count % 50 == 0:
            line = f"{trainer.step_count} loss {sum(losses) / len(losses):.4f} {now - start:.0f} s"
            losses.clear()
            with path.with_suffix(".log").open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)
        if now - saved > 120 or trainer.step_count == args.steps:
            state = {**trainer.state(), "steps": args.steps, "decay_from": decay_from}
            save_atomically(state, path)
            if trainer.step_count <= decay_from:
                save_atomically(state, stable)
            saved = time.monotonic()


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(args.seed)
    groups = [load_groups(path) for path in sorted(args.work.glob("views_*.pt"))]
    if not groups:
        print(f"no views_*.pt in {args.work}; run custom.fourd.scripts.render_views first.")
        return 1
    vae = family_autoencoder(groups)
    trainer = Trainer(args.rate, args.ema)
    restore(trainer, args)
    if not args.export:
        train(trainer, ViewSource(groups, vae, args.seed), args, rank, ranks)
        return 0
    log = checkpoint_paths(args)[0].with_suffix(".log")
    recipe = {
        "script": "custom.fourd.scripts.train_multiview",
        "seed": args.seed,
        "steps": trainer.step_count,
        "batch": f"{args.groups} groups of {NUM_VIEWS} views",
        "rate": args.rate,
        "from_asset": args.from_asset,
        "loss": float(log.read_text().split()[-3]) if log.exists() else None,
    }
    print(export(trainer, vae, recipe))
    return 0


if __name__ == "__main__":
    sys.exit(main())
