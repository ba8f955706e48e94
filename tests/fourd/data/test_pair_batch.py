"""Batches: colours over one background, one jitter for both frames, deltas that add up."""

import math

import pytest
import torch
from threestudio.data.camera_sampling import ItemSpan

from custom.fourd.data.pair_batch import draw_backgrounds, draw_jitter, lay_over, pair_batch
from custom.fourd.data.pair_cells import CellMemory, orbit_cameras, scene_times
from custom.fourd.data.pair_sampling import PairChoice
from custom.fourd.data.world_cells import WorldCells

SPAN = ItemSpan(step=2, first=3, count=4, total=8)
NO_CHANGE = torch.eye(3).expand(1, 3, 3), torch.zeros(1, 3)


def world(caption, n_times=4, azimuths=(0.0, 90.0, 315.0)):
    cameras = orbit_cameras([15.0], azimuths, 3.0, 40.0)
    return WorldCells(caption, caption, scene_times(n_times, False), cameras, 12, 10)


def batch_of(rows, background=(1.0, 1.0, 1.0), jitter=None):
    sources = [world("a red cube spinning"), world("a blue sphere", 2, (0.0, 20.0))]
    colours = torch.tensor(background).expand(len(rows), 3)
    return pair_batch(sources, CellMemory(10**6), PairChoice.of_rows(rows), colours, jitter)


def test_a_batch_says_what_it_shows():
    batch = batch_of([(0, 2, 1, 3, 0, 2), (1, 0, 1, 0, 1, 1)])
    assert batch["cond_rgb"].shape == batch["target_rgb"].shape == (2, 12, 10, 3)
    assert batch["cond_alpha"].shape == batch["target_alpha"].shape == (2, 12, 10, 1)
    assert batch["time_i"].tolist() == [0.25, 0.5] and batch["time_j"].tolist() == [0.75, 0.0]
    assert batch["delta_time"].tolist() == [0.5, -0.5]
    assert batch["camera_a"]["azimuth"].tolist() == [0, 20]
    assert batch["camera_b"]["azimuth"].tolist() == [315, 20]
    assert batch["camera_b"]["c2w"].shape == (2, 4, 4)
    assert batch["camera_a"]["fovy"].tolist() == pytest.approx([math.radians(40)] * 2)
    assert batch["delta_view"][:, 1].tolist() == pytest.approx([-math.pi / 4, 0])
    assert batch["scene_id"] == batch["caption"] == ["a red cube spinning", "a blue sphere"]
    assert batch["index_i"].tolist() == [1, 1] and batch["index_b"].tolist() == [2, 1]
    assert batch["pair_kind"].tolist() == [2, 0] and batch["scene_index"].tolist() == [0, 1]
    assert "target_latents" not in batch and "cond_features" not in batch


def test_both_frames_are_of_their_own_time_and_camera():
    source = world("a red cube spinning")
    batch = batch_of([(0, 2, 1, 3, 0, 2)], background=(0.0, 0.0, 0.0))
    for side, place in (("cond", (1, 0)), ("target", (3, 2))):
        cell = source.read_cell(*place).float() / 255
        assert torch.equal(batch[f"{side}_rgb"][0], cell[..., :3])
        assert torch.equal(batch[f"{side}_alpha"][0], cell[..., 3:])
    assert not torch.equal(batch["cond_rgb"], batch["target_rgb"])


def test_both_frames_have_one_background_that_jitter_leaves_alone():
    colour = (0.2, 0.6, 0.9)
    jitter = draw_jitter(0.3, ItemSpan(0, 0, 1, 1))
    for change in (None, jitter):
        batch = batch_of([(0, 0, 0, 2, 1, 1)], colour, change)
        for side in ("cond", "target"):
            corner, alpha = batch[f"{side}_rgb"][0, 0, 0], batch[f"{side}_alpha"][0, 0, 0]
            assert alpha == 0 and corner.tolist() == pytest.approx(colour)
    assert batch["background"].tolist() == [pytest.approx(colour)]


def test_colour_is_laid_over_by_hand():
    cell = torch.tensor([[[[51, 0, 0, 102]]]], dtype=torch.uint8)
    rgb, alpha = lay_over(cell, torch.tensor([[1.0, 0.5, 0.0]]))
    # Colour times alpha 0.2, alpha 0.4, and 0.6 of the background.
    assert rgb.flatten().tolist() == pytest.approx([0.8, 0.3, 0.0])
    assert alpha.item() == pytest.approx(0.4)


def test_jitter_is_laid_over_by_hand():
    cell = torch.tensor([[[[128, 64, 0, 255], [51, 0, 0, 102]]]], dtype=torch.uint8)
    swap = torch.tensor([[[0.0, 1, 0], [1, 0, 0], [0, 0, 1]]]), torch.tensor([[0.1, 0.1, -0.1]])
    rgb, _ = lay_over(cell, torch.zeros(1, 3), swap)
    expected = [64 / 255 + 0.1, 128 / 255 + 0.1, 0.0]
    assert rgb[0, 0, 0].tolist() == pytest.approx(expected)
    # The offset counts as much as the pixel is covered.
    assert rgb[0, 0, 1].tolist() == pytest.approx([0.04, 0.24, 0.0])
    bright = 10 * torch.eye(3)[None], torch.zeros(1, 3)
    # A pixel covered by 0.4 shines no brighter than that.
    assert lay_over(cell, torch.zeros(1, 3), bright)[0][0, 0, 1, 0].item() == pytest.approx(0.4)
    same, _ = lay_over(cell, torch.zeros(1, 3), NO_CHANGE)
    assert torch.equal(same, lay_over(cell, torch.zeros(1, 3))[0])


def test_a_pair_of_one_frame_stays_one_frame_under_jitter():
    batch = batch_of([(0, 3, 1, 1, 2, 2)], jitter=draw_jitter(0.3, ItemSpan(0, 0, 1, 1)))
    assert torch.equal(batch["cond_rgb"], batch["target_rgb"])
    assert not torch.equal(batch["cond_rgb"], batch_of([(0, 3, 1, 1, 2, 2)])["cond_rgb"])


def test_jitter_keeps_its_bounds_and_greys_grey():
    matrix, offset = draw_jitter(0.1, ItemSpan(0, 0, 200, 200))
    grey = (matrix @ torch.full((3,), 0.5)) + offset
    # Mid-grey changes by the brightness alone, times a contrast that turns about it.
    assert torch.allclose(grey.amax(-1), grey.amin(-1), atol=1e-6)
    assert 0.5 * 0.9 * 0.9 - 0.06 < float(grey.min()) < 0.47 < 0.53 < float(grey.max()) < 0.62
    red = matrix @ torch.tensor([1.0, 0.0, 0.0])
    assert float(red[:, 0].min()) > 0.7 and float(red[:, 1:].abs().max()) < 0.15
    still, none = draw_jitter(0.0, SPAN)
    assert torch.allclose(still, torch.eye(3).expand(4, 3, 3), atol=1e-6) and none.abs().max() == 0


def test_a_turn_of_hue_moves_red_towards_one_neighbour():
    """By Rodrigues: about the grey axis by the angle that U draws, at full saturation."""
    matrix, _ = draw_jitter(0.5, ItemSpan(0, 0, 50, 50))
    start = torch.tensor([1.0, -1.0, 0.0]) / 2**0.5
    moved = matrix @ start
    # What luma mixes in has no part across the grey axis, so the angle is the hue's.
    across = moved - moved.mean(-1, keepdim=True)
    angle = torch.acos((torch.nn.functional.normalize(across, dim=-1) @ start).clamp(-1, 1))
    assert 0.4 < float(angle.max()) <= 0.5 + 1e-3


@pytest.mark.parametrize("mode, channels", [("random", 3), ("random_gray", 1)])
def test_backgrounds_are_drawn_per_pair_wherever_it_is(mode, channels):
    colours = draw_backgrounds(mode, SPAN)
    assert colours.shape == (4, 3) and len(colours[0].unique()) == channels
    assert len(colours[:, 0].unique()) == 4
    whole = draw_backgrounds(mode, ItemSpan(step=2, first=0, count=8, total=8))
    assert torch.equal(whole[3:7], colours)


def test_a_given_background_is_every_pair_s():
    assert draw_backgrounds([0, 0.5, 1], SPAN).tolist() == [[0, 0.5, 1]] * 4


def test_latents_come_where_every_scene_has_them(monkeypatch):
    sources = [world("a red cube spinning"), world("a blue sphere")]
    sources[0].read_latents = lambda time_id, camera_id: torch.tensor([time_id, camera_id])
    sources[0].read_features = lambda time_id, camera_id: torch.tensor([[time_id, camera_id]])
    white, memory = torch.ones(2, 3), CellMemory(0)
    choice = PairChoice.of_rows([(0, 2, 0, 1, 2, 0), (0, 2, 3, 2, 1, 2)])
    batch = pair_batch(sources, memory, choice, white)
    # Latents are the target's, features the condition's.
    assert batch["target_latents"].tolist() == [[1, 0], [2, 2]]
    assert batch["cond_features"].tolist() == [[[0, 2]], [[3, 1]]]
    mixed = PairChoice.of_rows([(0, 2, 0, 1, 2, 0), (1, 2, 0, 1, 2, 0)])
    assert "target_latents" not in pair_batch(sources, memory, mixed, white)
