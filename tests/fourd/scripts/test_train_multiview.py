"""Training of the embedded prior, on a handful of tiny views."""

import pytest
import torch

from custom.fourd.scripts.train_multiview import (
    ViewSource,
    family_autoencoder,
    fit_autoencoder,
    main,
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


def batches_of(source, kind, count=1):
    found = (source.batch(step, 2) for step in range(200))
    chosen = {
        "views": lambda b: b.group_size == 4,
        "lone": lambda b: b.group_size == 1 and b.class_vectors.any(),
        "single": lambda b: not b.class_vectors.any(),
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
    ("kind", "group_size"), [("views", 4), ("lone", 1), ("single", 1)]
)
def test_the_kinds_of_batches(source, kind, group_size):
    (batch,) = batches_of(source, kind)
    assert batch.latents.shape == (8, 16, SIZE // 4, SIZE // 4) and batch.group_size == group_size
    assert len(batch.captions) == 8
    assert batch.class_vectors.shape == (8, 32)
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


def test_the_command_needs_views(tmp_path):
    with pytest.raises(SystemExit, match="run custom.fourd.scripts.render_views first"):
        main(["--work", str(tmp_path)])


# What is committed


def test_the_committed_autoencoder_defines_latents_whatever_the_data(groups, tmp_path):
    committed = family_autoencoder(groups)
    fitted = family_autoencoder(groups, assets=tmp_path)
    again = family_autoencoder(groups[:1])
    assert torch.equal(committed.encoder.weight, again.encoder.weight)
    assert not torch.allclose(committed.encoder.weight, fitted.encoder.weight)
