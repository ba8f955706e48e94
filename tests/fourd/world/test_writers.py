"""Files that the world writes, read by independent readers and worked out by hand."""

import json
import math

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from custom.fourd.world.capture import arc_azimuths, path_capture, read_truth, rig_capture
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.writers import (
    write_dycheck,
    write_dynerf,
    write_mp4,
    write_transforms,
    write_video,
)

SCENE = parse_caption("a blue pyramid sliding")


def psnr(one, other):
    return -10 * math.log10(float(np.square(np.asarray(one) / 255.0 - np.asarray(other)).mean()))


def test_a_dynerf_folder(tmp_path):
    capture = write_dynerf(tmp_path / "a", SCENE, n_cameras=3, n_times=3, size_px=32)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["cam00.mp4", "cam01.mp4", "cam02.mp4", "poses_bounds.npy", "world.json"]
    rgb, _ = read_truth(tmp_path / "a").render()
    frames = iio.imread(tmp_path / "a" / "cam02.mp4", plugin="pyav")
    assert frames.shape == (3, 32, 32, 3) and psnr(frames, rgb[6:]) > 36
    rows = np.load(tmp_path / "a" / "poses_bounds.npy")
    assert rows.shape == (3, 17)
    matrix = rows[1, :15].reshape(3, 5)
    focal = 16 / math.tan(math.radians(20))
    assert matrix[:, 4].tolist() == pytest.approx([32, 32, focal])
    # Down, right, backward: right is level, backward leads from the origin to the camera.
    down, right, backward, position = matrix[:, :4].T
    assert abs(right[2]) < 1e-6 and down[2] < 0
    assert np.allclose(backward * 3, position, atol=1e-5)
    assert np.allclose(np.cross(right, -down), backward, atol=1e-6)
    # The held-out camera is the first, and inside.
    sides = [math.atan2(row[8], row[3]) for row in rows]
    assert min(sides) < sides[0] < max(sides) or sides[0] == pytest.approx(min(map(abs, sides)))
    assert rows[0, 15:].tolist() == pytest.approx(list(capture.bounds))


def test_a_dycheck_folder(tmp_path):
    capture = write_dycheck(tmp_path / "b", SCENE, n_times=6, size_px=24)
    folder = tmp_path / "b"
    train, val = (
        json.loads((folder / "splits" / f"{s}.json").read_text()) for s in ("train", "val")
    )
    assert train["frame_names"][2] == "0_00002" and set(train["camera_ids"]) == {0}
    assert val["frame_names"][-1] == "2_00005" and val["time_ids"] == [*range(6)] * 2
    rgb, depth = capture.render()
    assert psnr(Image.open(folder / "rgb/1x/0_00004.png"), rgb[4]) > 50
    facts = json.loads((folder / "camera" / "0_00004.json").read_text())
    # OpenCV's projection of a surface point lands on its pixel, at the lidar's z.
    lidar = np.load(folder / "depth/1x/0_00004.npy")
    assert lidar.shape == (24, 24, 1)
    y, x = np.argwhere(lidar[..., 0] > 0)[30]
    focal, (cx, cy) = facts["focal_length"], facts["principal_point"]
    z = float(lidar[y, x, 0])
    in_camera = np.array([(x + 0.5 - cx) / focal * z, (y + 0.5 - cy) / focal * z, z])
    in_file = np.array(facts["orientation"]).T @ in_camera + np.array(facts["position"])
    in_world = (in_file - [0.5, -0.25, 0.125]) * 0.5
    position = capture.c2w[4, :3, 3].numpy()
    assert np.linalg.norm(in_world - position) == pytest.approx(float(depth[4, y, x]), abs=1e-5)
    assert not (folder / "depth/1x/1_00000.npy").exists()
    mask = np.asarray(Image.open(folder / "covisible/1x/val/1_00000.png"))
    assert mask[0, 0] == 255 and set(np.unique(mask)) <= {0, 255}


def test_what_few_training_frames_see_is_not_covisible(tmp_path):
    """Four frames are never the five that DyCheck asks for."""
    capture = write_dycheck(tmp_path / "b", SCENE, n_times=4, size_px=24, n_val=1)
    mask = np.asarray(Image.open(tmp_path / "b/covisible/1x/val/1_00001.png"))
    _, depth = capture.render()
    assert np.array_equal(mask == 0, depth[5].numpy() > 0)


def test_a_transforms_folder(tmp_path):
    capture = rig_capture(SCENE, arc_azimuths(3), 2, 16)
    write_transforms(tmp_path / "c", capture, held_out=[0])
    content = json.loads((tmp_path / "c" / "transforms.json").read_text())
    assert content["val_filenames"] == ["images/00_0000.png", "images/00_0001.png"]
    assert len(content["train_filenames"]) == 4 and content["w"] == 16
    frame = content["frames"][3]
    assert frame["file_path"] == "images/01_0001.png" and frame["time"] == 1.0
    assert torch.equal(torch.tensor(frame["transform_matrix"]), capture.c2w[3])
    rgb, _ = capture.render()
    assert psnr(Image.open(tmp_path / "c" / frame["file_path"]), rgb[3]) > 50


@pytest.mark.parametrize("cameras", [True, False])
def test_a_video(tmp_path, cameras):
    capture = path_capture(SCENE, 3, 32)
    write_video(tmp_path / "d.mp4", capture, cameras)
    assert (tmp_path / "d.json").exists() == cameras
    frames = iio.imread(tmp_path / "d.mp4", plugin="pyav")
    truth = read_truth(tmp_path / "d.world.json")
    assert psnr(frames, truth.render()[0]) > 36


def test_nothing_is_overwritten(tmp_path):
    capture = path_capture(SCENE, 2, 16)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("mine")
    for write in (
        lambda: write_dynerf(tmp_path / "a", SCENE, 2, 2, 16),
        lambda: write_dycheck(tmp_path / "a", SCENE, 2, 16),
        lambda: write_transforms(tmp_path / "a", capture),
    ):
        with pytest.raises(FileExistsError, match="a is not empty; give the name of a new folder"):
            write()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine.txt"]
    (tmp_path / "v.json").write_text("mine")
    with pytest.raises(FileExistsError, match="v.json exists; give another name"):
        write_video(tmp_path / "v.mp4", capture)
    assert not (tmp_path / "v.mp4").exists()


def test_full_colour_resolution_survives_the_codec(tmp_path):
    """Single-pixel columns of red and blue, which 4:2:0 would mix."""
    frames = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    frames[:, :, ::2, 0], frames[:, :, 1::2, 2] = 230, 230
    write_mp4(tmp_path / "s.mp4", frames)
    assert psnr(iio.imread(tmp_path / "s.mp4", plugin="pyav"), frames.numpy() / 255.0) > 38
    assert [path.name for path in tmp_path.iterdir()] == ["s.mp4"]
