"""Training and sampling with controls on tiny random models: the loss, gradients, drops, files."""

import math
from dataclasses import replace

import pytest
import torch
from threestudio.utils.rng import rand_items, randn_items

from custom.fourd.mappers.checkpoint import check_fits, load_mapper
from custom.fourd.mappers.composition import TIME, VIEW
from custom.fourd.systems.time_mapper_system import TimeMapperSystem
from custom.fourd.systems.time_view_mapper_system import TimeViewMapperSystem
from custom.fourd.systems.view_mapper_system import ViewMapperSystem
from tests.fixtures.controlled_models import adapter_of, pair_of_images, write_controlled_folder
from tests.fixtures.launched import launch, need_embedded_model

PAIRS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_controlled_folder(tmp_path_factory.mktemp("model"))


def build(folder, system=TimeMapperSystem, adapter=True, **changes):
    config = {
        "base_model": str(folder),
        "mapper": {"hidden": [32, 32]},
        "drop_control": 0.0,
        "drop_image": 0.0,
        "sampling_steps": 2,
        "optimizer": {"name": "AdamW", "args": {"lr": 0.01}, "params": {"mappers": {"lr": 0.01}}},
    }
    if adapter:
        config["ip_adapter"] = adapter_of(folder)
    made = system({**config, **changes})
    made.log = lambda *_, **__: None
    return made


@pytest.fixture
def batch():
    return pair_of_images(PAIRS)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_denoisers_own(folder, batch, prediction_type):
    """Written out again from the schedule's formulas, with the contexts that the system made."""
    system = build(folder)
    schedule = replace(system.prior.schedule, prediction_type=prediction_type)
    system.model.prior = replace(system.prior, schedule=schedule)
    with torch.no_grad():
        loss = system.training_step(batch, 0)["loss"]
        prior = system.prior
        clean = prior.encode(batch["target_rgb"])
        noise = randn_items(clean.shape, "mapper-noise", 7)
        steps = (rand_items((PAIRS,), "mapper-timesteps", 7) * 1000).long()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        abar = (1 - betas).cumprod(0)[steps].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
        model = system.model
        contexts = model.injection.contexts(
            model.prompts([f"a photo of {caption}" for caption in batch["caption"]]),
            model.words(system.mappers, batch, steps / 1000),
        )
        predicted = prior.unet(
            noisy,
            steps,
            encoder_hidden_states=contexts.keys[0],
            cross_attention_kwargs={"kv_context": contexts},
            **model.image_prompt(batch),
        ).sample
        velocity = abar.sqrt() * noise - (1 - abar).sqrt() * clean
        target = noise if prediction_type == "epsilon" else velocity
        torch.testing.assert_close(loss, (predicted - target).square().mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("system", [TimeMapperSystem, ViewMapperSystem, TimeViewMapperSystem])
def test_only_the_mappers_learn(folder, batch, system):
    made = build(folder, system)
    assert set(made.mappers) == set(system.controls)
    made.training_step(batch, 0)["loss"].backward()
    for name, parameter in made.named_parameters():
        assert name.startswith("mappers.") and float(parameter.grad.abs().max()) > 0, name
    frozen = [made.prior.unet, made.prior.text_encoder, made.prior.autoencoder, made.model.vision]
    assert not any(p.requires_grad or p.grad is not None for m in frozen for p in m.parameters())
    assert all(key.startswith("mappers.") for key in made.state_dict())


def test_dropped_controls_teach_nothing(folder, batch):
    made = build(folder, drop_control=1.0)
    loss = made.training_step(batch, 0)["loss"]
    loss.backward()
    assert not any(bool(parameter.grad.any()) for parameter in made.parameters())
    other = {**batch, "time_j": batch["time_j"].flip(0)}
    assert torch.equal(made.training_step(other, 0)["loss"], loss)


def test_dropped_images_are_not_seen(folder, batch):
    made = build(folder, drop_image=1.0)
    other = {**batch, "cond_rgb": 1 - batch["cond_rgb"]}
    with torch.no_grad():
        assert made.training_step(other, 0)["loss"] == made.training_step(batch, 0)["loss"]
        kept = build(folder)
        assert kept.training_step(other, 0)["loss"] != kept.training_step(batch, 0)["loss"]


def test_foreground_counts_more(folder, batch):
    made = build(folder, foreground_weight=3.0)
    errors = torch.zeros(PAIRS, 4, 8, 8)
    errors[..., :4], errors[..., 4:] = 1.0, 2.0
    batch["target_alpha"][:, :, :8] = 0
    # Halves with the weights 1 and 4: (1 * 1 + 4 * 2) / 5.
    assert float(made._mean_loss(errors, batch)) == pytest.approx(9 / 5)


def test_the_loss_falls_on_one_batch(folder, batch):
    made = build(folder)
    optimizer = made.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(8):
        loss = made.training_step(batch, 0)["loss"]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-4


@pytest.mark.parametrize("adapter", [True, False])
def test_images_follow_their_controls(folder, batch, adapter):
    made = build(folder, TimeViewMapperSystem, adapter)
    noise = randn_items(made.prior.encode(batch["cond_rgb"]).shape, "noise", 0)
    images = made.generate(batch, noise)
    assert images.shape == (PAIRS, 16, 16, 3)
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    assert torch.equal(made.generate(batch, noise), images)
    later = {**batch, "time_j": batch["time_j"] + torch.tensor([0.0, 0.3, 0.0])}
    moved = (made.generate(later, noise) - images).abs().amax(dim=(1, 2, 3))
    assert moved[1] > 0 and moved[0] < 1e-5 and moved[2] < 1e-5


def test_both_placeholders_stand_in_every_prompt(folder, batch):
    for system in (TimeMapperSystem, TimeViewMapperSystem):
        prompts = build(folder, system).model.prompts(batch["caption"])
        assert prompts.positions[VIEW].tolist() == [1] * PAIRS
        assert prompts.positions[TIME].tolist() == [2] * PAIRS


def test_mappers_are_kept_with_what_they_need(folder, batch, tmp_path):
    made = build(folder, TimeViewMapperSystem)
    paths = made.save_mappers(tmp_path)
    assert [path.name for path in paths] == [
        "time-mapper-step-0.safetensors",
        "view-mapper-step-0.safetensors",
    ]
    mapper, facts = load_mapper(paths[0])
    check_fits(facts, str(folder), 24, made.model.table)
    assert facts.ip_adapter.endswith("ip-adapter.safetensors")
    assert facts.prompt_template == "<view> <time>. a photo of {caption}"
    assert math.isclose(float(mapper.base_norm), made.model.injection.base_norm(TIME), rel_tol=1e-6)


def test_every_file_that_training_loads_is_listed():
    adapter = {"weights": "owner/ip/models/plus.safetensors", "image_encoder": "owner/ip"}
    needed = TimeMapperSystem.required_models({"base_model": "owner/sd", "ip_adapter": adapter})
    assert needed == ["owner/sd", "owner/ip/models/plus.safetensors", "owner/ip"]
    assert needed[2].components == ("image_encoder",)
    assert TimeMapperSystem.required_models({}) == ["embedded://multiview"]


def test_keys_that_do_not_fit_are_named(folder):
    with pytest.raises(ValueError, match="system.mapper has keys that do not fit .*colour"):
        build(folder, mapper={"colour": 1})
    with pytest.raises(ValueError, match="injection's mode is 'free'"):
        build(folder, injection={"mode": "free"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["time_mapper", "view_mapper", "time_view_mapper"])
def test_a_config_trains_and_tests(name, tmp_path):
    need_embedded_model()
    run = launch("--train", tmp_path, config=f"custom/configs/{name}.yaml")
    assert run.status == 0, run.errors
    kept = {path.name for path in (run.folder / "save").iterdir()}
    assert {"metrics.json", "it2-test-sheet.png", "it2-grid"} <= kept
    assert any(file.endswith("-mapper-step-2.safetensors") for file in kept)


@pytest.mark.slow
def test_what_was_trained_is_tested_again_in_other_ways(tmp_path):
    """Edited prompts, a picture without a scene, and mappers without a checkpoint."""
    import cv2
    import numpy as np

    need_embedded_model()
    config = "custom/configs/time_view_mapper.yaml"
    run = launch("--train", tmp_path, config=config)
    assert run.status == 0, run.errors
    save, small = run.folder / "save", ("system.grid.n_times=2", "system.grid.n_views=2")
    before = (save / "metrics.json").read_bytes()
    cv2.imwrite(str(tmp_path / "cup.png"), np.full((40, 30, 3), 128, np.uint8))
    again = launch(
        "--test", tmp_path, f"resume={run.checkpoint}", *small, "system.compose.mode=guidance",
        f"system.grid.image={tmp_path / 'cup.png'}", "system.grid.caption=a red cube",
        'system.grid.prompts=["{caption}", "{caption} made of wood"]', config=config,
    )  # fmt: skip
    assert again.status == 0, again.errors
    sheets = sorted(path.parent.name for path in (save / "it2-grid-2" / "cup").glob("*/sheet.png"))
    assert sheets == ["0-a_red_cube", "1-a_red_cube_made_of_wood"]
    assert (save / "metrics.json").read_bytes() == before, "a picture is not scored"
    mappers = ",".join(str(path) for path in save.glob("*-mapper-step-2.safetensors"))
    composed = launch(
        "--test", tmp_path / "composed", f"system.mapper_weights=[{mappers}]", *small, config=config
    )
    assert composed.status == 0, composed.errors
    assert (composed.folder / "save" / "metrics.json").is_file()
    refused = launch("--test", tmp_path / "none", config=config)
    assert refused.status != 0 and "--test needs weights" in refused.errors
