"""The command that renders a grid: what it writes, resumes, caches and refuses."""

import json
import math

import pytest
import torch

from custom.fourd.data.frame_encoders import latents_identity
from custom.fourd.data.grid_cache import open_cache
from custom.fourd.data.grid_cells import GridCells
from custom.fourd.ops.camera import camera_from_orbit
from custom.fourd.scripts.render_grid import main
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.render import render
from tests.fixtures.tiny_scenes import random_scene
from tests.fixtures.video_files import grey_frames, write_h264

CUBE = "a red cube spinning"
SMALL = ["--size", "16", "--times", "3", "--azimuths", "4", "--quiet"]


def run(folder, *arguments):
    return main([str(folder), *SMALL, *arguments])


def test_a_caption_becomes_the_exact_pictures_of_its_grid(tmp_path, capsys):
    folder = tmp_path / "cube"
    assert run(folder, "--scene", CUBE, "--elevations", "0", "40") == 0
    assert "3 times x 8 cameras of 16 x 16 pixels" in capsys.readouterr().out
    grid = GridCells(folder, 16, 16)
    c2w = camera_from_orbit(torch.tensor([40.0]), torch.tensor([270.0]), 3.0)
    truth = render(
        parse_caption(CUBE), c2w, torch.tensor([math.radians(40)]), 16, 16, torch.tensor([2 / 3]),
        torch.zeros(3),
    )  # fmt: skip
    cell = grid.read_cell(2, 7).float() / 255
    assert (cell[..., :3] - truth.rgb[0]).abs().max() <= 0.5 / 255 + 1e-6
    assert grid.caption == CUBE and grid.frame_times.tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    assert json.loads((folder / "grid.json").read_text())["origin"]["kind"] == "WorldCells"


def test_latents_are_added_later_and_kept(tmp_path):
    folder = tmp_path / "cube"
    assert run(folder, "--scene", CUBE) == 0
    before = (folder / "frames.npy").stat().st_mtime_ns
    assert main([str(folder), "--quiet", "--latents", "embedded://multiview"]) == 0
    rows = open_cache(
        GridCells(folder, 16, 16), latents_identity("embedded://multiview"), [1, 1, 1]
    )
    assert rows.shape == (3, 4, 16, 4, 4)
    assert (folder / "frames.npy").stat().st_mtime_ns == before


def test_a_scene_file_and_a_video_are_rendered_too(tmp_path):
    random_scene().save(tmp_path / "ball.safetensors")
    assert run(tmp_path / "g", "--scene", str(tmp_path / "ball.safetensors")) == 0
    grid = GridCells(tmp_path / "g", 16, 16)
    assert (grid.scene_id, grid.caption) == ("ball", "a <ball> & a cube")
    assert len(grid.record["origin"]["sha256"]) == 64
    video = write_h264(tmp_path / "clip.mp4", grey_frames(5, 16, 16))
    assert run(tmp_path / "v", "--scene", str(video), "--caption", "a wall") == 0
    grid = GridCells(tmp_path / "v", 16, 16)
    assert len(grid.frame_times) == 5 and len(grid.cameras) == 1 and grid.caption == "a wall"


def test_a_changed_scene_does_not_go_into_the_old_grid(tmp_path, capsys):
    path = tmp_path / "ball.safetensors"
    random_scene().save(path)
    assert run(tmp_path / "g", "--scene", str(path)) == 0
    path.unlink()
    random_scene(step=3).save(path)
    assert run(tmp_path / "g", "--scene", str(path)) == 2
    assert "holds another grid: its origin differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--scene", "a red zebra"], "is no caption of the world"),
        ([], "holds no grid; expected --scene to render one"),
        (["--scene", CUBE, "--latents", "embedded://nothing"], "embedded://nothing"),
    ],
)
def test_refusals_are_one_sentence(tmp_path, capsys, arguments, message):
    assert run(tmp_path / "g", *arguments) == 2
    assert message in capsys.readouterr().err
