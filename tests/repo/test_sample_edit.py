"""The edit model's benchmark: its edits are what it says, and its sampler is the method's."""

import argparse
from types import SimpleNamespace

import pytest
import torch

from custom.fourd.world.edits import is_held_out_edit, parse_instruction


@pytest.fixture
def benchmark(load):
    return load("sample_edit")


@pytest.fixture(scope="module")
def prior():
    """The embedded editor's own parts with random weights."""
    from threestudio.models.guidance.noise_schedule import noise_schedule

    from custom.fourd.diffusion.instruct_pix2pix import EditPrior
    from custom.fourd.diffusion.patch_autoencoder import PatchAutoencoder
    from custom.fourd.scripts.embedded_models import build_edit_unet, build_scheduler

    torch.manual_seed(0)
    unet = build_edit_unet().eval()
    return EditPrior(unet, PatchAutoencoder(), noise_schedule(build_scheduler()), 1.0)


def test_sentences_mean_the_answers_and_splits_are_those_of_the_world(benchmark):
    edits = benchmark.drawn_edits(56)
    found = {(edit.kind, edit.split) for edit in edits}
    assert found == {(kind, split) for kind in benchmark.KINDS for split in benchmark.SPLITS}
    assert {len(edit.before.objects) for edit in edits} == {1, 2}
    for edit in edits:
        answers = parse_instruction(edit.text).answers(edit.before)
        assert set(edit.answers) <= set(answers) and len(set(edits)) == len(edits)
        assert (len(edit.answers) > 1) == edit.kind.startswith("random ")
        unseen = [is_held_out_edit(edit.before, answer) for answer in edit.answers]
        assert all(unseen) if edit.split == "held out" else not all(unseen)
        assert not any(answer.scene.has_held_out_motion for answer in edit.answers)
    assert benchmark.drawn_edits(4) == edits[:4]


def test_frames_are_edited_one_by_one_from_their_noise(benchmark, prior):
    g = torch.Generator().manual_seed(3)
    images, text = torch.rand(3, 16, 16, 3, generator=g), torch.randn(3, 77, 128, generator=g)

    def edit(images, text, scales=(1.5, 1.0)):
        return benchmark.edit_images(prior, text, images, 2, scales, g.manual_seed(5))

    edited = edit(images, text)
    assert edited.shape == images.shape and 0 <= edited.min() and edited.max() <= 1
    changed = torch.cat((images[:2], 1 - images[2:]))
    moved = (edit(changed, text) - edited).abs().amax((1, 2, 3)) > 1e-4
    assert moved.tolist() == [False, False, True]
    # With both scales at 1 the other branches cancel: what stands for no text does not matter.
    other = torch.cat((text[:1], -text[1:]))
    alike = edit(images, text, (1.0, 1.0)), edit(images, other, (1.0, 1.0))
    torch.testing.assert_close(*alike, atol=1e-3, rtol=0)
    assert (edit(images, other) - edited).abs().max() > 1e-3


def test_of_several_answers_the_nearest_counts_for_all_views(benchmark):
    images, far = torch.zeros(2, 4, 4, 3), torch.ones(2, 4, 4, 3)
    near = torch.cat((images[:1] + 0.1, images[:1] + 0.01))
    found, figure = benchmark.nearest(images, [far, near])
    assert found is near and figure == pytest.approx((20 + 40) / 2, abs=1e-4)


def test_means_are_told_by_split_and_kind_beside_the_unedited(load, tmp_path, capsys, monkeypatch):
    sampling = load("sampling")
    monkeypatch.setattr(sampling, "result_path", lambda name, suffix: tmp_path / f"r.{suffix}")
    rows = [
        {"split": "seen", "kind": "colour", "psnr": 20.0, "unedited": 10.0},
        {"split": "seen", "kind": "style", "psnr": 30.0, "unedited": 20.0},
    ]
    samples = [SimpleNamespace(row=row, picture=torch.rand(4, 8, 3)) for row in rows]
    args = argparse.Namespace(
        steps=2, guidance_scale=1.5, image_guidance_scale=1.0, write=True, sheet=None
    )
    sampling.report("sample_edit", samples, ("split", "kind"), args, 0.0)
    told = capsys.readouterr().out
    assert "mean over split seen: 25.00 dB (unedited 15.00)" in told
    assert "of the image 1.0" in told
    text = (tmp_path / "r.json").read_text()
    assert '"style": 30.0' in text and '"colour": 10.0' in text
    assert (tmp_path / "r.png").stat().st_size > 0


def test_flags_of_the_image_are_the_editors_own(load, monkeypatch):
    sampling = load("sampling")
    monkeypatch.setattr("sys.argv", ["x"])
    assert "image_guidance_scale" not in sampling.parse_arguments("", "f")
    found = sampling.parse_arguments("", "f", image_guidance_scale=1.2, steps=7)
    assert (found.image_guidance_scale, found.steps, found.captions) == (1.2, 7, 24)
