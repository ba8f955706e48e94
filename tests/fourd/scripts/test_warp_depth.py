"""The command that warps between cameras, on files of the world, whose depth is known."""

import json
import math
import re

import cv2
import numpy as np
import pytest
import torch

from custom.fourd.data.open_scene import open_scene
from custom.fourd.scripts.result_folder import encode_png
from custom.fourd.scripts.warp_depth import main
from custom.fourd.world.capture import read_truth
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.writers import write_dycheck, write_dynerf

SIZE = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("scene") / "arc"
    write_dynerf(root, parse_caption("a large red cube sliding"), 4, 2, SIZE)
    return root


def read(path):
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB).astype(float) / 255


def test_a_view_is_fetched_from_two_others_by_the_true_depth(folder, tmp_path, capsys):
    output = tmp_path / "warped"
    views = ["--keys", "1", "2", "--targets", "0", "--time", "1"]
    assert main([str(folder), "--output", str(output), *views]) == 0
    said = capsys.readouterr().out
    quality = float(re.search(r"([\d.]+) dB there", said).group(1))
    assert "warped 1 of 1 views: 0_00001" in said and quality > 35
    mask, warped = (read(output / f"0_00001_{kind}.png") for kind in ("mask", "warped"))
    truth = read_truth(folder).render()[0][1].numpy()
    inside = mask[..., 0] > 0.5
    assert np.abs(warped - truth)[inside].mean() < 0.02 and inside.mean() > 0.1
    made = read(output / "0_00001_composite.png")
    own = open_scene(folder).frames[1].numpy() / 255
    assert np.array_equal(made[~inside], own[~inside])
    assert np.array_equal(made[inside], warped[inside])
    assert read(output / "0_00001_beside.png").shape == (SIZE, 4 * SIZE + 3 * 2, 3)
    assert json.loads((output / "warp.json").read_text())["keys"] == [3, 5]
    # The same command keeps what is there; another needs a folder of its own.
    (output / "0_00001_mask.png").write_bytes(b"mine")
    assert main([str(folder), "--output", str(output), *views]) == 0
    assert (output / "0_00001_mask.png").read_bytes() == b"mine"
    assert main([str(folder), "--output", str(output), *views, "--ratio", "0.5"]) == 1
    assert "another warp (ratio was 1.0 and is 0.5)" in capsys.readouterr().err


def test_edited_keys_and_depth_of_ones_own(folder, tmp_path):
    truth = read_truth(folder)
    np.save(tmp_path / "depth.npy", truth.render()[1].numpy())
    (tmp_path / "green.png").write_bytes(
        encode_png(torch.tensor([0.0, 1.0, 0.0]).expand(SIZE, SIZE, 3))
    )
    output = tmp_path / "warped"
    flags = ["--edited", str(tmp_path / "green.png"), "--depth", str(tmp_path / "depth.npy")]
    views = ["--keys", "1@1", "--targets", "0@1", "3@1"]
    assert main([str(folder), "--output", str(output), *views, *flags]) == 0
    for camera in (0, 3):
        mask, made = (read(output / f"{camera}_00001_{k}.png") for k in ("mask", "composite"))
        inside = mask[..., 0] > 0.5
        assert inside.any() and np.abs(made[inside] - [0, 1, 0]).max() < 1e-6


def test_lidar_that_comes_with_the_source_is_used(tmp_path, capsys):
    write_dycheck(tmp_path / "phone", parse_caption("a large red cube"), 5, SIZE, n_val=1)
    args = [str(tmp_path / "phone"), "--output", str(tmp_path / "out"), "--keys", "0@0"]
    assert main([*args, "--targets", "0@1"]) == 0
    assert float(re.search(r"([\d.]+) dB there", capsys.readouterr().out).group(1)) > 30
    assert main([*args, "--targets", "1@1"]) == 1
    assert "1_00001.png has no depth at all; expected some" in capsys.readouterr().err


def without_truth(folder, root):
    root.mkdir()
    for path in folder.iterdir():
        if path.name != "world.json":
            (root / path.name).symlink_to(path)
    return root


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--targets", "9"], r"camera 9 has no frame at time_id 0; cameras are \[0, 1, 2, 3\]"),
        (["--targets", "0@5"], "camera 0 has no frame at time_id 5"),
        (["--targets", "left"], "view 'left' is neither CAMERA nor CAMERA@TIME"),
        (["--targets", "0", "--ratio", "2"], "ratio is 2.0; expected the share"),
        (["--targets", "0", "--relative", "-1"], "relative is -1.0; expected 0 or more"),
        (["--targets", "0", "--frames", "0:1"], "the depth of all frames only; leave out --frames"),
        (
            ["--targets", "0", "--depth", "{wrong}"],
            r"wrong.npy has shape \(8, 2, 2\); expected \(8",
        ),
        (["--targets", "0", "--depth", "{nan}"], "depth of view 0 is nan at row 5, column 6"),
        (["--targets", "0", "--depth", "{text}"], "text.npy is no array of numbers"),
        (["--targets", "0", "--edited", "a", "b"], "a is missing; expected a picture"),
        (["--targets", "0", "--edited", "{look}", "{look}"], "has 2 pictures for 1 keys"),
    ],
)
def test_refusals_are_one_sentence_and_leave_nothing(folder, tmp_path, capsys, flags, message):
    files = {name: str(tmp_path / f"{name}.npy") for name in ("wrong", "nan", "text")}
    files["look"] = str(tmp_path / "look.png")
    np.save(files["wrong"], np.ones((8, 2, 2)))
    depth = np.ones((8, SIZE, SIZE), np.float32)
    depth[0, 5, 6] = math.nan
    np.save(files["nan"], depth)
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "look.png").write_bytes(encode_png(torch.zeros(SIZE, SIZE, 3)))
    flags = [flag.format(**files) for flag in flags]
    assert main([str(folder), "--output", str(tmp_path / "out"), "--keys", "1", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("warp_depth: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_a_source_without_depth_says_which_file_to_give(folder, tmp_path, capsys):
    bare = without_truth(folder, tmp_path / "bare")
    flags = ["--keys", "1", "--targets", "0", "--output", str(tmp_path / "out")]
    assert main([str(bare), *flags]) == 1
    expected = r"comes with no depth; give --depth FILE.npy.*shape \(8, 48, 48\)"
    assert re.search(expected, capsys.readouterr().err)
