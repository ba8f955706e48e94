"""Training of the edit model: batches, the beginning from the multi-view model, the command."""

import itertools
import json

import pytest
import torch

from custom.fourd.diffusion.instruct_pix2pix import load_edit_prior
from custom.fourd.scripts import embedded_training
from custom.fourd.scripts.embedded_models import EDIT_FACTS, build_edit_unet, build_multiview_unet
from custom.fourd.scripts.embedded_training import Trainer, committed_autoencoder, export
from custom.fourd.scripts.make_family import ASSETS
from custom.fourd.scripts.render_edits import main as render_main
from custom.fourd.scripts.train_edit import (
    ANCHOR_SHARE,
    NO_IMAGE_SHARE,
    NO_TEXT_SHARE,
    EditSource,
    edit_weights,
    main,
)
from custom.fourd.scripts.world_edits import load_edit_groups, render_edit_groups


@pytest.fixture(scope="module")
def vae():
    return committed_autoencoder()


@pytest.fixture(scope="module")
def source(vae):
    g = torch.Generator().manual_seed(0)
    return EditSource([render_edit_groups(3, n, g, size_px=16) for n in (1, 2)], vae, seed=4)


@pytest.fixture(scope="module")
def batches(source):
    return [source.batch(step, 2) for step in range(60)]


def test_frames_are_alone_or_a_group_with_one_sentence(batches):
    lengths = [batch.group_size for batch in batches]
    assert set(lengths) == {1, 4}
    assert lengths.count(4) / len(lengths) == pytest.approx(ANCHOR_SHARE, abs=0.2)
    for batch in batches:
        assert batch.latents.shape == batch.conditions.shape == (8, 16, 4, 4)
        assert (batch.attention == "joint") == (batch.group_size == 1)
        assert batch.class_vectors is None
        for first in range(0, 8, batch.group_size):
            assert len(set(batch.captions[first : first + batch.group_size])) == 1
    assert {"anchor", "anchor_self", "sparse_causal"} <= {batch.attention for batch in batches}


def test_branches_of_the_guidance_are_all_trained(batches):
    blind = [(batch.conditions[i] == 0).all().item() for batch in batches for i in range(8)]
    silent = [caption == "" for batch in batches for caption in batch.captions]
    assert all(s for s, b in zip(silent, blind, strict=True) if b), "no image, then no text either"
    assert sum(blind) / len(blind) == pytest.approx(NO_IMAGE_SHARE, abs=0.06)
    share = (sum(silent) - sum(blind)) / len(blind)
    assert share == pytest.approx(NO_TEXT_SHARE, abs=0.06)


def test_a_batch_is_a_function_of_seed_and_step(source):
    first, again, other = source.batch(7, 2), source.batch(7, 2), source.batch(8, 2)
    assert torch.equal(first.latents, again.latents) and first.captions == again.captions
    assert torch.equal(first.conditions, again.conditions)
    assert other.captions != first.captions


def test_it_begins_as_the_multiview_model_without_a_camera():
    torch.manual_seed(0)
    old, new = build_multiview_unet().eval(), build_edit_unet().eval()
    new.load_state_dict(edit_weights(old.state_dict()))
    g = torch.Generator().manual_seed(0)
    noisy, condition = torch.randn(2, 2, 16, 4, 4, generator=g)
    text = torch.randn(2, 77, 128, generator=g)
    with torch.no_grad():
        expected = old(noisy, 500, text, class_labels=torch.zeros(2, 32)).sample
        got = new(torch.cat((noisy, condition), 1), 500, text).sample
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_step_trains_the_condition_in_both_kinds_of_batch(batches):
    torch.manual_seed(0)
    trainer = Trainer(build_edit_unet(), 1e-3, 0.99)
    trainer.load_asset(ASSETS / "multiview", edit_weights)
    for length in (1, 4):
        batch = next(batch for batch in batches if batch.group_size == length)
        before = trainer.unet.conv_in.weight.detach().clone()
        loss = trainer.train_step(batch, 1.0, 3)
        moved = (trainer.unet.conv_in.weight - before).abs().amax((0, 2, 3))
        assert 0 < loss < 5 and (moved > 0).all() and len(moved) == 32


def test_the_export_loads_as_an_instruct_pix2pix(vae, tmp_path):
    trainer = Trainer(build_edit_unet(), 1e-3, 0.99)
    pipeline = "StableDiffusionInstructPix2PixPipeline"
    recipe = {"seed": 0, "steps": 0, "loss": None}
    folder = export(trainer, vae, "edit", EDIT_FACTS, recipe, tmp_path, pipeline)
    prior = load_edit_prior(str(folder))
    assert prior.unet.conv_in.in_channels == 32 and prior.final_alpha_cumprod == 1.0
    assert prior.schedule.prediction_type == "v_prediction"
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == pipeline
    assert json.loads((folder / "edit.json").read_text()) == {"image_size": 64}


@pytest.mark.slow
def test_a_run_that_is_cut_ends_where_a_whole_one_does(tmp_path, monkeypatch):
    work = ["--work", str(tmp_path)]
    assert render_main([*work, "--single", "1", "--pair", "1"]) == 0
    for count in (1, 2):
        groups = load_edit_groups(tmp_path / f"edits_{count}_0.pt")
        assert groups.layers.shape == (1, 4, 2, 2, count, 64, 64)
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
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["step"] == 2
    monkeypatch.setattr(Trainer, "train_step", step)
    assert main([*flags, "--name", "cut"]) == 0
    whole, cut_one = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("whole", "cut"))
    assert whole["step"] == cut_one["step"] == 3
    for name, value in whole["model"].items():
        assert torch.equal(value, cut_one["model"][name]), name


def test_the_command_needs_pairs(tmp_path):
    with pytest.raises(SystemExit, match="run custom.fourd.scripts.render_edits first"):
        main(["--work", str(tmp_path)])
