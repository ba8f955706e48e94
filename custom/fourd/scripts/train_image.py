"""Train the embedded image model: U-Net, text encoder, IP-Adapter and vision encoder together.

Time and view words are taught on this model while it is frozen. It is therefore trained on pairs of
images of a scene: the image prompt shows one time and azimuth, and a throw-away teacher's codes in
the placeholders of the prompt say another (`image_control`). What the codes do not say stays as the
image prompt shows it. It starts from the committed video prior, which knows what motions, times and
cameras look like; what that is told by its class vector is first taught to the text pathway.

    python -m custom.fourd.scripts.render_pairs --work outputs/assets
    python -m custom.fourd.scripts.train_image --work outputs/assets --steps 6000
    python -m custom.fourd.scripts.train_image --work outputs/assets --steps 6000 --export

`--from-asset` starts from the committed image model instead, with a new teacher, which first finds
codes that this model hears. Kill it at any time; the same command resumes. A CUDA device is used
where there is one; on a CPU use one process with one thread per core, as for `train_multiview`.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import ModuleList, functional

from custom.fourd.diffusion.camera_vector import camera_and_time, with_words
from custom.fourd.diffusion.ip_adapter import clip_pixels, image_arguments, load_ip_adapter
from custom.fourd.diffusion.layer_contexts import LayerContexts, set_layer_contexts, unet_arguments
from custom.fourd.diffusion.patch_autoencoder import PatchAutoencoder
from custom.fourd.mappers.composition import SUPER_CATEGORIES, TIME, VIEW, Composition
from custom.fourd.mappers.text_injection import TextInjection
from custom.fourd.ops.camera import camera_from_orbit

from .adapter_weights import (
    adapter_weights,
    flat_names,
    fresh_adapter_weights,
    weights_without_adapter,
)
from .embedded_models import ASSETS, IMAGE_FACTS, build_image_unet, build_vision_encoder
from .embedded_training import (
    Trainer,
    committed_autoencoder,
    export,
    rate_scale,
    rendered,
    split_parameters,
    start,
    train_or_export,
)
from .image_batches import ImageBatch, PairSource
from .image_control import (
    MOST_NOISE,
    WARM_NOISE,
    ControlTeacher,
    harmonics,
    taught_contexts,
)
from .local_queries import look_at_squares
from .make_family import make_tokenizer
from .muon import Muon
from .text_channels import open_channels
from .world_clips import spinning_share
from .world_pairs import DISTANCE, ELEVATION_DEG, load_pair_groups
from .world_views import FOVY_RAD

TIMESTEP_POWER = 0.55
RESAMPLER_WIDTH = 80
WARM_STEPS, WARM_RATE, WARM_PROMPTS, WARM_FIRST = 900, 5e-3, 64, 10**9
"""Of the warm-up: steps, learning rate, prompts in a step, and its first batch."""
SIGHT_STEPS, SIGHT_RATE, SIGHT_GROUPS, SQUARES, POSE_SHARE = 700, 7e-3, 8, 4, 0.3
"""Of what vision encoder and resampler learn first; squares along an edge of the image; the weight
of azimuth and time."""
CODE_STEPS, CODE_RATE = 250, 1e-2
"""Of a new teacher that finds the codes which a trained model hears."""
TOKEN_GAIN = 4.0
"""Of the image tokens. A step of either optimizer moves weights by as much whatever comes in, so
larger tokens make keys and values learn as many times faster: without it the U-Net does without
its image prompt for thousands of steps."""
TURN_WEIGHT = 0.1
"""Of reading from the pooled text how objects are turned towards the camera. Of a spinning one that
is azimuth less time, a product of what two placeholders say: images alone do not teach it."""
NOTE = (
    "Started from the video prior. While it was trained, codes of time and azimuth stood in the "
    "placeholders of its prompts; what made them is not part of it."
)
FURTHER_NOTE = (
    "Trained on from the committed image model, with a new teacher that first found the codes "
    "which it heard. What made the codes is not part of it."
)
ADAPTER_FILE = Path("ip_adapter", "ip-adapter-plus.safetensors")


class ImageTrainer(Trainer):
    """Trains all parts of the image model, and the teacher of its placeholders."""

    def __init__(self, rate: float, ema_decay: float) -> None:
        vision, unet = build_vision_encoder(), build_image_unet()
        load_ip_adapter(
            unet, fresh_adapter_weights(unet, vision.config.hidden_size, RESAMPLER_WIDTH), 1.0
        )
        unet.requires_grad_(True)
        self.n_layers = len(set_layer_contexts(unet))
        self.vision, self.teacher = vision, ControlTeacher(unet.config.cross_attention_dim)
        self.most_noise = MOST_NOISE
        self.turn = torch.nn.Linear(unet.time_embedding.linear_2.out_features, 4)
        super().__init__(
            unet,
            rate,
            ema_decay,
            timestep_power=TIMESTEP_POWER,
            further={"vision": self.vision, "teacher": self.teacher, "turn": self.turn},
        )
        self.injection = TextInjection(self.text_encoder, self.tokenizer, SUPER_CATEGORIES)

    def contexts(self, batch: ImageBatch) -> LayerContexts:
        """Keys and values of a batch's prompts, with the teacher's codes where they are told.

        Codes are disturbed by up to `most_noise` times their length.
        """
        azimuths = torch.deg2rad(batch.azimuths_deg)
        codes = self.teacher(batch.frame_times.to(self.device), azimuths.to(self.device))
        prompts = [Composition().prompt(caption) for caption in batch.captions]
        drawn = (batch.generator, self.most_noise)
        return taught_contexts(self.injection, prompts, codes, batch.told, self.n_layers, *drawn)

    def image_prompt(self, batch: ImageBatch) -> dict:
        """Arguments of the U-Net for a batch's image prompts; a black image is none."""
        pixels = clip_pixels(batch.prompt_images, self.vision.config.image_size)
        pixels = (pixels * batch.sees_image.view(-1, 1, 1, 1)).to(self.device)
        states = self.vision(pixels, output_hidden_states=True).hidden_states[-2]
        return image_arguments(states)

    def predict(
        self, batch: ImageBatch, noisy: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The velocity that the U-Net predicts; the loss of a reading of the text is added."""
        contexts = self.contexts(batch)
        arguments = {**unet_arguments(contexts), **self.image_prompt(batch)}
        return self.unet(noisy, timesteps, **arguments).sample, self.turn_loss(batch, contexts)

    def turn_loss(self, batch: ImageBatch, contexts: LayerContexts) -> Tensor:
        """How far a linear reading of the pooled text misses the turn of what it is about.

        Of prompts that tell time and azimuth, and of which all objects spin or none.
        """
        shares = torch.tensor([spinning_share(caption) for caption in batch.captions])
        named = torch.tensor([caption != "" for caption in batch.captions])
        known = named & batch.told[TIME] & batch.told[VIEW] & ((shares == 0) | (shares == 1))
        turns = torch.deg2rad(batch.azimuths_deg) - 2 * math.pi * batch.frame_times * shares
        missed = self.turn(self.unet.add_embedding(contexts.pooled)) - harmonics(turns, (1, 2)).to(
            self.device
        )
        weights = known.to(missed).unsqueeze(-1)
        return TURN_WEIGHT * (weights * missed**2).sum() / weights.sum().clamp(min=1) / 2

    def load_image_asset(self, folder: Path) -> None:
        """Take the weights of an exported image model; teacher and reading are new."""
        from transformers import CLIPVisionModelWithProjection

        self.load_asset(folder, lambda plain: {**self.unet.state_dict(), **plain})
        states: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for key, value in load_file(folder / ADAPTER_FILE).items():
            part, _, name = key.partition(".")
            states[part][name] = value.float()
        load_ip_adapter(self.unet, states, 1.0)
        set_layer_contexts(self.unet)
        vision = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").float()
        self.vision.load_state_dict(vision.state_dict())
        self.restart_average()


class VideoKnowledge:
    """What the committed video prior makes of a caption, a time and a camera, frozen."""

    def __init__(self, folder: Path) -> None:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval()
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").float().eval()

    @torch.no_grad()
    def of(self, batch: ImageBatch, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token states of the captions, and embeddings of their words and of the class vector."""
        states = self.text_encoder(tokens).last_hidden_state
        count = len(tokens)
        poses = camera_from_orbit(torch.full((count,), ELEVATION_DEG), batch.azimuths_deg, DISTANCE)
        fovy = torch.full((count,), FOVY_RAD)
        vectors = with_words(camera_and_time(poses, fovy, batch.frame_times), states)
        return states, self.unet.add_embedding(states), self.unet.class_embedding(vectors)

    def image_weights(self, mean: Tensor) -> dict[str, Tensor]:
        """Weights of a U-Net without a class vector; the mean of what it made of it remains."""
        weights = {
            key: value
            for key, value in self.unet.state_dict().items()
            if not key.startswith("class_embedding.")
        }
        bias = "time_embedding.linear_2.bias"
        return {**weights, bias: weights[bias] + mean}


def warm_up(trainer: ImageTrainer, source: PairSource, folder: Path, steps: int) -> None:
    """Begin as the video prior, with its class vector's part taught to the text pathway.

    A way from the placeholders to the U-Net is opened; then text encoder, pooling and teacher learn
    to make of a prompt with codes what the video prior makes of its class vector, and `turn_loss`
    asks for the turn of what spins. No image is seen, and words keep the states that they had.
    """
    known, trainer.most_noise = VideoKnowledge(folder), WARM_NOISE
    trainer.load_asset(folder, lambda _: {**trainer.unet.state_dict(), **known.image_weights(0)})
    plain = trainer.tokenizer(
        source.words(WARM_FIRST - 1, WARM_PROMPTS).captions,
        padding="max_length",
        return_tensors="pt",
    )
    open_channels(
        trainer.injection,
        trainer.unet,
        lambda: trainer.contexts(source.words(WARM_FIRST - 2, WARM_PROMPTS)),
        plain.input_ids,
        torch.Generator().manual_seed(0),
    )
    shift = len(SUPER_CATEGORIES) + 1
    parts = ModuleList(
        (trainer.text_encoder, trainer.unet.add_embedding, trainer.teacher, trainer.turn)
    )
    optimizers = _optimizers(parts, WARM_RATE)
    mean = torch.zeros(())
    for step in range(steps):
        batch = source.words(WARM_FIRST + step, WARM_PROMPTS)
        tokens = trainer.tokenizer(batch.captions, padding="max_length", return_tensors="pt")
        knowledge = known.of(batch, tokens.input_ids)
        states, pooled, of_class = (part.to(trainer.device) for part in knowledge)
        if step == 0:
            mean = of_class.mean(dim=0)
        contexts = trainer.contexts(batch)
        ours = trainer.unet.add_embedding(contexts.pooled)
        wanted = pooled + of_class - mean
        missed = functional.mse_loss(ours, wanted) / wanted.var(dim=0).mean()
        words = contexts.keys[0][:, shift + 1 :]
        turn = trainer.turn_loss(batch, contexts) / TURN_WEIGHT
        loss = missed + functional.mse_loss(words, states[:, 1:-shift]) + turn
        _update(parts, optimizers, loss, WARM_RATE * rate_scale(step, steps, 20, 0.3 * steps))
        if step % 50 == 49:
            line = f"warm-up {step + 1}: {float(missed.detach()):.3f} is missed"
            print(f"{line}, {float(turn.detach()):.3f} of the turn", flush=True)
    bias = trainer.unet.time_embedding.linear_2.bias
    bias.data.add_(mean)
    trainer.most_noise = MOST_NOISE
    trainer.restart_average()


def teach_sight(
    trainer: ImageTrainer, source: PairSource, vae: PatchAutoencoder, steps: int
) -> None:
    """Teach vision encoder and resampler what is in an image, before the U-Net looks at it.

    A linear reading of token k gives the k-th of 16 squares of the image's latents, and one of all
    tokens the harmonics of azimuth and time. Both readings are thrown away.
    """
    (resampler,) = trainer.unet.encoder_hid_proj.image_projection_layers
    look_at_squares(trainer.vision, resampler)
    first = source.batch(WARM_FIRST, 1).latents
    side = first.shape[-1] // SQUARES
    width, tokens = resampler.norm_out.normalized_shape[0], resampler.latents.shape[1]
    squares = torch.nn.Linear(width, first.shape[1] * side * side)
    pose = torch.nn.Linear(width * tokens, 8)
    reading = ModuleList((squares, pose)).to(trainer.device)
    parts = torch.nn.ModuleDict(
        {"vision": trainer.vision, "resampler": resampler, "reading": reading}
    )
    optimizers = _optimizers(parts, SIGHT_RATE)
    for step in range(steps):
        batch = source.batch(WARM_FIRST + step, SIGHT_GROUPS)
        with torch.no_grad():
            images = vae.decode(batch.latents).sample.permute(0, 2, 3, 1)
        batch.prompt_images = ((images + 1) / 2).clamp(0, 1)
        batch.sees_image[:] = True
        (states,) = trainer.image_prompt(batch)["added_cond_kwargs"]["image_embeds"]
        seen = resampler(states[:, 0])
        wanted = batch.latents.unfold(2, side, side).unfold(3, side, side)
        wanted = wanted.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2).to(trainer.device)
        angles = (torch.deg2rad(batch.azimuths_deg), 2 * math.pi * batch.frame_times)
        said = torch.cat([harmonics(angle, (1, 2)) for angle in angles], dim=1).to(trainer.device)
        missed = functional.mse_loss(squares(seen), wanted) / wanted.var(dim=0).mean()
        other = functional.mse_loss(pose(seen.flatten(1)), said) / 0.5
        rate = SIGHT_RATE * rate_scale(step, steps, 30, 0.3 * steps)
        _update(parts, optimizers, missed + POSE_SHARE * other, rate)
        if step % 50 == 49:
            line = f"sight {step + 1}: {float(missed.detach()):.3f} of the image is missed"
            print(f"{line}, {float(other.detach()):.3f} of azimuth and time", flush=True)
    with torch.no_grad():
        resampler.norm_out.weight.mul_(TOKEN_GAIN)
        resampler.norm_out.bias.mul_(TOKEN_GAIN)
    trainer.restart_average()


def find_codes(trainer: ImageTrainer, source: PairSource, steps: int) -> None:
    """Let a new teacher learn alone, from the model that stays as it is, which codes it hears.

    A teacher that says nothing the model knows would teach it not to listen.
    """
    parts = ModuleList((trainer.teacher, trainer.turn))
    learn = {id(parameter) for parameter in parts.parameters()}
    others = [p for p in trainer.modules.parameters() if p.requires_grad and id(p) not in learn]
    for parameter in others:
        parameter.requires_grad_(False)
    trainer.most_noise = WARM_NOISE
    optimizer = torch.optim.AdamW(parts.parameters(), lr=CODE_RATE, betas=(0.9, 0.99))
    sums = [0.0, 0.0]
    for step in range(steps):
        batch = source.batch(WARM_FIRST + step, SIGHT_GROUPS)
        loss, turn = trainer.losses(batch, WARM_FIRST + step)
        rate = CODE_RATE * rate_scale(step, steps, 10, 0.3 * steps)
        _update(parts, (optimizer,), loss + turn, rate)
        sums = [sums[0] + float(loss.detach()), sums[1] + float(turn.detach())]
        if step % 50 == 49:
            print(f"codes {step + 1}: loss {sums[0] / 50:.4f}, turn {sums[1] / 50:.4f}", flush=True)
            sums = [0.0, 0.0]
    for parameter in others:
        parameter.requires_grad_(True)
    trainer.most_noise = MOST_NOISE
    trainer.restart_average()


def _optimizers(parts: torch.nn.Module, rate: float) -> tuple[torch.optim.Optimizer, ...]:
    matrices, others = split_parameters(parts)
    return Muon(matrices, lr=rate), torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99))


def _update(
    parts: torch.nn.Module,
    optimizers: tuple[torch.optim.Optimizer, ...],
    loss: Tensor,
    rate: float,
) -> None:
    """One step of the parts, whose other gradients, if any, stay unused."""
    parts.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


def export_image(
    trainer: ImageTrainer, vae: PatchAutoencoder, recipe: dict, assets: Path = ASSETS
) -> Path:
    """Write the averaged weights: a diffusers folder, with image_encoder/ and ip_adapter/."""
    trainer.modules.load_state_dict(trainer.ema)
    folder = assets / "image"
    weights = flat_names(adapter_weights(trainer.unet))
    (folder / ADAPTER_FILE).parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half() for key, value in weights.items()}, folder / ADAPTER_FILE)
    trainer.vision.half().save_pretrained(folder / "image_encoder")
    plain = build_image_unet()
    plain.load_state_dict(weights_without_adapter(trainer.unet))
    # A tokenizer's file also holds how it was last called.
    trainer.tokenizer = make_tokenizer()
    carrying, trainer.unet = trainer.unet, plain
    try:
        return export(trainer, vae, "image", IMAGE_FACTS, recipe, assets)
    finally:
        trainer.unet = carrying


def main(argv: list[str] | None = None) -> int:
    args = start(argv, __doc__, "image", steps=6000, decay_steps=1500)
    groups = rendered(args.work, "pairs", load_pair_groups, "render_pairs")
    vae = committed_autoencoder()
    source = PairSource(groups, vae, args.seed)
    trainer = ImageTrainer(args.rate, args.ema)

    def begin(fresh: Trainer) -> None:
        if args.from_asset:
            trainer.load_image_asset(ASSETS / "image")
            find_codes(trainer, source, CODE_STEPS)
        else:
            warm_up(trainer, source, ASSETS / "video", WARM_STEPS)
            teach_sight(trainer, source, vae, SIGHT_STEPS)

    def write(recipe: dict) -> Path:
        note = FURTHER_NOTE if args.from_asset else NOTE
        return export_image(trainer, vae, {**recipe, "note": note})

    return train_or_export(trainer, source, args, begin, write, "train_image")


if __name__ == "__main__":
    sys.exit(main())
