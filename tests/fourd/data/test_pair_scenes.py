"""What a config lists under scenes, by text and by mapping, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from custom.fourd.data.fourd_pair_datamodule import FourdPairDataModuleConfig
from custom.fourd.data.grid_cells import GridCells, write_grid
from custom.fourd.data.pair_scenes import grid_cameras, open_scenes
from custom.fourd.data.scene_cells import SceneCells
from custom.fourd.data.video_cells import VideoCells
from custom.fourd.data.world_cells import WorldCells
from tests.fixtures.tiny_scenes import random_scene
from tests.fixtures.video_files import grey_frames, write_h264

CUBE = "a red cube spinning"


def config(**keys):
    return FourdPairDataModuleConfig(height=8, width=8, **{"n_times": 4, "n_azimuths": 4, **keys})


def opened(*entries, **keys):
    return open_scenes(list(entries), config(**keys))


@pytest.fixture
def files(tmp_path):
    """One of each kind."""
    write_h264(tmp_path / "clip.mp4", grey_frames(6, 8, 8))
    (tmp_path / "shots").mkdir()
    for place in range(3):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "shots" / f"{place}.png")
    random_scene().save(tmp_path / "ball.safetensors")
    write_grid(tmp_path / "grid", opened(CUBE)[0], {"kind": "world"})
    return SimpleNamespace(
        video=str(tmp_path / "clip.mp4"), pictures=str(tmp_path / "shots"),
        picture=str(tmp_path / "shots" / "0.png"), scene=str(tmp_path / "ball.safetensors"),
        grid=str(tmp_path / "grid"),
    )  # fmt: skip


def test_a_text_is_what_lies_there_or_else_a_caption(files):
    sources = opened(CUBE, files.video, files.pictures, files.picture, files.scene, files.grid)
    kinds = [type(source) for source in sources]
    assert kinds == [WorldCells, VideoCells, VideoCells, VideoCells, SceneCells, GridCells]
    names = [source.scene_id for source in sources]
    assert names == [CUBE, "clip", "shots", "0", "ball", f"{CUBE}-2"]
    assert [source.caption for source in sources] == [CUBE, "", "", "", "", CUBE]


def test_a_mapping_says_what_it_is_and_adds_words_and_a_name(files):
    sources = opened(
        {"world": CUBE, "caption": "a toy", "scene_id": "toy"},
        {"video": files.video, "caption": "a wall", "frames": "1:4"},
        {"checkpoint": files.scene, "scene_id": "mine"},
        {"grid": files.grid, "caption": "another toy"},
    )
    names = [(source.scene_id, source.caption) for source in sources]
    assert names == [("toy", "a toy"), ("clip", "a wall"), ("mine", ""), (CUBE, "another toy")]
    sources[1].prepare()
    assert len(sources[1].frame_times) == 3


def test_a_single_entry_needs_no_list():
    assert [s.scene_id for s in open_scenes(CUBE, config())] == [CUBE]
    assert [s.scene_id for s in open_scenes({"world": CUBE}, config())] == [CUBE]


def test_equal_names_are_told_apart_unless_they_were_given():
    names = [source.scene_id for source in opened(CUBE, CUBE, CUBE)]
    assert names == [CUBE, f"{CUBE}-2", f"{CUBE}-3"]
    with pytest.raises(ValueError, match="names the scene_id 'one' twice"):
        opened({"world": CUBE, "scene_id": "one"}, {"world": CUBE, "scene_id": "one"})


def test_a_checkpoint_of_a_run_is_called_as_the_run(tmp_path):
    folder = tmp_path / "my run" / "ckpts"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(b"checked when it is loaded")
    assert opened(str(folder / "last.ckpt"))[0].scene_id == "my run"


def test_cameras_and_times_are_those_of_the_config():
    (source,) = opened(CUBE, elevations_deg=[0.0, 30.0], camera_distance=2.5, n_times=5)
    assert source.cameras.azimuth.tolist() == [0, 90, 180, 270] * 2
    assert source.cameras.radius.tolist() == [2.5] * 8 and len(source.frame_times) == 5
    assert (source.height, source.width) == (8, 8)
    assert len(grid_cameras(config(elevations_deg=20.0))) == 4


@pytest.mark.parametrize(
    "entry, message",
    [
        ("a red zebra", r"scenes\[0\] is 'a red zebra', which is no caption of the world, and"),
        ("gone/last.ckpt", "is no caption of the world, and there is no such file"),
        ({"world": "a red zebra"}, "'zebra' in 'a red zebra' is not a word"),
        ({"checkpoint": "gone.ckpt"}, "names the checkpoint 'gone.ckpt', which does not exist"),
        ({"film": "a.mp4"}, r"scenes\[0\] has the key 'film'; expected one of world, checkpoint"),
        ({"caption": "words"}, r"scenes\[0\] has 0 sources"),
        ({"world": CUBE, "video": "a.mp4"}, r"scenes\[0\] has 2 sources"),
        ({"world": CUBE, "frames": 3}, "has frames, which only a video has"),
    ],
)
def test_what_cannot_be_a_scene_is_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        opened(entry)


def test_a_file_of_another_kind_and_no_scene_at_all_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="notes.txt', which is there, but is nothing that can be"):
        opened(str(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match="data.scenes is empty; expected captions of the world"):
        opened()
