"""Grids on disk: the bytes of their source, resumed after a stop, mapped, never overwritten."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from custom.fourd.data.grid_cells import FRAMES, PART, RECORD, GridCells, is_grid, write_grid
from custom.fourd.data.pair_cells import CellSource, orbit_cameras, scene_times

ORIGIN = {"kind": "numbers"}


class Numbers(CellSource):
    """Cells of noise; may stop with an error before some time."""

    def __init__(self, n_times=3, n_cameras=2, size=(5, 4), stop_at=None):
        cameras = orbit_cameras([10.0], [30.0 * k for k in range(n_cameras)], 3.0, 40.0)
        super().__init__("noise", "some noise", scene_times(n_times, False), cameras, *size)
        self.stop_at, self.reads = stop_at, []

    def read_cell(self, time_id, camera_id):
        if time_id == self.stop_at:
            raise KeyboardInterrupt
        self.reads.append(time_id)
        stream = torch.Generator().manual_seed(100 * time_id + camera_id)
        cell = torch.randint(256, (self.height, self.width, 4), generator=stream)
        return cell.to(torch.uint8)


def test_a_grid_gives_back_every_byte_and_its_places(tmp_path):
    source, done = Numbers(), []
    write_grid(tmp_path / "g", source, ORIGIN, lambda *counts: done.append(counts))
    grid = GridCells(tmp_path / "g", 5, 4)
    for time_id in range(3):
        for camera_id in range(2):
            cell = grid.read_cell(time_id, camera_id)
            assert torch.equal(cell, source.read_cell(time_id, camera_id))
    assert (grid.scene_id, grid.caption) == ("noise", "some noise")
    assert torch.equal(grid.frame_times, source.frame_times)
    for name, values in vars(source.cameras).items():
        assert torch.equal(getattr(grid.cameras, name), values)
    assert done == [(1, 3), (2, 3), (3, 3)] and not (tmp_path / "g" / PART).exists()
    frames = np.load(tmp_path / "g" / FRAMES)
    assert grid.record["frames_sha256"] == hashlib.sha256(frames.tobytes()).hexdigest()
    assert isinstance(grid._cells, np.memmap) and not grid.is_slow


def test_a_stopped_grid_goes_on_where_it_stopped(tmp_path):
    folder = tmp_path / "g"
    with pytest.raises(KeyboardInterrupt):
        write_grid(folder, Numbers(stop_at=2), ORIGIN)
    assert is_grid(folder) and not (folder / FRAMES).exists()
    with pytest.raises(ValueError, match="holds 2 of 3 times; run render_grid with the same"):
        GridCells(folder, 5, 4)
    rest = Numbers()
    write_grid(folder, rest, ORIGIN)
    assert set(rest.reads) == {2}
    write_grid(tmp_path / "whole", Numbers(), ORIGIN)
    assert np.array_equal(np.load(folder / FRAMES), np.load(tmp_path / "whole" / FRAMES))
    assert (folder / RECORD).read_text() == (tmp_path / "whole" / RECORD).read_text()


def test_a_stop_between_the_last_two_files_loses_nothing(tmp_path):
    folder = tmp_path / "g"
    write_grid(folder, Numbers(), ORIGIN)
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, "complete": False}))
    again = Numbers()
    write_grid(folder, again, ORIGIN)
    assert again.reads == [] and GridCells(folder, 5, 4).record == record


def test_a_finished_grid_is_left_as_it_is(tmp_path):
    write_grid(tmp_path, Numbers(), ORIGIN)
    before = (tmp_path / FRAMES).stat().st_mtime_ns
    again = Numbers()
    write_grid(tmp_path, again, ORIGIN)
    assert again.reads == [] and (tmp_path / FRAMES).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "source, origin, key",
    [
        (Numbers(n_times=4), ORIGIN, "frame_times"),
        (Numbers(n_cameras=3), ORIGIN, "cameras"),
        (Numbers(size=(5, 6)), ORIGIN, "width"),
        (Numbers(), {"kind": "numbers", "sha256": "another"}, "origin"),
    ],
)
def test_another_grid_is_not_overwritten(tmp_path, source, origin, key):
    write_grid(tmp_path, Numbers(), ORIGIN)
    before = (tmp_path / FRAMES).read_bytes()
    with pytest.raises(ValueError, match=f"holds another grid: its {key} differs"):
        write_grid(tmp_path, source, origin)
    assert (tmp_path / FRAMES).read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds thesis.txt and no grid.json; expected a new or"):
        write_grid(tmp_path, Numbers(), ORIGIN)
    with pytest.raises(ValueError, match="holds no grid.json; expected a folder of render_grid"):
        GridCells(tmp_path, 5, 4)


def test_what_does_not_fit_is_refused(tmp_path):
    write_grid(tmp_path, Numbers(), ORIGIN)
    with pytest.raises(ValueError, match=r"images of 5 x 4 pixels .* asks for 8 x 8"):
        GridCells(tmp_path, 8, 8)
    np.save(tmp_path / FRAMES, np.zeros((3, 2, 5, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"uint8 of shape \(3, 2, 5, 4, 3\); expected bytes"):
        GridCells(tmp_path, 5, 4)
    record = json.loads((tmp_path / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps({**record, "format": "older"}))
    with pytest.raises(
        ValueError, match="has the format 'older'; expected 'threestudio-4d grid 1'"
    ):
        GridCells(tmp_path, 5, 4)
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(ValueError, match="is no whole JSON file"):
        GridCells(tmp_path, 5, 4)


def test_cached_rows_come_with_their_cells(tmp_path):
    write_grid(tmp_path, Numbers(), ORIGIN)
    grid = GridCells(tmp_path, 5, 4)
    assert grid.read_latents(0, 0) is None and grid.read_features(0, 0) is None
    rows = np.arange(3 * 2 * 4, dtype=np.float16).reshape(3, 2, 4)
    grid.use_caches(rows, rows[..., :1] + 100)
    assert grid.read_latents(1, 1).tolist() == [12, 13, 14, 15]
    assert (
        grid.read_features(2, 0).tolist() == [116]
        and grid.read_features(0, 0).dtype.is_floating_point
    )


def anonymous_bytes():
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if "Anonymous" in line)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells this")
def test_a_large_grid_takes_no_memory_of_its_own(tmp_path):
    """96 MiB of frames (a file of holes) are read whole, and none of it stays."""
    source = Numbers(n_times=24, n_cameras=16, size=(256, 256))
    source.read_cell = lambda time_id, camera_id: torch.zeros(256, 256, 4, dtype=torch.uint8)
    write_grid(tmp_path / "g", source, ORIGIN)
    grid = GridCells(tmp_path / "g", 256, 256)
    grid.read_cell(0, 0)
    before = anonymous_bytes()
    for time_id in range(24):
        for camera_id in range(16):
            grid.read_cell(time_id, camera_id)
    assert anonymous_bytes() - before < 8 * 2**20
