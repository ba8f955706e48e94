"""Training of the embedded prior, on a handful of tiny views."""

import json

import pytest
import torch

from custom.fourd.diffusion.cross_view_attention import cross_view_attention_size
from custom.fourd.scripts import embedded_models
from custom.fourd.scripts.make_family import ASSETS
from custom.fourd.scripts.train_multiview import (
    Trainer,
    ViewSource,
    export,
    family_autoencoder,
    fit_autoencoder,
    main,
    rate_scale,
)
from custom.fourd.scripts.world_views import render_groups
from custom.fourd.world.grammar import parse_caption

SIZE = 16


@pytest.fixture(scope="module")
def groups():
    g = torch.Generator().manual_seed(0)
    return [render_groups(3, count, g, size_px=SIZE) for count in (1, 2)]


@pytest.fixture(scope="module")
def vae(groups):
    return fit_autoencoder(groups)


@pytest.fixture(scope="module")
def source(groups, vae):
    return ViewSource(groups, vae, seed=4)


def fresh():
    torch.manual_seed(0)
    return Trainer(rate=1e-3, ema_decay=0.99)


def batches_of(source, kind, count=1):
    found = (source.batch(step, 2) for step in range(200))
    chosen = {
        "views": lambda b: b.num_views == 4,
        "lone": lambda b: b.num_views == 1 and b.cameras is not None,
        "single": lambda b: b.cameras is None,
    }[kind]
    return [batch for batch, _ in zip((b for b in found if chosen(b)), range(count))]


# Batches


def test_a_batch_is_a_function_of_seed_and_step(source, groups, vae):
    first, again, other = source.batch(7, 2), source.batch(7, 2), source.batch(8, 2)
    assert torch.equal(first.latents, again.latents) and first.captions == again.captions
    assert first.latents.shape != other.latents.shape or not torch.equal(
        first.latents, other.latents
    )
    reseeded = ViewSource(groups, vae, seed=5).batch(7, 2)
    assert not torch.equal(first.latents, reseeded.latents)


@pytest.mark.parametrize(
    ("kind", "cameras", "num_views"), [("views", 32, 4), ("lone", 32, 1), ("single", None, 1)]
)
def test_the_kinds_of_batches(source, kind, cameras, num_views):
    (batch,) = batches_of(source, kind)
    assert batch.latents.shape == (8, 16, SIZE // 4, SIZE // 4) and batch.num_views == num_views
    assert len(batch.captions) == 8
    assert (None if batch.cameras is None else batch.cameras.shape) == (
        None if cameras is None else (8, 32)
    )
    for caption in filter(None, batch.captions):
        scene = parse_caption(caption)
        assert not scene.is_held_out and not scene.has_held_out_motion
        assert kind != "single" or caption.endswith(" view"), "words must name the view"


def test_objects_and_pairs_take_turns(source):
    for batch in batches_of(source, "lone", 3):
        counts = [len(parse_caption(c).objects) if c else None for c in batch.captions]
        assert all(count in (None, 1 + number % 2) for number, count in enumerate(counts))


def test_the_shares_of_the_kinds():
    """0.08 single, 0.42 lone, the rest whole groups: first draw of the step's own generator."""
    draws = torch.tensor([
        float(torch.rand((), generator=torch.Generator().manual_seed(4 * 1_000_003 + step)))
        for step in range(2000)
    ])  # fmt: skip
    # Five standard deviations of 2000 draws: 0.03 and 0.056.
    assert float((draws < 0.08).float().mean()) == pytest.approx(0.08, abs=0.03)
    assert float((draws < 0.50).float().mean()) == pytest.approx(0.50, abs=0.056)


# Steps


def test_the_rate_warms_up_stays_and_falls():
    assert [rate_scale(s, 100, 10, 20) for s in (0, 4, 9, 50, 80, 90, 99, 100)] == pytest.approx(
        [0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.05, 0.0]
    )
    assert rate_scale(50, 100, 10, 20) == rate_scale(50, 1000, 10, 20), "runs can be lengthened"


def test_a_resumed_training_is_the_same_training(source, tmp_path):
    batches = [batches_of(source, kind)[0] for kind in ("views", "single", "lone")]
    whole = fresh()
    losses = [whole.train_step(batch, 1.0, seed) for seed, batch in enumerate(batches)]
    assert all(0.3 < loss < 3 for loss in losses), "about the variance of velocity at the start"
    cut = fresh()
    assert cut.train_step(batches[0], 1.0, 0) == losses[0]
    torch.save(cut.state(), tmp_path / "state.pt")
    torch.manual_seed(99)
    resumed = Trainer(rate=1e-3, ema_decay=0.99)
    resumed.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.step_count == 1
    for seed in (1, 2):
        assert resumed.train_step(batches[seed], 1.0, seed) == losses[seed]
    for name, value in whole.modules.state_dict().items():
        assert torch.equal(value, resumed.modules.state_dict()[name]), name
    for name, value in whole.ema.items():
        assert torch.equal(value, resumed.ema[name]), name


def test_the_running_average_by_formula(source):
    trainer = fresh()
    start = {name: value.clone() for name, value in trainer.ema.items()}
    trainer.train_step(batches_of(source, "lone")[0], 1.0, 0)
    decay = min(0.99, 2 / 11)
    for name, value in trainer.modules.state_dict().items():
        if value.is_floating_point():
            expected = decay * start[name] + (1 - decay) * value
            torch.testing.assert_close(trainer.ema[name], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_one_batch_can_be_learnt(source):
    """The loss on one fixed batch, noise and time falls: gradients point the right way."""
    trainer, batch = fresh(), batches_of(source, "views")[0]
    losses = [trainer.train_step(batch, 1.0, 0) for _ in range(6)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_scale_of_zero_moves_nothing(source):
    trainer = fresh()
    before = {name: value.clone() for name, value in trainer.modules.state_dict().items()}
    trainer.train_step(batches_of(source, "single")[0], 0.0, 0)
    for name, value in trainer.modules.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_captions_are_encoded_each_for_itself(source):
    trainer = fresh()
    with torch.no_grad():
        states = trainer.encode(["a red cube", "", "a red cube", "a blue cube"])
        alone = trainer.encode(["a blue cube"])
    assert torch.equal(states[0], states[2]) and not torch.equal(states[0], states[3])
    torch.testing.assert_close(states[3:], alone, atol=1e-5, rtol=1e-4)


# Files


def test_the_export_is_a_diffusers_folder_of_averaged_weights(vae, tmp_path):
    from diffusers import UNet2DConditionModel

    from custom.fourd.diffusion.patch_autoencoder import PatchAutoencoder

    trainer = fresh()
    trainer.ema["unet.conv_in.bias"] += 1.0
    expected = trainer.ema["unet.conv_in.bias"].clone()
    folder = export(trainer, vae, {"seed": 0, "steps": 0, "loss": None}, tmp_path)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    torch.testing.assert_close(unet.conv_in.bias.detach(), expected, atol=1e-3, rtol=1e-3)
    assert cross_view_attention_size(unet) == 1
    loaded = PatchAutoencoder.from_pretrained(folder / "vae")
    assert torch.equal(loaded.encoder.weight, vae.encoder.weight)
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads((tmp_path / "MANIFEST.json").read_text())["multiview"]
    assert manifest["files"].keys() == written
    assert manifest["family"] == embedded_models.load_family()["hash"]
    if (ASSETS / "multiview").is_dir():
        files = (path for path in (ASSETS / "multiview").rglob("*") if path.is_file())
        assert written == {path.relative_to(ASSETS / "multiview").as_posix() for path in files}


def test_the_command_needs_views(tmp_path, capsys):
    assert main(["--work", str(tmp_path)]) == 1
    assert "run custom.fourd.scripts.render_views first" in capsys.readouterr().out


# What is committed


def test_training_can_start_from_the_committed_weights():
    trainer = fresh()
    before = trainer.unet.conv_in.weight.clone()
    trainer.load_asset(ASSETS / "multiview")
    assert not torch.equal(trainer.unet.conv_in.weight, before)
    assert torch.equal(trainer.ema["unet.conv_in.weight"], trainer.unet.conv_in.weight)
    half = trainer.unet.conv_in.weight.half().float()
    assert torch.equal(trainer.unet.conv_in.weight, half), "the asset is stored in half precision"
    assert trainer.step_count == 0


def test_the_committed_autoencoder_defines_latents_whatever_the_data(groups, tmp_path):
    committed = family_autoencoder(groups)
    fitted = family_autoencoder(groups, assets=tmp_path)
    again = family_autoencoder(groups[:1])
    assert torch.equal(committed.encoder.weight, again.encoder.weight)
    assert not torch.allclose(committed.encoder.weight, fitted.encoder.weight)
