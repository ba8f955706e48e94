"""Training views: what the renderer shows, said in words of the world, never held out."""

import itertools

import pytest
import torch

from custom.fourd.ops.camera import camera_from_orbit
from custom.fourd.scripts.world_views import (
    DISTANCE,
    ELEVATION_DEG,
    FOVY_RAD,
    chance,
    colour_views,
    draw,
    draw_backgrounds,
    draw_scene,
    group_cameras,
    load_groups,
    recolour,
    render_groups,
    save_groups,
    say,
    view_suffix,
)
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.render import render
from custom.fourd.world.vocabulary import COLOURS, MATERIALS, MOTIONS, SHAPES, SIZES


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def groups():
    return render_groups(3, 2, seeded(5), size_px=16)


@pytest.fixture(scope="module")
def drawn():
    """Scenes as training sees them, after their colours were drawn anew."""
    g = seeded(1)
    return [recolour(draw_scene(g, 1 + n % 2), g) for n in range(500)]


def test_training_never_sees_what_is_held_out(drawn):
    assert not any(scene.is_held_out or scene.has_held_out_motion for scene in drawn)


def test_training_sees_every_word(drawn):
    items = [item for scene in drawn for item in scene.objects]
    for name, words in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES),
                        ("material", MATERIALS), ("motion", MOTIONS)):  # fmt: skip
        assert {getattr(item, name) for item in items} - {None} == set(words)
    pairs = [scene.relation for scene in drawn if len(scene.objects) == 2]
    assert pairs.count("next to") == pytest.approx(125, abs=40) and len(pairs) == 250
    plain = sum(item.material == "plain" for item in items) / len(items)
    moving = sum(item.motion is not None for item in items) / len(items)
    # 750 draws with shares .70 and .15: five standard deviations are .08 and .065.
    assert plain == pytest.approx(0.70, abs=0.08) and moving == pytest.approx(0.15, abs=0.065)


def test_whatever_is_said_means_the_scene(drawn):
    g, said = seeded(2), set()
    for scene in drawn:
        text = say(scene, g)
        said.add(text)
        assert parse_caption(text) == scene, text
    for way in (" and ", " on a ", "medium", "ball", "box", "made of wood", "made of metal"):
        assert any(way in text for text in said), way


def test_recolouring_keeps_the_geometry(drawn):
    for scene in drawn[:50]:
        again = recolour(scene, seeded(3))
        assert again.relation == scene.relation
        for before, after in zip(scene.objects, again.objects):
            assert (before.shape, before.size, before.material) == (
                after.shape, after.size, after.material
            )  # fmt: skip


def test_views_are_what_the_renderer_shows(groups):
    poses, _ = group_cameras(groups.cameras)
    fovy = torch.full((4,), FOVY_RAD)
    background = torch.tensor([0.3, 0.6, 1.0])
    for index, stored in enumerate(groups.scenes):
        scene = recolour(stored, seeded(index))
        ours = colour_views(groups.layers[index], [scene] * 4, background.expand(4, 3))
        still = type(scene)(
            tuple(type(o)(o.shape, o.colour, o.size, o.material) for o in scene.objects),
            scene.relation,
        )
        true = render(still, poses[index], fovy, 16, 16, background=background).rgb
        # Layers are stored in 255 steps: each of three terms is off by half a step at most.
        assert ((ours + 1) / 2 - true.movedim(-1, 1)).abs().max() < 2 / 255


def test_cameras_are_in_range_and_a_quarter_turn_apart(groups):
    azimuth, elevation, distance = groups.cameras.unbind(-1)
    assert (azimuth >= 0).all() and (azimuth < 360).all()
    assert (elevation >= ELEVATION_DEG[0]).all() and (elevation <= ELEVATION_DEG[1]).all()
    assert (distance >= DISTANCE[0]).all() and (distance <= DISTANCE[1]).all()
    poses, azimuths = group_cameras(groups.cameras)
    for index, view in itertools.product(range(3), range(4)):
        assert float(azimuths[index, view]) == pytest.approx(float(azimuth[index]) + 90 * view)
        expected = camera_from_orbit(
            elevation[index : index + 1], azimuths[index, view : view + 1], distance[index]
        )
        torch.testing.assert_close(poses[index, view], expected[0])


def test_groups_are_a_function_of_their_seed(groups):
    again = render_groups(3, 2, seeded(5), size_px=16)
    assert again.scenes == groups.scenes and torch.equal(again.cameras, groups.cameras)
    assert torch.equal(again.layers, groups.layers) and groups.layers.dtype == torch.uint8


def test_groups_survive_the_disk(groups, tmp_path):
    save_groups(groups, tmp_path / "views.pt")
    loaded = load_groups(tmp_path / "views.pt")
    assert loaded.scenes == groups.scenes
    assert torch.equal(loaded.layers, groups.layers)
    assert torch.equal(loaded.cameras, groups.cameras)


@pytest.mark.parametrize(
    ("azimuth", "words"),
    [(0, "front view"), (44, "front view"), (-44, "front view"), (316, "front view"),
     (46, "side view"), (90, "side view"), (270, "side view"), (-90, "side view"),
     (134, "side view"), (136, "back view"), (180, "back view"), (-179, "back view"),
     (540, "back view"), (720, "front view")],
)  # fmt: skip
def test_view_words(azimuth, words):
    assert view_suffix(azimuth) == words


def test_backgrounds_are_white_or_grey():
    colours = draw_backgrounds(400, seeded())
    assert torch.equal(colours, colours[:, :1].expand(400, 3))
    white = float((colours[:, 0] == 1).float().mean())
    # Four fifths of 400 draws; five standard deviations are 0.1.
    assert white == pytest.approx(0.8, abs=0.1) and colours.min() >= 0
    more = draw_backgrounds(400, seeded(), 0.5)
    assert float((more[:, 0] == 1).float().mean()) == pytest.approx(0.5, abs=0.13)


def test_draws_are_uniform_and_chances_hold():
    g = seeded()
    counts = [[draw(g, "abc") for _ in range(600)].count(letter) for letter in "abc"]
    assert all(140 < count < 260 for count in counts)
    assert 100 < sum(chance(g, 0.25) for _ in range(600)) < 200
