"""Training clips: what they show, and that nothing held out is in them."""

import math
from dataclasses import replace

import pytest
import torch

from custom.fourd.scripts.world_clips import (
    NUM_FRAMES,
    draw_moving_scene,
    load_clips,
    recolour_clip,
    render_clips,
    save_clips,
)
from custom.fourd.scripts.world_views import FOVY_RAD, colour_views
from custom.fourd.world.render import render
from custom.fourd.world.vocabulary import MOTIONS


@pytest.fixture(scope="module")
def clips():
    return render_clips(3, 2, torch.Generator().manual_seed(3), size_px=16)


def test_frames_are_the_world_at_their_times(clips):
    """Layers, coloured, against the world's renderer at the same camera and times."""
    for index, scene in enumerate(clips.scenes):
        times = clips.frame_times(index)
        assert 0 <= times[0] < 1 / NUM_FRAMES
        torch.testing.assert_close(times.diff(), torch.full((15,), 1 / 16))
        poses = clips.pose(index).expand(NUM_FRAMES, 4, 4)
        fovy = torch.full((NUM_FRAMES,), FOVY_RAD)
        truth = render(scene, poses, fovy, 16, 16, times).rgb
        white = torch.ones(NUM_FRAMES, 3)
        ours = colour_views(clips.layers[index], [scene] * NUM_FRAMES, white) * 0.5 + 0.5
        # Coverage and shading of two objects, each rounded by half of 1/255 at most.
        torch.testing.assert_close(ours.movedim(1, -1), truth, atol=4 * 0.5 / 255, rtol=0)


def test_cameras_are_on_the_orbit_that_they_name(clips):
    for index, (azimuth, elevation, distance) in enumerate(clips.cameras.tolist()):
        x, y, z = clips.pose(index)[:3, 3].tolist()
        assert math.sqrt(x * x + y * y + z * z) == pytest.approx(distance, rel=1e-5)
        assert math.degrees(math.atan2(y, x)) % 360 == pytest.approx(azimuth, abs=1e-3)
        assert math.degrees(math.asin(z / distance)) == pytest.approx(elevation, abs=1e-3)


def test_scenes_move_and_nothing_held_out_is_drawn():
    g = torch.Generator().manual_seed(0)
    objects = []
    for count in (1, 2) * 300:
        scene = recolour_clip(draw_moving_scene(g, count), g)
        assert not scene.is_held_out and not scene.has_held_out_motion
        objects += scene.objects
    still = sum(item.motion is None for item in objects) / len(objects)
    # Five standard deviations of 900 draws.
    assert still == pytest.approx(0.12, abs=0.055)
    assert {item.motion for item in objects} == {None, *MOTIONS}


def test_recolouring_keeps_geometry_and_motion():
    g = torch.Generator().manual_seed(1)
    scene = draw_moving_scene(g, 2)
    other = next(s for s in (recolour_clip(scene, g) for _ in range(9)) if s != scene)
    plain = [tuple(replace(o, colour="red") for o in s.objects) for s in (scene, other)]
    assert plain[0] == plain[1] and other.relation == scene.relation


def test_clips_survive_the_disk(clips, tmp_path):
    save_clips(clips, tmp_path / "clips.pt")
    loaded = load_clips(tmp_path / "clips.pt")
    assert loaded.scenes == clips.scenes
    for name in ("cameras", "first_times", "layers"):
        assert torch.equal(getattr(loaded, name), getattr(clips, name)), name
