"""Frames out of videos and folders: order, literal lists, cut files, sizes."""

import numpy as np
import pytest
import torch
from PIL import Image

from custom.fourd.data.video_frames import (
    FrameSource,
    decode_timed,
    decode_video,
    downsampled_size,
    list_pictures,
    list_videos,
    natural_order,
    over_background,
    parse_frame_list,
    read_frames,
    read_picture,
    resize_frame,
)
from custom.fourd.world.writers import write_mp4
from tests.fixtures.video_files import grey_frames, write_h264


def numbered(count, height=32, width=48):
    """Frames whose grey says which they are: 10, 20, ..."""
    grey = 10 * (torch.arange(count, dtype=torch.uint8) + 1)
    return grey.view(-1, 1, 1, 1).expand(count, height, width, 3).contiguous()


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "cam00.mp4"
    write_mp4(path, numbered(12))
    return path


def test_digits_sort_as_numbers(tmp_path):
    for name in ("10.png", "2.png", "1.PNG", ".hidden.png", "notes.txt"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="png")
    assert [path.name for path in list_pictures(tmp_path)] == ["1.PNG", "2.png", "10.png"]
    names = ["cam10.mp4", "cam2.mp4", "cam2b.mp4", "a.mp4"]
    assert sorted(names, key=natural_order) == ["a.mp4", "cam2.mp4", "cam2b.mp4", "cam10.mp4"]
    assert list_videos(tmp_path) == []


@pytest.mark.parametrize(
    "value, expected",
    [
        (None, list(range(8))),
        (3, [0, 1, 2]),
        ([0, 5, 7], [0, 5, 7]),
        ("[0, 5, 7]", [0, 5, 7]),
        ("(1, 2)", [1, 2]),
        ("4", [0, 1, 2, 3]),
        ("2:6", [2, 3, 4, 5]),
        (":4:2", [0, 2]),
        ("5:", [5, 6, 7]),
        ("range(3)", [0, 1, 2]),
        ("range(2, 8, 3)", [2, 5]),
    ],
)
def test_frame_lists_are_read(value, expected):
    assert parse_frame_list(value, 8, "data.frame_list") == expected


@pytest.mark.parametrize(
    "value, message",
    [
        ("__import__('os').getcwd()", "data.frame_list is .*; expected a list such as"),
        ("list(range(3))", "expected a list such as"),
        ([0, 8], "asks for frame 8; the video has 8 frames, 0 to 7"),
        (9, "asks for frame 8"),
        ([-1], "asks for frame -1"),
        ([], "expected whole numbers, at least one"),
        ("6:2", "expected whole numbers, at least one"),
        ([0, 1.5], "expected whole numbers"),
        ([3, 1], "names frame 1 after a later one or twice"),
        ([2, 2], "names frame 2 after a later one or twice"),
    ],
)
def test_other_frame_lists_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        parse_frame_list(value, 8, "data.frame_list")


def test_a_video_is_decoded_in_order(video):
    source = FrameSource(video)
    assert (source.name, source.n_frames, source.first_size()) == ("cam00", 12, (32, 48))
    means = [float(frame.mean()) for frame in decode_video(video)]
    assert means == pytest.approx([10.0 * (i + 1) for i in range(12)], abs=1.5)
    some = read_frames(source, [1, 4, 11], 16, 24)
    assert some.shape == (3, 16, 24, 3) and some.dtype == torch.uint8
    assert some.float().mean(dim=(1, 2, 3)).tolist() == pytest.approx([20, 50, 120], abs=1.5)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_a_cut_video_is_refused(video, tmp_path, share):
    cut = tmp_path / "cut.mp4"
    content = video.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cut\.mp4 is cut: it has \d+ bytes, and its boxes go on"):
        FrameSource(cut)
    with pytest.raises(ValueError, match=r"cut\.mp4 is no whole video: decoding stopped after"):
        list(decode_video(cut))


def test_a_video_that_lists_more_frames_than_come_out_is_refused(video, monkeypatch):
    """A container whose index survived but whose last packets were lost."""
    import av

    real = av.container.InputContainer.decode

    class Cut:
        def __init__(self, container):
            self._container = container

        def __getattr__(self, name):
            return getattr(self._container, name)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self._container.close()

        def decode(self, stream):
            for index, frame in enumerate(real(self._container, stream)):
                if index == 9:
                    return
                yield frame

    open_real = av.open
    monkeypatch.setattr(av, "open", lambda path: Cut(open_real(path)))
    with pytest.raises(ValueError, match=r"cam00.mp4 is cut: 9 of its 12 frames can be decoded"):
        list(decode_video(video))


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="text.mp4 is no whole video"):
        FrameSource(tmp_path / "text.mp4")
    with pytest.raises(ValueError, match="gone.mp4 is missing; expected a video or a folder"):
        FrameSource(tmp_path / "gone.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no picture"):
        FrameSource(tmp_path / "empty")


def test_a_phone_s_upright_video_is_turned(tmp_path):
    """The display matrix of the track header says a quarter turn clockwise: top goes right."""
    frames = torch.zeros(2, 32, 48, 3, dtype=torch.uint8)
    frames[:, :16] = 255
    path = tmp_path / "phone.mp4"
    write_mp4(path, frames)
    content = bytearray(path.read_bytes())
    one = 0x10000
    identity = b"".join(v.to_bytes(4, "big") for v in (one, 0, 0, 0, one, 0, 0, 0, 0x40000000))
    turned = (0, one, 0, 2**32 - one, 0, 0, 0, 0, 0x40000000)
    start = content.index(identity, content.index(b"tkhd"))
    content[start : start + 36] = b"".join(value.to_bytes(4, "big") for value in turned)
    path.write_bytes(content)
    frame = next(decode_video(path))
    assert frame.shape == (48, 32, 3)
    assert frame[:, 18:].min() > 200 and frame[:, :14].max() < 55


def save(folder, sizes):
    folder.mkdir()
    for index, size in enumerate(sizes):
        Image.new("RGB", size, (index, 0, 0)).save(folder / f"{index}.png")
    return folder


def test_frames_of_one_camera_have_one_size(tmp_path):
    folder = save(tmp_path / "cam03", [(6, 4), (6, 4), (5, 4)])
    source = FrameSource(folder)
    assert source.name == "cam03" and source.n_frames == 3
    assert read_frames(source, [0, 1], 4, 6)[:, 0, 0, 0].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"2.png is 5 x 4 pixels; expected 6 x 4 like the first"):
        read_frames(source, [0, 1, 2], 4, 6)


def test_a_cut_picture_is_refused(tmp_path):
    path = tmp_path / "1.png"
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"1.png is no whole picture"):
        read_picture(path)
    with pytest.raises(ValueError, match="2.png is missing; expected a picture"):
        read_picture(tmp_path / "2.png")


def test_alpha_is_laid_over_the_background(tmp_path):
    picture = np.zeros((1, 2, 4), dtype=np.uint8)
    picture[0, 0], picture[0, 1] = (200, 100, 0, 255), (200, 100, 0, 51)
    Image.fromarray(picture).save(tmp_path / "a.png")
    over = over_background(read_picture(tmp_path / "a.png"), (1.0, 1.0, 1.0))
    # A fifth of the colour and four fifths of white.
    assert over[0].tolist() == [[200, 100, 0], [244, 224, 204]]


def test_sizes_are_cut_to_whole_pixels_as_in_releases():
    assert downsampled_size(2028, 2704, 2) == (1014, 1352)
    assert downsampled_size(2028, 2704, 4) == (507, 676)
    assert downsampled_size(5, 7, 2) == (2, 3)
    with pytest.raises(ValueError, match="downsample is 8 for frames of 5 x 7; expected at least"):
        downsampled_size(5, 7, 8)
    with pytest.raises(ValueError, match="downsample is 0.5"):
        downsampled_size(5, 7, 0.5)


def test_shrinking_averages_instead_of_picking():
    """A checkerboard of single pixels is grey at half the size."""
    board = 255 * (np.indices((16, 16)).sum(axis=0) % 2).astype(np.uint8)
    small = resize_frame(np.repeat(board[..., None], 3, axis=-1), 8, 8)
    assert abs(small[2:-2, 2:-2].astype(int) - 127).max() < 6


def test_frames_come_with_the_second_at_which_they_are_shown(tmp_path):
    seconds = [0.0, 0.04, 0.5, 0.52]
    path = write_h264(tmp_path / "uneven.mp4", grey_frames(4), seconds)
    timed = list(decode_timed(path))
    assert [second for second, _ in timed] == pytest.approx(seconds, abs=2e-3)
    left = [float(frame[:, :13].mean()) for _, frame in timed]
    assert left == pytest.approx([10, 20, 30, 40], abs=1.5)
