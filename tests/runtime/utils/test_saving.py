import json
import os
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from threestudio.utils.checkpoint import load_checkpoint
from threestudio.utils.saving import SaverMixin, replacing


@pytest.fixture
def saver(tmp_path):
    made = SaverMixin()
    made.set_save_dir(tmp_path / "save")
    return made


def test_the_folder_must_be_set(tmp_path):
    with pytest.raises(ValueError, match=r"the save folder is not set; .*configure\(\) must not"):
        SaverMixin().save_json("a.json", {})
    saver = SaverMixin()
    saver.set_save_dir(tmp_path)
    assert saver.get_save_dir() == str(tmp_path)
    assert saver.get_save_path("a/b.png") == str(tmp_path / "a" / "b.png")
    assert (tmp_path / "a").is_dir()


def test_pictures_keep_their_colours(saver):
    img = torch.zeros(4, 6, 3)
    img[..., 0] = 1.0  # red, to notice a swap of channels
    path = saver.save_rgb_image("x/red.png", img)
    assert iio.imread(path)[0, 0].tolist() == [255, 0, 0]
    assert path == os.path.join(saver.get_save_dir(), "x/red.png")
    rgba = saver.save_rgb_image("rgba.png", torch.cat([img, torch.full((4, 6, 1), 0.5)], -1))
    assert iio.imread(rgba)[0, 0].tolist() == [255, 0, 0, 127]
    deep = saver.save_image("deep.png", np.full((2, 2), 40000, np.uint16))
    assert iio.imread(deep).max() == 40000


def test_every_picture_kind_is_written(saver):
    for path in (
        saver.save_grayscale_image("gray.png", torch.rand(4, 4)),
        saver.save_uv_image("uv.png", torch.rand(4, 4, 2)),
        saver.save_image_grid("grid.jpg", [{"type": "rgb", "img": torch.rand(4, 4, 3)}], step=3,
                              name="validation"),
        saver.save_cubemap("cube.png", [torch.full((2, 2, 3), i / 10) for i in range(6)]),
    ):
        assert iio.imread(path).ndim == 3
    cube = iio.imread(os.path.join(saver.get_save_dir(), "cube.png"))
    assert cube.shape == (6, 8, 3)
    assert cube[2, :, 0].tolist() == [25, 25, 102, 102, 0, 0, 127, 127]  # -x, +z, +x, -z
    assert cube[0, 2, 0] == 51 and cube[5, 2, 0] == 76  # +y above, -y below


def test_bad_pictures(saver):
    with pytest.raises(ValueError, match=r"type float64; expected uint8 or uint16"):
        saver.save_image("a.png", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"has no known picture suffix"):
        saver.save_rgb_image("a.xyz", torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match=r"cubemap has 5 faces; expected 6"):
        saver.save_cubemap("a.png", [torch.zeros(2, 2, 3)] * 5)


@pytest.fixture
def frames(saver):
    # Written out of order, with two digits, so that sorting by name would be wrong.
    for index in (10, 2, 0, 1):
        saver.save_rgb_image(f"f/{index}.png", torch.full((15, 21, 3), index / 10))
    Path(saver.get_save_dir(), "f", ".99-3.png").write_bytes(b"half a picture")
    return saver


@pytest.mark.parametrize("save_format", ["mp4", "gif"])
def test_sequences_are_ordered_by_number(frames, save_format):
    path = frames.save_img_sequence("turn", "f", r"(\d+)\.png", save_format=save_format, fps=5)
    assert path.endswith(f"turn.{save_format}")
    read = iio.imread(path, plugin="pyav" if save_format == "mp4" else "pillow")
    # H.264 takes even sizes only: the last row and column are repeated.
    assert read.shape[:3] == ((4, 16, 22) if save_format == "mp4" else (4, 15, 21))
    levels = read.reshape(4, -1).mean(1) / 255
    assert levels == pytest.approx([0.0, 0.1, 0.2, 1.0], abs=0.03)


def test_video_has_its_rate_and_duration(frames):
    path = frames.save_img_sequence("turn.mp4", "f", r"(\d+)\.png", fps=2)
    meta = iio.immeta(path, plugin="pyav")
    assert meta["fps"] == pytest.approx(2) and meta["duration"] == pytest.approx(2.0, abs=0.3)
    assert meta["codec"] == "h264"


def test_bad_sequences(frames):
    with pytest.raises(ValueError, match=r"save_format is 'avi'; expected 'mp4' or 'gif'"):
        frames.save_img_sequence("a", "f", r"(\d+)\.png", save_format="avi")
    with pytest.raises(ValueError, match=r"no picture in .*f matches 'x\(\\d\+\)'"):
        frames.save_img_sequence("a", "f", r"x(\d+)")
    with pytest.raises(ValueError, match=r"no picture in .*nowhere"):
        frames.save_img_sequence("a", "nowhere", r"(\d+)\.png")
    Path(frames.get_save_dir(), "f", "5.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"5\.png is not a readable picture"):
        frames.save_img_sequence("a", "f", r"(\d+)\.png")
    assert not list(Path(frames.get_save_dir()).glob("*a.mp4"))


def test_data_files(saver, tmp_path):
    assert np.load(saver.save_data("d", {"a": torch.ones(2)}))["a"].tolist() == [1, 1]
    assert np.load(saver.save_data("e.npy", torch.ones(3))).sum() == 3
    path = saver.save_json("j.json", {"t": torch.ones(2), "n": np.float32(0.5), "p": Path("x")})
    assert json.loads(Path(path).read_text()) == {"t": [1.0, 1.0], "n": 0.5, "p": "x"}
    state = saver.save_state_dict("s.ckpt", {"a": torch.ones(1)})
    assert load_checkpoint(state)["a"].item() == 1
    (tmp_path / "source.txt").write_text("hello")
    assert Path(saver.save_file("copy.txt", tmp_path / "source.txt")).read_text() == "hello"


def test_nothing_half_written_is_ever_visible(saver, tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError):
        with replacing(target) as temporary:
            Path(temporary).write_text("half")
            assert target.read_text() == "old"
            raise RuntimeError
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_only_rank_0_writes(frames, monkeypatch):
    before = sorted(Path(frames.get_save_dir()).rglob("*"))
    monkeypatch.setenv("RANK", "1")
    paths = [
        frames.save_rgb_image("rank.png", torch.rand(4, 4, 3)),
        frames.save_json("a/rank.json", {}),
        frames.save_state_dict("rank.ckpt", {}),
        frames.save_img_sequence("rank", "absent", r"(\d+)\.png"),
    ]
    assert [Path(path).name for path in paths] == ["rank.png", "rank.json", "rank.ckpt", "rank.mp4"]
    assert sorted(Path(frames.get_save_dir()).rglob("*")) == before


def test_faults_reach_the_hook(saver, tmp_path):
    (tmp_path / "save").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        saver.save_json("a.json", {})
    seen = []
    saver.on_save_fault = lambda path, error: seen.append((path, type(error)))
    saver.save_rgb_image("a.png", torch.zeros(2, 2, 3))
    assert seen == [(str(tmp_path / "save" / "a.png"), FileExistsError)] or issubclass(
        seen[0][1], OSError)


def test_trackers_never_stop_a_run(saver, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what import makes of an absent module
    for cfg in ({}, None, {"wandb": {"enable": False}}, {"wandb": {"enable": True}}):
        saver.create_loggers(cfg)
        assert saver.get_loggers() == [] and caplog.text == ""
    saver.start_loggers(tmp_path)
    assert saver.get_loggers() == [] and caplog.text.count("wandb is left out") == 1

    class Broken:
        @property
        def experiment(self):
            raise ConnectionError("no network")

    saver._wandb_logger = Broken()
    for step in range(2):
        saver.save_rgb_image("a.png", torch.zeros(2, 2, 3), name="x", step=step)
    saver.save_rgb_image("b.png", torch.zeros(2, 2, 3))
    assert caplog.text.count("Broken stops logging: ") == 1
    saver.finish_loggers()
    assert saver.get_loggers() == []
