"""Videos and pictures as cells: odd sizes, turned, uneven in time, cut short."""

import numpy as np
import pytest
import torch
from PIL import Image

from custom.fourd.data.pair_cells import orbit_cameras
from custom.fourd.data.video_cells import VideoCells, fitted_cell, new_store, shown_times
from tests.fixtures.video_files import cut, grey_frames, turn_clockwise, write_h264

CAMERA = orbit_cameras([10.0], [0.0], 3.0, 40.0)


def opened(path, height=20, width=30, **keys):
    source = VideoCells(path, "clip", CAMERA, height, width, **keys)
    source.prepare()
    return source


def left_greys(source):
    width = source.width
    cells = [source.read_cell(k, 0) for k in range(len(source.frame_times))]
    return [float(cell[:, : width // 2 - 2, :3].float().mean()) for cell in cells]


def test_frames_come_in_order_opaque_and_evenly_timed(tmp_path):
    source = opened(write_h264(tmp_path / "a.mp4", grey_frames(5)))
    assert left_greys(source) == pytest.approx([10, 20, 30, 40, 50], abs=1.5)
    assert source.frame_times.tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    cell = source.read_cell(2, 0)
    assert cell.shape == (20, 30, 4) and bool((cell[..., 3] == 255).all())
    assert len(source.cameras) == 1 and not source.is_slow


@pytest.mark.parametrize("size", [(21, 31), (17, 20), (20, 33)])
def test_odd_sizes_are_read_whole(tmp_path, size):
    frames = grey_frames(2, *size)
    frames[0][-1], frames[0][:, -1] = (255, 0, 0), (0, 0, 255)
    source = opened(write_h264(tmp_path / "odd.mp4", frames), *size)
    cell = source.read_cell(0, 0).float()
    assert cell[-1, 3, 0] - cell[-1, 3, 2] > 150  # the last row is red
    assert cell[3, -1, 2] - cell[3, -1, 0] > 150  # the last column blue


def test_a_phone_s_turned_video_stands_upright(tmp_path):
    """Left in the file is up on the screen after a quarter turn clockwise."""
    path = turn_clockwise(write_h264(tmp_path / "phone.mp4", grey_frames(2)))
    cell = opened(path, 30, 20).read_cell(1, 0).float()
    assert cell[:13, :, :3].mean() < 30 and cell[17:, :, :3].mean() > 240


def test_times_of_a_variable_rate_are_those_of_the_frames(tmp_path):
    seconds = [0.0, 0.04, 0.4, 0.44, 1.0]
    path = write_h264(tmp_path / "uneven.mp4", grey_frames(5), seconds)
    assert opened(path).frame_times.tolist() == pytest.approx(seconds, abs=2e-3)
    # Of chosen frames the first is at 0 and the last at 1.
    some = opened(path, frames="[1, 2, 3]")
    assert some.frame_times.tolist() == pytest.approx([0, 0.9, 1], abs=5e-3)
    assert left_greys(some) == pytest.approx([20, 30, 40], abs=1.5)


@pytest.mark.parametrize("share", [0.3, 0.97])
def test_a_cut_video_is_refused_at_once(tmp_path, share):
    path = cut(write_h264(tmp_path / "cut.mp4", grey_frames(12)), share)
    with pytest.raises(ValueError, match=r"cut\.mp4 is (cut|no whole video)"):
        VideoCells(path, "clip", CAMERA, 20, 30)


def test_a_video_whose_packets_are_lost_is_refused_when_it_is_read(tmp_path):
    """The index is whole and so are the boxes, but a stretch of the pictures is gone."""
    path = write_h264(tmp_path / "torn.mp4", grey_frames(12))
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    middle = start + (len(content) - start) // 3
    content[start + 40 : middle] = bytes(middle - start - 40)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"torn\.mp4 is (cut|no whole video)"):
        opened(path)


def test_frames_that_are_not_there_are_refused_before_anything_is_read(tmp_path):
    path = write_h264(tmp_path / "a.mp4", grey_frames(3))
    with pytest.raises(ValueError, match=r"frames of .*a\.mp4 asks for frame 7; the video has 3"):
        VideoCells(path, "clip", CAMERA, 20, 30, frames=[0, 7])


def test_a_container_that_does_not_count_its_frames_is_counted(tmp_path):
    source = opened(write_h264(tmp_path / "a.mkv", grey_frames(4)))
    assert source._n_frames == 0 and len(source.frame_times) == 4
    assert left_greys(source) == pytest.approx([10, 20, 30, 40], abs=1.5)


def test_pictures_keep_their_alpha(tmp_path):
    for place, alpha in enumerate((255, 102)):
        picture = np.full((6, 6, 4), (200, 100, 0, alpha), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{place}.png")
    source = opened(tmp_path, 6, 6)
    assert source.frame_times.tolist() == [0, 1]
    assert source.read_cell(0, 0)[0, 0].tolist() == [200, 100, 0, 255]
    assert source.read_cell(1, 0)[0, 0].tolist() == [80, 40, 0, 102]


def test_one_picture_is_a_scene_of_one_cell(tmp_path):
    Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(tmp_path / "one.png")
    source = opened(tmp_path / "one.png", 4, 4)
    assert source.frame_times.tolist() == [0] and source.read_cell(0, 0)[0, 0, 0] == 7


def test_pictures_of_two_sizes_are_refused(tmp_path):
    for place, side in enumerate((6, 7)):
        Image.fromarray(np.zeros((side, 6, 3), np.uint8)).save(tmp_path / f"{place}.png")
    with pytest.raises(ValueError, match="frame 1 of .* is 6 x 7 pixels; expected 6 x 6"):
        opened(tmp_path, 6, 6)


def test_a_crop_keeps_the_middle_and_a_padding_the_whole():
    picture = np.zeros((4, 12, 3), dtype=np.uint8)
    picture[:, 4:8] = 200
    cropped = fitted_cell(picture, 4, 4, "crop")
    assert (cropped[..., :3] == 200).all() and (cropped[..., 3] == 255).all()
    padded = fitted_cell(picture, 12, 12, "pad")
    assert np.array_equal(padded[4:8, :, :3], picture)
    assert (padded[4:8, :, 3] == 255).all() and padded[:4].max() == padded[8:].max() == 0


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_the_aspect_is_kept(fit):
    """A disc stays a disc: its width and height, counted in pixels, agree."""
    rows, columns = np.mgrid[:60, :90]
    disc = 255 * ((rows - 29.5) ** 2 + (columns - 44.5) ** 2 < 20**2)
    cell = fitted_cell(np.repeat(disc[..., None].astype(np.uint8), 3, -1), 30, 30, fit)
    inside = cell[..., 0] > 127
    wide, high = inside.any(0).sum(), inside.any(1).sum()
    assert abs(int(wide) - int(high)) <= 1
    assert high == pytest.approx(20 if fit == "crop" else 40 / 3, abs=1)


def test_long_videos_lie_in_a_file_and_not_in_memory(tmp_path):
    path = write_h264(tmp_path / "a.mp4", grey_frames(5))
    small, large = opened(path, max_bytes=5 * 20 * 30 * 4), opened(path, max_bytes=100)
    assert isinstance(large._cells, np.memmap) and not isinstance(small._cells, np.memmap)
    assert all(torch.equal(small.read_cell(k, 0), large.read_cell(k, 0)) for k in range(5))
    assert new_store((2, 2), 4).shape == (2, 2)


@pytest.mark.parametrize("seconds", [[0.0, None, 1.0], [0.0, 2.0, 1.0], [1.0, 1.0, 2.0]])
def test_times_that_do_not_grow_or_are_missing_become_even(seconds):
    assert shown_times(seconds).tolist() == [0, 0.5, 1]


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gone.mp4 is missing"):
        VideoCells(tmp_path / "gone.mp4", "clip", CAMERA, 4, 4)
