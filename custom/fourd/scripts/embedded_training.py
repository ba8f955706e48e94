"""What the trainings of the embedded diffusion models share: text encoder and U-Net together.

The learning rate is constant after a warm-up and falls linearly to zero over the last steps, so a
run can be lengthened by resuming it with more steps: training goes on from the last checkpoint
before the decay. Several processes (torchrun, gloo) divide the batch.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from threestudio.utils.misc import get_device
from torch import Tensor
from torch.nn import functional

from custom.fourd.diffusion.anchor_attention import set_anchor_attention
from custom.fourd.diffusion.cross_view_attention import set_cross_view_attention
from custom.fourd.diffusion.patch_autoencoder import PatchAutoencoder

from .embedded_models import ASSETS, build_scheduler, build_text_encoder, write_manifest_entry
from .make_family import make_tokenizer
from .muon import Muon

Part = TypeVar("Part")
TIMESTEP_POWER = 0.55
WEIGHT_DECAY = 0.01


@dataclass
class Batch:
    """Latents of groups of images, their words, and the class vector of each image."""

    latents: Tensor
    captions: list[str]
    class_vectors: Tensor | None
    """None where the U-Net takes none."""
    group_size: int
    """Neighbours in the batch that attention joins: views of an object, frames of a clip."""
    conditions: Tensor | None = None
    """Latents that the U-Net sees beside the noisy ones, of an image editor."""
    attention: str = "joint"
    """How a group is joined: "joint", or a mode of anchor attention."""


class BatchSource(Protocol):
    """Draws training batches."""

    def batch(self, step: int, num_groups: int) -> Batch:
        """Batch `step`, a pure function of it and of the source's seed."""


def split_parameters(modules: torch.nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden matrices for Muon; embeddings, first and last layers, biases and norms for AdamW."""
    outer = ("embed", "conv_in", "conv_out", "latents", "teacher", "reading", "turn")
    matrices, others = [], []
    for name, parameter in modules.named_parameters():
        is_hidden = parameter.ndim >= 2 and not any(word in name for word in outer)
        (matrices if is_hidden else others).append(parameter)
    return matrices, others


class Trainer:
    """Text encoder, U-Net, their running averages, and their two optimizers.

    Args:
        unet: takes a class vector, or conditions beside the noisy latents.
        rate: learning rate.
        ema_decay: of the running averages.
        class_rate_factor: the class embedding learns so many times faster.
        timestep_power: timesteps are 1000 u ** power, u in [0, 1); lower means more noise.
        complete: (a batch's class vectors, token states) -> the class vectors that the U-Net gets.
        text_loss: (captions, token states) -> what is added to the loss, a scalar.
        further: modules that are trained beside the two, by name.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        rate: float,
        ema_decay: float,
        class_rate_factor: float = 1.0,
        timestep_power: float = TIMESTEP_POWER,
        complete: Callable[[Tensor, Tensor], Tensor] | None = None,
        text_loss: Callable[[list[str], Tensor], Tensor] | None = None,
        further: Mapping[str, torch.nn.Module] | None = None,
    ) -> None:
        self.text_encoder, self.unet = build_text_encoder(), unet
        self.tokenizer, self.scheduler = make_tokenizer(), build_scheduler()
        self.device = get_device()
        self.modules = torch.nn.ModuleDict(
            {"text": self.text_encoder, "unet": self.unet, **(further or {})}
        )
        # Convolutions on the CPU are faster with channels last, by a tenth of a step.
        self.modules.to(self.device, memory_format=torch.channels_last)
        matrices, others = split_parameters(self.modules)
        groups = [{"params": others}]
        if class_rate_factor != 1.0:
            of_class = set(unet.class_embedding.parameters())
            groups = [
                {"params": [p for p in others if p not in of_class]},
                {"params": [p for p in others if p in of_class], "factor": class_rate_factor},
            ]
        self.optimizers = (
            Muon(matrices, lr=rate, weight_decay=WEIGHT_DECAY),
            torch.optim.AdamW(
                groups, lr=rate, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY, fused=True
            ),
        )
        self.rate, self.ema_decay, self.timestep_power = rate, ema_decay, timestep_power
        self.complete, self.text_loss = complete, text_loss
        self.restart_average()
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
        loss, further_loss = self.losses(batch, seed)
        self.modules.zero_grad(set_to_none=True)
        (loss if further_loss is None else loss + further_loss).backward()
        self._share_gradients()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * scale * group.get("factor", 1.0)
            optimizer.step()
        self.step_count += 1
        self._average()
        return float(loss.detach())

    def losses(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor | None]:
        """The velocity loss at noise drawn from `seed`, and what else is added to it."""
        generator = torch.Generator().manual_seed(seed)
        joined = batch.group_size
        count = len(batch.latents)
        drawn = torch.rand((count // joined,), generator=generator) ** self.timestep_power
        timesteps = (drawn * 1000).long().clamp(0, 999).repeat_interleave(joined)
        noise = torch.randn(batch.latents.shape, generator=generator)
        timesteps, noise = timesteps.to(self.device), noise.to(self.device)
        latents = batch.latents.to(self.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        predicted, further_loss = self.predict(batch, noisy, timesteps)
        return functional.mse_loss(predicted, target), further_loss

    def predict(
        self, batch: Batch, noisy: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The velocity that the U-Net predicts, and what else is added to the loss."""
        if batch.attention == "joint":
            set_cross_view_attention(self.unet, batch.group_size)
        else:
            set_anchor_attention(self.unet, batch.attention).joint(batch.group_size)
        if batch.conditions is not None:
            noisy = torch.cat((noisy, batch.conditions.to(self.device)), dim=1)
        states, vectors = self.encode(batch.captions), batch.class_vectors
        if vectors is not None:
            vectors = vectors.to(self.device)
        if self.complete:
            vectors = self.complete(vectors, states)
        predicted = self.unet(noisy, timesteps, states, class_labels=vectors).sample
        return predicted, self.text_loss(batch.captions, states) if self.text_loss else None

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

    def restart_average(self) -> None:
        """Begin the running averages at the weights as they are, such as after they were loaded."""
        self.ema = {name: value.clone() for name, value in self.modules.state_dict().items()}

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.ema_decay, (1 + self.step_count) / (10 + self.step_count))
        ours, theirs = [], []
        for name, value in self.modules.state_dict().items():
            if value.is_floating_point():
                ours.append(self.ema[name])
                theirs.append(value)
        torch._foreach_lerp_(ours, theirs, 1 - decay)

    def load_asset(
        self,
        folder: Path,
        convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> None:
        """Take the weights of an exported model; optimizers and step start anew.

        Where this U-Net's class vector is longer than the exported one's, the further numbers
        begin without influence. `convert` makes this U-Net's weights of another kind of U-Net's.
        """
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        weights = CLIPTextModel.from_pretrained(folder / "text_encoder").float().state_dict()
        self.text_encoder.load_state_dict(weights)
        weights = UNet2DConditionModel.from_pretrained(folder / "unet").float().state_dict()
        self.load_unet(convert(weights) if convert else weights)

    def load_unet(self, weights: dict[str, Tensor]) -> None:
        """Take the weights of a U-Net whose class vector, if any, begins like this one's."""
        first, own = "class_embedding.linear_1.weight", self.unet.state_dict()
        if first in own:
            wider = torch.zeros_like(own[first])
            wider[:, : weights[first].shape[1]] = weights[first]
            weights = {**weights, first: wider}
        self.unet.load_state_dict(weights)
        self.restart_average()

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


def rate_scale(step: int, steps: int, warmup: float, decay: float) -> float:
    """Warm-up, constant, linear decay to zero."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / decay))


def committed_autoencoder(assets: Path = ASSETS) -> PatchAutoencoder:
    """The committed autoencoder, as if it had been made here: its config names no folder."""
    stored = PatchAutoencoder.from_pretrained(assets / "multiview" / "vae")
    vae = PatchAutoencoder(**{k: v for k, v in stored.config.items() if not k.startswith("_")})
    vae.load_state_dict(stored.state_dict())
    return vae


def save_atomically(payload: dict, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(payload, part)
    part.rename(path)


def export(
    trainer: Trainer,
    vae: PatchAutoencoder,
    name: str,
    facts: dict,
    recipe: dict,
    assets: Path = ASSETS,
    pipeline: str = "StableDiffusionPipeline",
) -> Path:
    """Write the averaged weights as an fp16 diffusers folder with its facts and manifest entry."""
    trainer.modules.load_state_dict(trainer.ema)
    folder = assets / name
    set_cross_view_attention(trainer.unet, 1)
    # Channels last are for training: safetensors holds contiguous tensors alone.
    trainer.unet.half().to(memory_format=torch.contiguous_format).save_pretrained(folder / "unet")
    trainer.text_encoder.half().save_pretrained(folder / "text_encoder")
    vae.save_pretrained(folder / "vae")
    trainer.tokenizer.save_pretrained(folder / "tokenizer")
    trainer.scheduler.save_pretrained(folder / "scheduler")
    (folder / f"{name}.json").write_text(json.dumps(facts) + "\n")
    index = {
        "_class_name": pipeline,
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["custom.fourd.diffusion.patch_autoencoder", "PatchAutoencoder"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    write_manifest_entry(name, recipe, assets)
    return folder


def argument_parser(description: str, name: str, steps: int, decay_steps: int):
    """The flags that every such training has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/assets"))
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--decay-steps", type=int, default=decay_steps)
    parser.add_argument("--groups", type=int, default=8, help="groups of 4 images in a batch")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default=name, help="of the checkpoint in --work")
    parser.add_argument("--from-asset", action="store_true", help="start from committed weights")
    parser.add_argument("--export", action="store_true", help="write the asset, do not train")
    return parser


def checkpoint_paths(args: argparse.Namespace) -> tuple[Path, Path]:
    """The newest checkpoint, and the newest one of the constant learning rate."""
    return args.work / f"{args.name}.pt", args.work / f"{args.name}_stable.pt"


def restore(trainer: Trainer, args: argparse.Namespace, begin: Callable[[Trainer], None]) -> None:
    """Continue where the work folder stands; a decay that was made for other steps is undone.

    `begin` is called where there is nothing to continue.
    """
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
    begin(trainer)


def train(
    trainer: Trainer, source: BatchSource, args: argparse.Namespace, rank: int, ranks: int
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


def start(
    argv: list[str] | None, description: str, name: str, steps: int, decay_steps: int
) -> argparse.Namespace:
    """Read the command line, join the other processes and seed torch's global generator."""
    args = argument_parser(description, name, steps, decay_steps).parse_args(argv)
    if place_among_processes()[1] > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(args.seed)
    return args


def place_among_processes() -> tuple[int, int]:
    """Rank and number of processes, as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def rendered(work: Path, kind: str, load: Callable[[Path], Part], script: str) -> list[Part]:
    """What `script` rendered into the work folder.

    Raises:
        SystemExit: there is nothing.
    """
    parts = [load(path) for path in sorted(work.glob(f"{kind}_*.pt"))]
    if not parts:
        raise SystemExit(f"no {kind}_*.pt in {work}; run custom.fourd.scripts.{script} first.")
    return parts


def train_or_export(
    trainer: Trainer,
    source: BatchSource,
    args: argparse.Namespace,
    begin: Callable[[Trainer], None],
    write: Callable[[dict], Path],
    script: str,
) -> int:
    """Continue the training, or hand `write` the recipe of what stands; return the exit status."""
    restore(trainer, args, begin)
    if args.export:
        print(write(recipe_of(trainer, args, script)))
    else:
        train(trainer, source, args, *place_among_processes())
    return 0


def recipe_of(trainer: Trainer, args: argparse.Namespace, script: str) -> dict:
    """What the manifest says of how an asset was made."""
    log = checkpoint_paths(args)[0].with_suffix(".log")
    return {
        "script": f"custom.fourd.scripts.{script}",
        "seed": args.seed,
        "steps": trainer.step_count,
        "batch": f"{args.groups} groups of 4 images",
        "rate": args.rate,
        "from_asset": args.from_asset,
        "loss": float(log.read_text().split()[-3]) if log.exists() else None,
    }
