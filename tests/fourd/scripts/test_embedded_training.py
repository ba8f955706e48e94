"""Training of the embedded models, on a handful of tiny views."""

import json

import pytest
import torch

from custom.fourd.diffusion.camera_vector import VIDEO_VECTOR_SIZE
from custom.fourd.diffusion.cross_view_attention import cross_view_attention_size
from custom.fourd.scripts import embedded_models
from custom.fourd.scripts.embedded_models import build_multiview_unet, build_video_unet
from custom.fourd.scripts.embedded_training import (
    Trainer,
    argument_parser,
    committed_autoencoder,
    export,
    rate_scale,
    recipe_of,
    restore,
    train,
)
from custom.fourd.scripts.make_family import ASSETS
from custom.fourd.scripts.train_multiview import ViewSource, fit_autoencoder
from custom.fourd.scripts.world_views import render_groups


@pytest.fixture(scope="module")
def groups():
    g = torch.Generator().manual_seed(0)
    return [render_groups(3, count, g, size_px=16) for count in (1, 2)]


@pytest.fixture(scope="module")
def vae(groups):
    return fit_autoencoder(groups)


@pytest.fixture(scope="module")
def source(groups, vae):
    return ViewSource(groups, vae, seed=4)


def fresh(seed=0):
    torch.manual_seed(seed)
    return Trainer(build_multiview_unet(), rate=1e-3, ema_decay=0.99)


def batch_joining(source, views):
    return next(b for b in (source.batch(n, 2) for n in range(99)) if b.group_size == views)


# Steps


def test_the_rate_warms_up_stays_and_falls():
    assert [rate_scale(s, 100, 10, 20) for s in (0, 4, 9, 50, 80, 90, 99, 100)] == pytest.approx(
        [0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.05, 0.0]
    )
    assert rate_scale(50, 100, 10, 20) == rate_scale(50, 1000, 10, 20), "runs can be lengthened"


def test_a_resumed_training_is_the_same_training(source, tmp_path):
    batches = [batch_joining(source, views) for views in (4, 1, 4)]
    whole = fresh()
    losses = [whole.train_step(batch, 1.0, seed) for seed, batch in enumerate(batches)]
    assert all(0.3 < loss < 3 for loss in losses), "about the variance of velocity at the start"
    cut = fresh()
    assert cut.train_step(batches[0], 1.0, 0) == losses[0]
    torch.save(cut.state(), tmp_path / "state.pt")
    torch.manual_seed(99)
    resumed = Trainer(build_multiview_unet(), rate=1e-3, ema_decay=0.99)
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
    trainer.train_step(batch_joining(source, 1), 1.0, 0)
    decay = min(0.99, 2 / 11)
    for name, value in trainer.modules.state_dict().items():
        if value.is_floating_point():
            expected = decay * start[name] + (1 - decay) * value
            torch.testing.assert_close(trainer.ema[name], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_one_batch_can_be_learnt(source):
    """The loss on one fixed batch, noise and time falls: gradients point the right way."""
    trainer, batch = fresh(), batch_joining(source, 4)
    losses = [trainer.train_step(batch, 1.0, 0) for _ in range(6)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_scale_of_zero_moves_nothing(source):
    trainer = fresh()
    before = {name: value.clone() for name, value in trainer.modules.state_dict().items()}
    trainer.train_step(batch_joining(source, 1), 0.0, 0)
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
    folder = export(
        trainer, vae, "multiview", {"a": 1}, {"seed": 0, "steps": 0, "loss": None}, tmp_path
    )
    assert json.loads((folder / "multiview.json").read_text()) == {"a": 1}
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


def test_the_exported_autoencoder_names_no_folder(tmp_path):
    """diffusers writes where a model was loaded from; that is nobody's business."""
    vae = committed_autoencoder()
    vae.save_pretrained(tmp_path)
    assert "_name_or_path" not in json.loads((tmp_path / "config.json").read_text())
    assert "_name_or_path" not in (ASSETS / "multiview" / "vae" / "config.json").read_text()


def test_training_can_start_from_the_committed_weights():
    trainer = fresh()
    before = trainer.unet.conv_in.weight.clone()
    trainer.load_asset(ASSETS / "multiview")
    assert not torch.equal(trainer.unet.conv_in.weight, before)
    assert torch.equal(trainer.ema["unet.conv_in.weight"], trainer.unet.conv_in.weight)
    half = trainer.unet.conv_in.weight.half().float()
    assert torch.equal(trainer.unet.conv_in.weight, half), "the asset is stored in half precision"
    assert trainer.step_count == 0


def test_a_wider_class_vector_begins_without_influence():
    torch.manual_seed(0)
    trainer = Trainer(build_video_unet(), rate=1e-3, ema_decay=0.99)
    trainer.load_asset(ASSETS / "multiview")
    narrow = fresh()
    narrow.load_asset(ASSETS / "multiview")
    g = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 16, 4, 4, generator=g), torch.randn(2, 77, 128, generator=g)
    camera = torch.randn(2, 32, generator=g)
    time = torch.randn(2, VIDEO_VECTOR_SIZE - 32, generator=g)
    with torch.no_grad():
        expected = narrow.unet(latents, 500, text, class_labels=camera).sample
        wide = trainer.unet(latents, 500, text, class_labels=torch.cat((camera, time), 1)).sample
    torch.testing.assert_close(wide, expected, atol=1e-5, rtol=1e-4)


def test_a_loss_of_the_text_reaches_the_text_encoder_and_is_not_reported(source):
    """It moves the text encoder's gradient by its own; what is reported stays the velocity's."""
    captions = []

    def text_loss(words, states):
        captions.extend(words)
        return states.square().sum()

    batch = source.batch(0, 1)
    gradients, losses = [], []
    for extra in (None, text_loss):
        torch.manual_seed(0)
        trainer = Trainer(build_multiview_unet(), 0.0, 0.99, text_loss=extra)
        trainer.load_asset(ASSETS / "multiview")
        losses.append(trainer.train_step(batch, 0.0, 1))
        gradients.append([p.grad.clone() for p in trainer.modules.parameters()])
        text = sum(1 for _ in trainer.text_encoder.parameters())
    assert captions == batch.captions and losses[0] == losses[1]
    moved = [not torch.allclose(a, b) for a, b in zip(*gradients, strict=True)]
    assert any(moved[:text])


# Runs that are cut and lengthened


def arguments(work, *flags):
    parser = argument_parser("", "thing", steps=4, decay_steps=2)
    return parser.parse_args(["--work", str(work), "--groups", "1", *flags])


def test_a_run_is_lengthened_from_before_its_decay(source, tmp_path):
    begun = []
    args = arguments(tmp_path, "--warmup-steps", "1")
    trainer = fresh()
    restore(trainer, args, begun.append)
    assert begun == [trainer], "nothing to continue"
    train(trainer, source, args, 0, 1)
    assert trainer.step_count == 4
    assert not (tmp_path / "thing_stable.pt").exists(), "two minutes have not passed"
    # What the constant learning rate reached is what a longer run continues.
    early = fresh(1)
    early.step_count = 2
    torch.save({**early.state(), "steps": 4, "decay_from": 2}, tmp_path / "thing_stable.pt")
    longer = fresh(2)
    restore(longer, arguments(tmp_path, "--steps", "8"), begun.append)
    assert longer.step_count == 2 and len(begun) == 1
    assert torch.equal(longer.unet.conv_in.weight, early.unet.conv_in.weight)
    same = fresh(2)
    restore(same, args, begun.append)
    assert same.step_count == 4
    assert torch.equal(same.unet.conv_in.weight, trainer.unet.conv_in.weight)


def test_the_recipe_holds_what_remakes_the_asset(tmp_path):
    args = arguments(tmp_path, "--seed", "3", "--rate", "0.5")
    (tmp_path / "thing.log").write_text("50 loss 0.7000 9 s\n100 loss 0.1234 12 s\n")
    trainer = fresh()
    trainer.step_count = 100
    recipe = recipe_of(trainer, args, "train_thing")
    assert recipe["script"] == "custom.fourd.scripts.train_thing"
    assert (recipe["seed"], recipe["rate"], recipe["steps"]) == (3, 0.5, 100)
    assert recipe["loss"] == 0.1234


def test_the_class_embedding_learns_faster_where_asked(source):
    """The rate of every group by formula, and every parameter in exactly one of them."""
    torch.manual_seed(0)
    trainer = Trainer(build_multiview_unet(), 1e-3, 0.99, class_rate_factor=4.0)
    trainer.train_step(batch_joining(source, 1), 0.5, 0)
    rates = {}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            rates.update({parameter: group["lr"] for parameter in group["params"]})
    assert rates.keys() == set(trainer.modules.parameters())
    of_class = set(trainer.unet.class_embedding.parameters())
    for parameter, rate in rates.items():
        assert rate == pytest.approx(2e-3 if parameter in of_class else 5e-4)


def test_a_lower_power_means_more_noise(source, monkeypatch):
    trainer = fresh()
    seen = []
    add_noise = trainer.scheduler.add_noise

    def watch(latents, noise, timesteps):
        seen.append(timesteps.float().mean())
        return add_noise(latents, noise, timesteps)

    monkeypatch.setattr(trainer.scheduler, "add_noise", watch)
    for power in (1.0, 0.1):
        trainer.timestep_power = power
        trainer.train_step(batch_joining(source, 1), 0.0, 7)
    assert seen[1] > seen[0] + 200
