"""The command that warps a camera's frame along the flow."""

import json
import re

import cv2
import numpy as np
import pytest
import torch

from custom.fourd.data.open_scene import open_scene
from custom.fourd.ops.optical_flow import DISFlow
from custom.fourd.scripts.result_folder import encode_png
from custom.fourd.scripts.warp_flow import main, warp_frames
from custom.fourd.world.writers import write_mp4

SIZE = 48


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A smooth texture that moves right by two pixels a frame."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    frames = []
    for shift in (0, 2, 4):
        u, v = columns - shift, rows
        waves = [torch.sin(u / 3) + torch.sin(v / 4), torch.sin((u + v) / 5), torch.cos(u / 4)]
        frames.append(torch.stack([0.5 + 0.2 * wave for wave in waves], dim=-1))
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_mp4(path, (torch.stack(frames) * 255).round().to(torch.uint8))
    return path


def read(path):
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB).astype(float) / 255


def test_a_frame_is_carried_to_the_others(clip, tmp_path, capsys):
    output = tmp_path / "warped"
    args = [str(clip), "--output", str(output), "--cache", str(tmp_path / "flows")]
    assert main([*args, "--flow", "dis"]) == 0
    said = capsys.readouterr().out
    assert "warped 2 of 2 frames: 0_00002" in said and "dB there" in said
    kinds = ("beside", "composite", "mask", "warped")
    expected = [f"0_{time:05d}_{kind}.png" for time in (1, 2) for kind in kinds]
    assert sorted(path.name for path in output.glob("*.png")) == expected
    assert json.loads((output / "warp.json").read_text())["targets"] == [1, 2]
    assert len(list((tmp_path / "flows").rglob("*.npy"))) == 4
    mask, warped = (read(output / f"0_00002_{kind}.png") for kind in ("mask", "warped"))
    # Content came in at the left: there is nothing to carry there.
    assert mask[:, :3].mean() < 0.1 and mask[6:-6, 8:-6].mean() > 0.9
    target = open_scene(clip).frames[2].numpy() / 255
    assert np.abs(warped - target)[mask[..., 0] > 0.5].mean() < 0.02
    assert read(output / "0_00001_beside.png").shape == (SIZE, 5 * SIZE + 4 * 2, 3)
    # The same command goes on and keeps what is there; another needs another folder.
    (output / "0_00001_mask.png").write_bytes(b"mine")
    assert main([*args, "--flow", "dis"]) == 0
    assert (output / "0_00001_mask.png").read_bytes() == b"mine"
    assert main([*args, "--flow", "dis", "--mode", "bilinear"]) == 1
    assert "another warp (mode was 'bicubic' and is 'bilinear')" in capsys.readouterr().err


def test_an_edited_picture_is_carried_by_the_flow_of_the_originals(clip, tmp_path):
    scene = open_scene(clip)
    look = torch.zeros(SIZE, SIZE, 3)
    look[:, 20:] = torch.tensor([1.0, 0.0, 0.0])
    (tmp_path / "look.png").write_bytes(encode_png(look))
    output = tmp_path / "out"
    flags = ["--edited", str(tmp_path / "look.png"), "--targets", "2", "--flow", "dis"]
    assert main([str(clip), "--output", str(output), *flags]) == 0
    warped = read(output / "0_00002_warped.png")[10:-10, :, 0]
    # The edge at column 20 moved right by four.
    assert warped[:, 12:22].mean() < 0.05 and warped[:, 26:36].mean() > 0.95
    ((time, found),) = warp_frames(scene, 0, 0, [2], DISFlow(), look)
    assert time == 2 and np.abs(found.warped[0, 10:-10, :, 0].numpy() - warped).max() < 1 / 255


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--camera", "7"], r"camera 7 is not there; the cameras are \[0\]"),
        (["--reference", "9"], "camera 0 has no frame at time_id 9"),
        (["--frames", "0:1"], "camera 0 has no frame but the reference, 0; expected another"),
        (["--edited", "{look}"], "look.png is 8 x 6 pixels and the frames are 48 x 48"),
        (["--edited", "gone.png"], "gone.png is missing"),
        (["--frames", "0:9"], "data.frame_list asks for frame"),
    ],
)
def test_refusals_are_one_sentence_and_leave_nothing(clip, tmp_path, capsys, flags, message):
    (tmp_path / "look.png").write_bytes(encode_png(torch.zeros(6, 8, 3)))
    flags = [flag.format(look=tmp_path / "look.png") for flag in flags]
    assert main([str(clip), "--output", str(tmp_path / "out"), *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("warp_flow: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
