"""Cells, cameras and their differences; what is remembered of rendered cells."""

import math

import pytest
import torch

from custom.fourd.data.pair_cells import (
    CellMemory,
    CellSource,
    cell_bytes,
    delta_view,
    orbit_cameras,
    scene_times,
    view_gaps_deg,
    wrapped_deg,
)


class CountedCells(CellSource):
    """Cells that say where they are, and how often they were asked for."""

    def __init__(self, name="counted", n_times=4, n_cameras=3, size=(4, 5)):
        azimuths = [90.0 * place for place in range(n_cameras)]
        cameras = orbit_cameras([15.0], azimuths, 3.0, 40.0)
        super().__init__(name, "words", scene_times(n_times, False), cameras, *size)
        self.reads = []

    def read_cell(self, time_id, camera_id):
        self.reads.append((time_id, camera_id))
        cell = torch.full((self.height, self.width, 4), 10 * time_id + camera_id)
        return cell.to(torch.uint8)


def one_camera(elevation, azimuth, radius):
    cameras = orbit_cameras([elevation], [azimuth], radius, 40.0)
    return cameras.select(torch.tensor([0]))


@pytest.mark.parametrize(
    "angle, expected",
    [(0, 0), (180, 180), (-180, 180), (190, -170), (-190, 170), (540, 180), (360, 0), (-45, -45)],
)
def test_angles_wrap_to_above_minus_180(angle, expected):
    assert wrapped_deg(torch.tensor(float(angle))).item() == expected


def test_the_difference_of_views_is_signed_and_takes_the_short_way():
    a, b = one_camera(10.0, 350.0, 2.0), one_camera(25.0, 20.0, 3.0)
    expected = [math.radians(15), math.radians(30), math.log(1.5)]
    assert delta_view(a, b)[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert delta_view(b, a)[0].tolist() == pytest.approx([-v for v in expected], abs=1e-6)
    assert delta_view(a, a).abs().max() == 0
    # Opposite views are pi apart whichever way one goes, never minus pi.
    assert delta_view(one_camera(0, 0, 1), one_camera(0, 180, 1))[0, 1] > 3.1415
    assert delta_view(one_camera(0, 180, 1), one_camera(0, 0, 1))[0, 1] > 3.1415


def test_cameras_stand_where_their_angles_say_and_look_at_the_origin():
    cameras = orbit_cameras([0.0, 30.0], [0.0, 90.0], 2.0, 60.0)
    assert len(cameras) == 4 and cameras.elevation.tolist() == [0, 0, 30, 30]
    assert cameras.azimuth.tolist() == [0, 90, 0, 90]
    expected = torch.tensor([[2, 0, 0], [0, 2, 0], [3**0.5, 0, 1], [0, 3**0.5, 1]])
    assert torch.allclose(cameras.c2w[:, :3, 3], expected, atol=1e-6)
    backward = cameras.c2w[:, :3, 2] * 2.0
    assert torch.allclose(backward, cameras.c2w[:, :3, 3], atol=1e-6)
    assert cameras.fovy.tolist() == pytest.approx([math.pi / 3] * 4)
    some = cameras.select(torch.tensor([3, 3, 0]))
    assert some["azimuth"].tolist() == [90, 90, 0] and some["c2w"].shape == (3, 4, 4)


def test_gaps_take_the_larger_angle_and_the_short_way():
    cameras = orbit_cameras([0.0, 30.0], [0.0, 10.0, 350.0], 2.0, 60.0)
    gaps = view_gaps_deg(cameras)
    assert torch.equal(gaps, gaps.T) and gaps.diagonal().abs().max() == 0
    assert gaps[1, 2] == 20 and gaps[0, 1] == 10
    assert gaps[0, 3] == 30 and gaps[1, 5] == 30


def test_times_leave_the_end_out_unless_asked():
    assert scene_times(4, False).tolist() == [0, 0.25, 0.5, 0.75]
    assert scene_times(5, True).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert scene_times(1, True).tolist() == [0]


def test_a_cell_is_rounded_not_cut():
    colour = torch.tensor([[[0.5, 1.2, 0.0]]])
    assert cell_bytes(colour, torch.tensor([[[254.6 / 255]]])).tolist() == [[[128, 255, 0, 255]]]


def test_memory_forgets_what_was_unused_for_longest_and_stays_in_its_bounds():
    source = CountedCells()
    memory = CellMemory(2 * source.cell_nbytes)
    for place in ((0, 0), (1, 0), (0, 0), (2, 0), (0, 0), (1, 0)):
        assert int(memory.read(source, *place)[0, 0, 0]) == 10 * place[0]
        assert memory.nbytes == len(memory) * source.cell_nbytes <= memory.max_bytes
    # (1, 0) went when (2, 0) came, since (0, 0) had been asked for again.
    assert source.reads == [(0, 0), (1, 0), (2, 0), (1, 0)]


def test_memory_keeps_scenes_apart_and_none_where_it_may_not():
    one, other = CountedCells("one"), CountedCells("other")
    memory = CellMemory(10**6)
    memory.read(one, 0, 0), memory.read(other, 0, 0), memory.read(one, 0, 0)
    assert len(one.reads) == len(other.reads) == 1
    assert one.cell_nbytes == 4 * 5 * 4 and memory.nbytes == 160
    nothing = CellMemory(one.cell_nbytes - 1)
    nothing.read(one, 3, 0), nothing.read(one, 3, 0)
    assert one.reads[1:] == [(3, 0), (3, 0)] and nothing.nbytes == len(nothing) == 0


def test_what_costs_nothing_is_not_remembered():
    source = CountedCells()
    source.is_slow = False
    memory = CellMemory(10**6)
    memory.read(source, 1, 1), memory.read(source, 1, 1)
    assert len(source.reads) == 2 and len(memory) == 0


def test_a_source_has_no_latents_unless_it_says_so():
    source = CountedCells()
    assert source.read_latents(0, 0) is None and source.read_features(0, 0) is None
    assert not source.is_prepared
    source.prepare()
    assert source.is_prepared
