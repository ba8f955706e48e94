"""Who films the world: arcs, rigs, paths, and the truth from its record."""

import json

import pytest
import torch

from custom.fourd.world.capture import (
    arc_azimuths,
    join_captures,
    path_capture,
    read_truth,
    record_of,
    rig_capture,
)
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.render import render

SCENE = parse_caption("a purple cylinder orbiting")


def test_the_held_out_camera_is_inside_the_arc():
    azimuths = arc_azimuths(8, 60.0)
    assert azimuths.sort().values.tolist() == pytest.approx([-30 + 60 * i / 7 for i in range(8)])
    assert azimuths[1:].min() < azimuths[0] < azimuths[1:].max()
    # No more than a step from the middle, so it has neighbours on both sides.
    assert abs(float(azimuths[0])) < 60 / 7


def test_a_rig_films_all_times_with_every_camera():
    capture = rig_capture(SCENE, torch.tensor([0.0, 90.0]), n_times=3, size_px=16)
    assert len(capture) == 6 and capture.ids() == ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])
    assert capture.frame_times.tolist() == [0, 0.5, 1] * 2
    assert torch.equal(capture.c2w[0], capture.c2w[2])
    # Azimuth 90 degrees stands on +y, 15 degrees up, 3 away.
    position = capture.c2w[3, :3, 3].tolist()
    assert position == pytest.approx([0.0, 2.897777, 0.776457], abs=1e-5)
    assert capture.bounds == (pytest.approx(3 - 3**0.5), pytest.approx(3 + 3**0.5))


def test_a_path_swings_and_comes_back():
    capture = path_capture(SCENE, n_times=5, size_px=16, swing_deg=60.0)
    azimuths = torch.rad2deg(torch.atan2(capture.c2w[:, 1, 3], capture.c2w[:, 0, 3]))
    assert azimuths.tolist() == pytest.approx([0, 30, 0, -30, 0], abs=1e-4)
    still = path_capture(SCENE, 3, 16, swing_deg=0)
    assert torch.equal(still.c2w, still.c2w[:1].expand(3, 4, 4))


def test_truth_does_not_depend_on_how_many_are_rendered_at_once():
    capture = rig_capture(SCENE, torch.tensor([10.0]), n_times=20, size_px=12)
    rgb, depth = capture.render()
    assert rgb.shape == (20, 12, 12, 3) and depth.shape == (20, 12, 12)
    row = 18
    one = render(
        SCENE, capture.c2w[row : row + 1], torch.tensor([capture.fovy_rad]), 12, 12,
        capture.frame_times[row : row + 1],
    )  # fmt: skip
    assert torch.allclose(rgb[row], one.rgb[0], atol=1e-6)
    assert torch.allclose(depth[row], one.depth[0, ..., 0], atol=1e-5)
    assert torch.equal(capture.frames()[row], (rgb[row] * 255).round().byte())


def test_the_record_gives_the_same_truth(tmp_path):
    first = rig_capture(SCENE, torch.tensor([10.0]), 2, 12, background=(0.1, 0.2, 0.3))
    second = path_capture(SCENE, 3, 12)
    capture = join_captures(first, second)
    assert len(capture) == 5 and capture.background == (0.1, 0.2, 0.3)
    (tmp_path / "world.json").write_text(json.dumps(record_of(capture)))
    again = read_truth(tmp_path)
    assert again.scene == capture.scene and again.size_px == 12
    for one, other in zip(again.render(), capture.render(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(read_truth(tmp_path / "world.json").c2w, capture.c2w)
