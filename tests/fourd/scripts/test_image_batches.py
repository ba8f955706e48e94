"""Training batches of the image model: pairs, what is told of them, and what is left out."""

from dataclasses import replace

import pytest
import torch

from custom.fourd.mappers.composition import TIME, VIEW
from custom.fourd.scripts.embedded_training import committed_autoencoder
from custom.fourd.scripts.image_batches import (
    GREY_SHARE,
    IMAGE_DROPOUT,
    SPIN_SHARE,
    TEXT_DROPOUT,
    TOLD_SHARE,
    WORDS_TOLD_SHARE,
    PairSource,
)
from custom.fourd.scripts.world_clips import spinning_share
from custom.fourd.scripts.world_pairs import PairGroups, render_pair_groups
from custom.fourd.scripts.world_views import view_suffix
from custom.fourd.world.grammar import parse_caption


@pytest.fixture(scope="module")
def vae():
    return committed_autoencoder()


@pytest.fixture(scope="module")
def groups():
    g = torch.Generator().manual_seed(0)
    return [render_pair_groups(6, n, g, size_px=16) for n in (1, 2)]


@pytest.fixture(scope="module")
def batches(groups, vae):
    source = PairSource(groups, vae, seed=4)
    return [source.batch(step, 8) for step in range(12)]


def shares(batches, value):
    return float(torch.cat([value(batch).float() for batch in batches]).mean())


def test_batches_have_the_shapes_of_the_family(batches):
    for batch in batches:
        assert batch.latents.shape == (32, 16, 4, 4) and batch.group_size == 1
        assert batch.prompt_images.shape == (32, 16, 16, 3)
        assert 0 <= float(batch.prompt_images.min()) and float(batch.prompt_images.max()) <= 1
        assert batch.class_vectors is None and batch.conditions is None
        assert bool(((0 <= batch.frame_times) & (batch.frame_times < 1)).all())
        assert bool(((0 <= batch.azimuths_deg) & (batch.azimuths_deg < 360)).all())


def test_every_branch_of_the_guidance_is_trained(batches):
    """Five standard deviations of 384 draws."""
    assert shares(batches, lambda b: ~b.sees_image) == pytest.approx(IMAGE_DROPOUT, abs=0.08)
    silent = [caption == "" for batch in batches for caption in batch.captions]
    assert sum(silent) / len(silent) == pytest.approx(TEXT_DROPOUT, abs=0.08)
    for name in (TIME, VIEW):
        # 0.28 + 0.28 of the pairs differ in it; of the others half are told.
        expected = 0.56 + 0.44 * TOLD_SHARE
        assert shares(batches, lambda b, n=name: b.told[n]) == pytest.approx(expected, abs=0.11)


def test_half_of_the_backgrounds_are_told_by_the_image_prompt_alone(batches, vae):
    """Image prompt and target stand on one background; five standard deviations of 384 draws."""
    assert shares(batches, lambda b: b.prompt_images[:, 0, 0, 0] < 0.999) == pytest.approx(
        GREY_SHARE, abs=0.13
    )
    for batch in batches:
        corners = batch.prompt_images[:, 0, 0]
        assert torch.equal(corners, corners[:, :1].expand(-1, 3))
        # An object may hide a corner of the target.
        with torch.no_grad():
            made = (vae.decode(batch.latents).sample[:, 0, 0, 0] + 1) / 2
        assert float(((made - corners[:, 0]).abs() < 0.1).float().mean()) > 0.8


def test_what_is_not_told_stays(vae):
    """Cells that carry their place as brightness: the time above, the azimuth below."""
    brightness = (20, 50, 110, 250)
    layers = torch.zeros((1, 4, 4, 2, 1, 16, 16), dtype=torch.uint8)
    layers[:, :, :, 0] = 255
    for time in range(4):
        for azimuth in range(4):
            layers[0, time, azimuth, 1, 0, :8] = brightness[time]
            layers[0, time, azimuth, 1, 0, 8:] = brightness[azimuth]
    group = PairGroups(
        [parse_caption("a red cube")],
        torch.tensor([[0.1, 0.3, 0.6, 0.8]]),
        torch.tensor([[10.0, 100.0, 200.0, 300.0]]),
        layers,
    )
    source = PairSource([group], vae, seed=1)
    seen = set()
    for step in range(6):
        batch = source.batch(step, 8)
        for row in range(32):
            bright = batch.prompt_images[row].amax(dim=-1)[:, 0] * 255
            # The brightest channel is 0.68 to 0.97 times the shading, whatever the colour.
            i, a = (sum(float(bright[y]) > limit for limit in (27, 60, 140)) for y in (0, 15))
            j = group.frame_times[0].tolist().index(batch.frame_times[row])
            b = group.azimuths_deg[0].tolist().index(batch.azimuths_deg[row])
            told = {name: bool(batch.told[name][row]) for name in (TIME, VIEW)}
            assert told[TIME] or i == j
            assert told[VIEW] or a == b
            seen.add((i == j, a == b, *told.values()))
    # Each of the nine combinations of staying (told, untold) and moving (told) in both.
    assert len(seen) == 9


def test_nothing_held_out_is_shown_or_said(batches, groups):
    for batch in batches:
        for caption in filter(None, batch.captions):
            scene = parse_caption(caption)
            assert not scene.is_held_out and not scene.has_held_out_motion
    assert not any(scene.has_held_out_motion for part in groups for scene in part.scenes)


def test_the_view_is_named_rightly(batches):
    named = 0
    for batch in batches:
        for caption, azimuth in zip(batch.captions, batch.azimuths_deg.tolist(), strict=True):
            if "view" in caption:
                named += 1
                assert caption.endswith(f", {view_suffix(azimuth)}")
    assert 0.02 < named / 384 < 0.2


def test_words_win_over_the_image_now_and_then(vae):
    """A scene and its twin in another material, told apart by their brightness."""
    scene = parse_caption("a red cube")
    twin = replace(scene, objects=(replace(scene.objects[0], material="wooden"),))
    layers = torch.full((5, 4, 4, 2, 1, 16, 16), 255, dtype=torch.uint8)
    layers[:, :, :, 1] = 250
    layers[4, :, :, 1] = 60
    group = PairGroups([scene] * 4 + [twin], torch.zeros(5, 4), torch.zeros(5, 4), layers)
    source = PairSource([group], vae, seed=2)
    differ = {True: 0, False: 0}
    for step in range(12):
        batch = source.batch(step, 8)
        for row, caption in enumerate(batch.captions):
            shown_dark = float(batch.prompt_images[row].max()) < 0.45
            said_dark = "wood" in caption
            if caption == "":
                target_dark = float(vae.decode(batch.latents[row : row + 1]).sample.max()) < -0.1
                assert target_dark == shown_dark, "without words the image is all there is"
            elif "view" not in caption:
                differ[shown_dark != said_dark] += 1
    share = differ[True] / sum(differ.values())
    # Two of the five groups are each other's twins: 0.4 * 0.3.
    assert share == pytest.approx(0.12, abs=0.08)


def test_a_batch_is_a_function_of_seed_and_step(groups, vae):
    source = PairSource(groups, vae, seed=4)
    first, again, other = source.batch(7, 2), source.batch(7, 2), source.batch(8, 2)
    assert torch.equal(first.latents, again.latents) and first.captions == again.captions
    assert torch.equal(first.prompt_images, again.prompt_images)
    assert torch.equal(
        torch.rand(3, generator=first.generator), torch.rand(3, generator=again.generator)
    )
    assert other.captions != first.captions


@pytest.fixture
def one_spins():
    """Six groups, each with a motion of its own."""
    words = ("spinning", "bouncing", "growing", "orbiting", "sliding", "shrinking")
    layers = torch.full((6, 4, 4, 2, 1, 16, 16), 255, dtype=torch.uint8)
    scenes = [parse_caption(f"a red cube {word}") for word in words]
    return PairGroups(scenes, torch.zeros(6, 4), torch.zeros(6, 4), layers)


def test_spinning_is_shown_more_often_than_it_is_rendered(one_spins, vae):
    """One of six groups spins; of the captions about half say so, not one in six."""
    source = PairSource([one_spins], vae, seed=3)
    captions = [caption for step in range(12) for caption in source.batch(step, 8).captions]
    said = [caption for caption in captions if caption]
    share = sum(spinning_share(caption) > 0 for caption in said) / len(said)
    assert abs(share - (SPIN_SHARE + (1 - SPIN_SHARE) / 6)) < 0.08


def test_words_are_of_any_time_and_azimuth_and_half_of_them_spin(one_spins, vae):
    source = PairSource([one_spins], vae, seed=4)
    batch, again = source.words(3, 400), source.words(3, 400)
    assert batch.captions == again.captions and torch.equal(batch.frame_times, again.frame_times)
    assert batch.captions != source.words(4, 400).captions
    for values, length in ((batch.frame_times, 1.0), (batch.azimuths_deg, 360.0)):
        counts = torch.histc(values, 8, 0.0, length)
        assert counts.min() > 25 and counts.sum() == 400
    spins = torch.tensor([spinning_share(caption) > 0 for caption in batch.captions])
    assert spins[1::2].all() and abs(float(spins[::2].float().mean()) - 1 / 6) < 0.08
    both = batch.told[TIME] & batch.told[VIEW]
    assert abs(float(both.float().mean()) - WORDS_TOLD_SHARE**2) < 0.07
