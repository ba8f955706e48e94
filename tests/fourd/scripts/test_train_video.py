"""Training batches of the video prior."""

import math

import pytest
import torch

from custom.fourd.diffusion.camera_vector import camera_and_time
from custom.fourd.diffusion.patch_autoencoder import PatchAutoencoder
from custom.fourd.scripts.make_family import ASSETS
from custom.fourd.scripts.train_video import (
    CLIP_LENGTHS,
    SPIN_LOSS_WEIGHT,
    SPIN_SHARE,
    ClipSource,
    main,
    spin_loss,
)
from custom.fourd.scripts.world_clips import WorldClips, render_clips
from custom.fourd.scripts.world_views import FOVY_RAD
from custom.fourd.world.grammar import parse_caption

VAE = ASSETS / "multiview" / "vae"


@pytest.fixture(scope="module")
def clips():
    g = torch.Generator().manual_seed(0)
    return [render_clips(2, count, g, size_px=16) for count in (1, 2)]


@pytest.fixture(scope="module")
def source(clips):
    vae = PatchAutoencoder.from_pretrained(VAE)
    return ClipSource(clips, vae, seed=4)


def batch_of(source, length):
    return next(b for b in (source.batch(n, 4) for n in range(99)) if b.group_size == length)


@pytest.mark.parametrize("length", [1, 4, 8, 16])
def test_frames_of_a_clip_are_neighbours(source, length):
    batch = batch_of(source, length)
    assert batch.latents.shape == (16, 16, 4, 4) and batch.class_vectors.shape == (16, 51)
    for first in range(0, 16, length):
        group = slice(first, first + length)
        assert len(set(batch.captions[group])) == 1
        vectors = batch.class_vectors[group]
        assert (vectors[:, :32] == vectors[0, :32]).all(), "one camera for a clip"
        times = vectors[:, 32]
        torch.testing.assert_close(times.diff(), torch.full((length - 1,), 1 / length))
    for caption in filter(None, batch.captions):
        scene = parse_caption(caption)
        assert not scene.is_held_out and not scene.has_held_out_motion


def test_class_vectors_belong_to_the_clips(source, clips):
    """Every vector is that of some clip's camera at one of its times."""
    known = []
    for part in clips:
        for index in range(len(part.scenes)):
            fovy = torch.full((16,), FOVY_RAD)
            poses = part.pose(index).expand(16, 4, 4)
            known.append(camera_and_time(poses, fovy, part.frame_times(index)))
    known = torch.cat(known)
    for vector in batch_of(source, 1).class_vectors:
        assert (known - vector).abs().amax(1).min() < 1e-6


def test_a_batch_is_a_function_of_seed_and_step(source):
    first, again = source.batch(7, 4), source.batch(7, 4)
    assert torch.equal(first.latents, again.latents) and first.captions == again.captions
    others = [source.batch(step, 4) for step in (8, 9, 10)]
    assert any(other.captions != first.captions for other in others)


def test_the_shares_of_the_lengths_add_up():
    assert sum(share for _, share in CLIP_LENGTHS) == pytest.approx(1.0)
    assert all(16 % length == 0 for length, _ in CLIP_LENGTHS)


def test_what_spins_is_drawn_more_often_than_it_occurs():
    captions = ["a red cube spinning"] + ["a red cube growing"] * 9
    layers = torch.zeros((10, 16, 2, 1, 16, 16), dtype=torch.uint8)
    scenes = [parse_caption(caption) for caption in captions]
    single = WorldClips(scenes, torch.tensor([[0.0, 10.0, 3.0]] * 10), torch.zeros(10), layers)
    pairs = WorldClips(
        [parse_caption("a red cube next to a blue sphere growing")],
        single.cameras[:1],
        single.first_times[:1],
        torch.zeros((1, 16, 2, 2, 16, 16), dtype=torch.uint8),
    )
    source = ClipSource([single, pairs], PatchAutoencoder.from_pretrained(VAE), seed=0)
    assert len(source.spinning[1]) == 1 and source.spinning[2] == source.places[2]
    drawn = [caption for step in range(60) for caption in set(source.batch(step, 4).captions)]
    lone = [caption for caption in drawn if "next to" not in caption and caption]
    share = sum("spinning" in caption for caption in lone) / len(lone)
    assert abs(share - (SPIN_SHARE + (1 - SPIN_SHARE) / 10)) < 0.1


def test_the_text_encoder_is_taught_how_much_spins_by_hand():
    captions = ["a red cube spinning", "a red cube spinning next to a blue ball", "a red cube", ""]
    logits = (2.0, -1.0, 0.5, -3.0)
    states = torch.zeros(4, 5, 24)
    states[:, 4, 16] = torch.tensor(logits) / 4
    expected = 0.0
    for logit, share in zip(logits, (1.0, 0.5, 0.0, 0.0), strict=True):
        says = 1 / (1 + math.exp(-logit))
        expected -= (share * math.log(says) + (1 - share) * math.log(1 - says)) / 4
    assert float(spin_loss(captions, states)) == pytest.approx(SPIN_LOSS_WEIGHT * expected)


def test_the_command_needs_clips(tmp_path):
    with pytest.raises(SystemExit, match="run custom.fourd.scripts.render_clips first"):
        main(["--work", str(tmp_path)])
