"""Training of the image model: how it begins, what a step trains, what the export is."""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection

from custom.fourd.data.frame_encoders import VisionEncoder
from custom.fourd.diffusion.camera_vector import VIDEO_VECTOR_SIZE
from custom.fourd.diffusion.image_prior import load_image_prior
from custom.fourd.diffusion.ip_adapter import image_arguments, ip_adapter_kind, load_ip_adapter
from custom.fourd.diffusion.layer_contexts import set_layer_contexts, unet_arguments
from custom.fourd.mappers.composition import TIME, VIEW
from custom.fourd.scripts import embedded_training, train_image
from custom.fourd.scripts.embedded_models import IMAGE_FACTS, build_video_unet
from custom.fourd.scripts.embedded_training import Trainer, committed_autoencoder
from custom.fourd.scripts.image_batches import PairSource
from custom.fourd.scripts.image_control import MOST_NOISE, WARM_NOISE
from custom.fourd.scripts.make_family import ASSETS
from custom.fourd.scripts.render_pairs import main as render_main
from custom.fourd.scripts.train_image import (
    ADAPTER_FILE,
    TURN_WEIGHT,
    ImageTrainer,
    VideoKnowledge,
    export_image,
    find_codes,
    main,
    teach_sight,
    warm_up,
)
from custom.fourd.scripts.world_pairs import render_pair_groups


@pytest.fixture(scope="module")
def vae():
    return committed_autoencoder()


@pytest.fixture(scope="module")
def source(vae):
    g = torch.Generator().manual_seed(0)
    return PairSource([render_pair_groups(3, n, g, size_px=16) for n in (1, 2)], vae, seed=4)


@pytest.fixture
def trainer():
    torch.manual_seed(0)
    return ImageTrainer(1e-3, 0.99)


@pytest.fixture
def knowledge():
    if not (ASSETS / "video").is_dir():
        pytest.skip("custom/fourd/assets/video is absent; see custom/fourd/scripts to make it")
    return VideoKnowledge(ASSETS / "video")


def test_it_begins_as_the_video_prior_at_its_mean_class(trainer, knowledge):
    """With a class embedding that is a constant, the U-Net without one says the same."""
    old = build_video_unet().eval()
    old.load_state_dict(knowledge.unet.state_dict())
    constant = torch.linspace(-1, 1, 256)
    for name, parameter in old.class_embedding.named_parameters():
        parameter.data.zero_()
        if name == "linear_2.bias":
            parameter.data.copy_(constant)
    plain = {**trainer.unet.state_dict(), **knowledge.image_weights(constant)}
    trainer.unet.load_state_dict(plain)
    trainer.unet.eval()
    g = torch.Generator().manual_seed(0)
    noisy, text = torch.randn(2, 16, 4, 4, generator=g), torch.randn(2, 77, 128, generator=g)
    states = torch.randn(2, 65, 96, generator=g)
    with torch.no_grad():
        expected = old(noisy, 500, text, class_labels=torch.zeros(2, VIDEO_VECTOR_SIZE)).sample
        got = trainer.unet(noisy, 500, text, **image_arguments(states)).sample
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_sight_is_taught_to_the_vision_side_alone(trainer, source, vae, capsys):
    before = {name: value.clone() for name, value in trainer.modules.state_dict().items()}
    teach_sight(trainer, source, vae, 50)
    assert float(capsys.readouterr().out.split()[2]) < 0.95  # 1: no more than the mean
    for name, value in trainer.modules.state_dict().items():
        if not name.startswith(("vision.", "unet.encoder_hid_proj.")):
            assert torch.equal(value, before[name])
        assert torch.equal(value, trainer.ema[name])


def test_a_new_teacher_learns_alone(trainer, source, monkeypatch):
    """Of the model nothing moves, and what it would learn by is left as it was."""
    trainer.modules["text"].requires_grad_(False)
    before = {name: value.clone() for name, value in trainer.modules.state_dict().items()}
    noises, losses = [], trainer.losses
    monkeypatch.setattr(
        trainer, "losses", lambda *given: noises.append(trainer.most_noise) or losses(*given)
    )
    find_codes(trainer, source, 2)
    assert noises == [WARM_NOISE] * 2 and trainer.most_noise == MOST_NOISE
    for name, value in trainer.modules.state_dict().items():
        assert torch.equal(value, before[name]) is not name.startswith(("teacher.", "turn.")), name
        assert torch.equal(value, trainer.ema[name]), name
    for name, parameter in trainer.modules.named_parameters():
        assert parameter.requires_grad is not name.startswith("text."), name


def test_the_warm_up_teaches_the_text_what_the_class_vector_said(trainer, source, knowledge):
    batch = source.batch(5, 8)
    tokens = trainer.tokenizer(batch.captions, padding="max_length", return_tensors="pt").input_ids
    _, pooled, of_class = knowledge.of(batch, tokens)
    wanted = pooled + of_class

    def miss():
        batch = source.batch(5, 8)
        trainer.most_noise = WARM_NOISE
        with torch.no_grad():
            ours = trainer.unet.add_embedding(trainer.contexts(batch).pooled)
            constant = trainer.unet.time_embedding.linear_2.bias
            old = knowledge.unet.time_embedding.linear_2.bias
            return float((ours + constant - old - wanted).square().mean() / wanted.var())

    warm_up(trainer, source, ASSETS / "video", 1)
    before = miss()
    warm_up(trainer, source, ASSETS / "video", 12)
    assert trainer.most_noise == MOST_NOISE
    assert miss() < 0.98 * before
    for name, value in trainer.modules.state_dict().items():
        assert torch.equal(trainer.ema[name], value), name


def test_the_turn_of_what_spins_is_azimuth_less_time(trainer, source):
    """A reading that says the same of all: what it misses is known, of those that count."""
    batch = source.words(0, 6)
    batch.captions = [
        "a red cube spinning",
        "a red cube bouncing",
        "a red cube spinning next to a blue cone spinning",
        "a red cube spinning next to a blue cone bouncing",  # has no one turn
        "",
        "a red cube spinning",  # is not told its time
    ]
    batch.azimuths_deg = torch.tensor([90.0, 90.0, 200.0, 30.0, 30.0, 30.0])
    batch.frame_times = torch.tensor([0.25, 0.25, 0.75, 0.5, 0.5, 0.5])
    batch.told = {TIME: torch.tensor([True] * 5 + [False]), VIEW: torch.ones(6, dtype=torch.bool)}
    said = torch.tensor([0.5, 0.25, -0.5, 0.125])
    trainer.turn.weight.data.zero_()
    trainer.turn.bias.data.copy_(said)
    missed = 0.0
    for degrees in (0.0, 90.0, 200.0 - 270.0):
        angle = math.radians(degrees)
        true = torch.tensor([f(k * angle) for k in (1, 2) for f in (math.cos, math.sin)])
        missed += float(((said - true) ** 2).sum()) / 2 / 3
    loss = trainer.turn_loss(batch, trainer.contexts(batch))
    assert float(loss.detach()) == pytest.approx(TURN_WEIGHT * missed, rel=1e-5)


def test_a_step_trains_every_part(trainer, source):
    before = {name: value.clone() for name, value in trainer.modules.named_parameters()}
    losses = [trainer.train_step(source.batch(step, 2), 1.0, step) for step in range(3)]
    assert all(0 < loss < 5 for loss in losses)
    moved = {
        name for name, value in trainer.modules.named_parameters()
        if not torch.equal(value, before[name])
    }  # fmt: skip
    # The adapter reads the states before the vision encoder's last layer, and diffusers' zero
    # initial values hold the resampler back for one step.
    unused = ("layers.2.", "post_layernorm", "visual_projection")
    still = {name for name in before if name not in moved}
    assert all(name.startswith("vision.") and any(u in name for u in unused) for name in still)
    assert any("to_v_ip" in name for name in moved) and any("latents" in name for name in moved)


def test_images_that_are_not_seen_leave_no_trace(trainer, source):
    batch = source.batch(1, 2)
    batch.sees_image = torch.tensor([True, False] * 4)
    kept = trainer.image_prompt(batch)["added_cond_kwargs"]["image_embeds"][0].detach()
    batch.prompt_images = batch.prompt_images.flip(1) * 0.5
    other = trainer.image_prompt(batch)["added_cond_kwargs"]["image_embeds"][0].detach()
    assert torch.equal(kept[1::2], other[1::2]) and kept.shape == (8, 1, 65, 96)
    assert (kept[::2] - other[::2]).abs().amax((1, 2, 3)).min() > 1e-3


def test_the_ordinary_loaders_read_the_export(trainer, source, vae, tmp_path):
    for parameter in trainer.unet.parameters():
        if parameter.ndim == 2:
            parameter.data.add_(0.02)
    trainer.restart_average()
    folder = export_image(trainer, vae, {"seed": 0, "steps": 0, "loss": None}, tmp_path)
    assert json.loads((folder / "image.json").read_text()) == IMAGE_FACTS
    dtypes = {value.dtype for value in load_file(folder / ADAPTER_FILE).values()}
    assert dtypes == {torch.float16}

    prior = load_image_prior(str(folder))
    adapter = folder / ADAPTER_FILE
    load_ip_adapter(prior.unet, str(adapter.parent), 1.0, weight_name=adapter.name)
    assert ip_adapter_kind(prior.unet) == "plus"
    assert len(set_layer_contexts(prior.unet)) == trainer.n_layers
    batch = source.batch(2, 1)
    batch.sees_image[:] = True
    rgb = batch.prompt_images
    features = VisionEncoder(str(folder)).encode(rgb)
    trainer.modules.float().eval()
    noisy = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    batch.generator = None
    with torch.no_grad():
        contexts = trainer.contexts(batch)
        expected, _ = trainer.predict(batch, noisy, torch.tensor([500]))
        got = prior.unet(noisy, 500, **unet_arguments(contexts), **image_arguments(features)).sample
    # Both have weights of half precision.
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)

    again = ImageTrainer(1e-3, 0.99)
    again.load_image_asset(folder)
    for name, value in trainer.modules.state_dict().items():
        if not name.startswith(("teacher.", "turn.")):
            loaded = value.half().float()
            assert torch.equal(again.modules.state_dict()[name].float(), loaded), name
            assert torch.equal(again.ema[name].float(), loaded), name
    vision = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    assert vision.config.image_size == 64


@pytest.mark.slow
def test_a_run_that_is_cut_ends_where_a_whole_one_does(tmp_path, monkeypatch, knowledge):
    monkeypatch.setattr(train_image, "WARM_STEPS", 1)
    monkeypatch.setattr(train_image, "SIGHT_STEPS", 1)
    work = ["--work", str(tmp_path)]
    assert render_main([*work, "--single", "1", "--pair", "1"]) == 0
    flags = [*work, "--groups", "1", "--warmup-steps", "1", "--decay-steps", "1", "--steps", "3"]
    assert main([*flags, "--name", "whole"]) == 0
    # Every look at the clock is minutes after the last, so that every step is saved.
    clock = itertools.count(0, 200)
    monkeypatch.setattr(embedded_training.time, "monotonic", lambda: next(clock))
    step = Trainer.train_step

    def cut(self, batch, scale, seed):
        if self.step_count == 2:
            raise KeyboardInterrupt
        return step(self, batch, scale, seed)

    monkeypatch.setattr(Trainer, "train_step", cut)
    with pytest.raises(KeyboardInterrupt):
        main([*flags, "--name", "cut"])
    monkeypatch.setattr(Trainer, "train_step", step)
    assert main([*flags, "--name", "cut"]) == 0
    whole, cut_one = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("whole", "cut"))
    assert whole["step"] == cut_one["step"] == 3
    for name, value in whole["model"].items():
        assert torch.equal(value, cut_one["model"][name]), name


def test_the_command_needs_pairs(tmp_path):
    with pytest.raises(SystemExit, match="run custom.fourd.scripts.render_pairs first"):
        main(["--work", str(tmp_path)])
