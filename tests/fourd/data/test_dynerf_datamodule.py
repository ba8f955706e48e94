"""DyNeRF folders: truth of the world comes back, and what is broken is named."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import threestudio
import torch
from PIL import Image

from custom.fourd.data.prepared_frames import prepare
from custom.fourd.ops.camera import camera_rays
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.writers import write_dynerf, write_mp4
from tests.fixtures import world_reference as reference

CAPTION = "a red cube sliding next to a blue sphere"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "world"
    return folder, write_dynerf(folder, parse_caption(CAPTION), 3, 4, 48)


@pytest.fixture
def folder(written, tmp_path):
    """A copy that a test may break."""
    shutil.copytree(written[0], tmp_path / "scene")
    return tmp_path / "scene"


def module(folder, **keys):
    keys = {"dataroot": str(folder), "batch_size": 64} | keys
    return threestudio.find("dynerf-datamodule")(keys)


def psnr(one, other):
    return float(-10 * torch.log10((one - other).square().mean()))


def poses_in_file(scene):
    """Read poses, taken back to the file's world."""
    if scene.file_from_scene is None:
        return scene.c2w
    similarity = scene.file_from_scene.double()
    scale = similarity[:3, 0].norm()
    c2w = scene.c2w.double().clone()
    c2w[:, :3, :3] = similarity[:3, :3] / scale @ c2w[:, :3, :3]
    c2w[:, :3, 3] = c2w[:, :3, 3] @ similarity[:3, :3].T + similarity[:3, 3]
    return c2w.float()


@pytest.mark.parametrize("normalise", ["none", "llff"])
def test_the_world_comes_back(written, normalise):
    """Poses to 1e-5, and the truth rendered at the read cameras equals the decoded frames."""
    folder, capture = written
    scene = module(folder, normalise=normalise).scene
    assert (len(scene), scene.cameras(), scene.times()) == (12, [0, 1, 2], [0, 1, 2, 3])
    assert torch.equal(scene.held_out, scene.camera_ids == 0)
    assert torch.allclose(poses_in_file(scene), capture.c2w, atol=1e-5)
    assert torch.allclose(scene.frame_times, capture.frame_times)
    truth = replace(capture, c2w=poses_in_file(scene)).render()[0]
    assert min(psnr(one / 255.0, other) for one, other in zip(scene.frames, truth)) > 38


def test_rays_of_the_read_cameras_hit_what_the_frames_show(written):
    """Against the slow reference of the world: marched rays and the decoded colours agree."""
    folder, capture = written
    scene = module(folder, normalise="none").scene
    rays_o, rays_d = camera_rays(scene.c2w, scene.intrinsics, 48, 48)
    is_object = scene.frames.float().min(dim=-1).values < 200
    for row in (1, 7, 10):
        time = float(scene.frame_times[row])
        distance = reference.march(
            lambda points, t=time: reference.occupant(capture.scene, t, points) >= 0,
            rays_o[row, ::4, ::4].reshape(-1, 3),
            rays_d[row, ::4, ::4].reshape(-1, 3),
            scene.near,
            scene.far,
            steps=300,
        )
        hit = torch.isfinite(distance).view(12, 12)
        # Only where no silhouette passes within a pixel.
        shown = is_object[row].float()[None, None]
        inner = -torch.nn.functional.max_pool2d(-shown, 3, 1, 1)[0, 0, ::4, ::4] > 0
        outer = torch.nn.functional.max_pool2d(shown, 3, 1, 1)[0, 0, ::4, ::4] < 1
        assert int(inner.sum()) > 5 and bool(hit[inner].all()) and not bool(hit[outer].any())


def test_intrinsics_follow_the_size_that_is_read(written):
    scene = module(written[0], downsample=2).scene
    assert (scene.height, scene.width) == (24, 24)
    focal = 12 / np.tan(np.deg2rad(20.0))
    expected = torch.tensor([[focal, 0, 12], [0, focal, 12], [0, 0, 1]]).float()
    assert torch.allclose(scene.intrinsics[5], expected, atol=1e-5)


def test_videos_smaller_than_their_rows_say_scale_the_focal_length(folder):
    table = np.load(folder / "poses_bounds.npy")
    table[:, [4, 9, 14]] *= 10
    np.save(folder / "poses_bounds.npy", table)
    scene = module(folder).scene
    assert float(scene.intrinsics[0, 0, 0]) == pytest.approx(24 / np.tan(np.deg2rad(20.0)), 1e-5)


def test_normalised_units_put_the_nearest_content_at_0_93(written):
    scene = module(written[0]).scene
    assert scene.near == pytest.approx(1 / 1.08)
    assert torch.allclose(
        scene.c2w[:, :3, 3].view(3, 4, 3).mean(dim=(0, 1)), torch.zeros(3), atol=1e-6
    )


def test_frames_hold_out_and_parity(written):
    data = module(written[0], frame_list="1:3", hold_out_cameras=["cam02"], n_val_views=1)
    data.setup()
    scene = data.scene
    assert scene.times() == [0, 1] and scene.frame_times.tolist() == [0.0, 1.0] * 3
    assert scene.names[0].endswith("cam00.mp4 frame 1")
    assert set(scene.camera_ids[scene.train_rows()].tolist()) == {0, 1}
    assert [len(data.val_dataset), len(data.test_dataset)] == [1, 2]
    leaky = module(written[0], parity=True).scene
    assert len(leaky.train_rows()) == 12


def test_ndc_is_an_option_of_the_rays(written):
    data = module(written[0], space="ndc")
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert torch.allclose(batch["rays_o"][:, 2], torch.tensor(-1.0), atol=1e-6)
    assert batch["world_rays_d"].norm(dim=-1).mean() == pytest.approx(1)


def test_prepared_frames_are_read_in_place_of_videos(written, folder):
    for video in sorted(folder.glob("*.mp4")):
        prepare(video, 2)
    scene = module(folder, downsample=2).scene
    assert scene.names[4].endswith("frames_2x/cam01/000000.png")
    direct = module(folder, downsample=2, use_prepared=False).scene
    assert torch.equal(scene.frames, direct.frames)
    assert torch.equal(scene.intrinsics, direct.intrinsics)


def test_folders_of_pictures_count_as_cameras_in_natural_order(folder):
    """`10.png` comes after `2.png`, and camera 10 after camera 2."""
    for video in folder.glob("*.mp4"):
        video.unlink()
    for place, name in enumerate(("cam1", "cam2", "cam10")):
        (folder / "frames" / name).mkdir(parents=True)
        for order, number in enumerate((1, 2, 10)):
            grey = (20 * place, 20 * order, 0)
            Image.new("RGB", (48, 48), grey).save(folder / "frames" / name / f"{number}.png")
    scene = module(folder).scene
    assert scene.frames[:, 0, 0, 0].view(3, 3)[:, 0].tolist() == [0, 20, 40]
    assert scene.frames[:, 0, 0, 1].view(3, 3)[2].tolist() == [0, 20, 40]


def coffee(tmp_path, names):
    """A hand-made folder whose path says coffee_martini, row i at x = i."""
    root = tmp_path / "coffee_martini"
    root.mkdir()
    for name in names:
        write_mp4(root / f"{name}.mp4", torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    return root


def save_rows(root, count):
    table = np.zeros((count, 17))
    table[:, [1, 5, 12]] = 1, -1, 1
    table[:, 3] = np.arange(count)
    table[:, [4, 9, 14]], table[:, 15:] = 32, [1, 5]
    np.save(root / "poses_bounds.npy", table)


NAMES = [f"cam{i:02d}" for i in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14)]


def test_the_camera_of_coffee_martini_that_is_out_of_step_is_left_out(tmp_path):
    root = coffee(tmp_path, NAMES)
    save_rows(root, 14)
    scene = module(root, normalise="none").scene
    assert "cam13" not in " ".join(scene.names)
    assert scene.c2w[::2, 0, 3].tolist() == [*range(12), 13]
    kept = module(root, normalise="none", skip_cameras=[]).scene
    assert kept.c2w[::2, 0, 3].tolist() == list(range(14))
    by_name = module(root, normalise="none", skip_cameras=["cam00", 1]).scene
    assert by_name.c2w[::2, 0, 3].tolist() == list(range(2, 14))


def test_its_row_is_left_out_where_only_its_video_is_gone(tmp_path):
    root = coffee(tmp_path, [name for name in NAMES if name != "cam13"])
    save_rows(root, 14)
    scene = module(root, normalise="none").scene
    assert scene.c2w[::2, 0, 3].tolist() == [*range(12), 13]


def drop_video(folder):
    (folder / "cam01.mp4").unlink()


def drop_row(folder):
    np.save(folder / "poses_bounds.npy", np.load(folder / "poses_bounds.npy")[:2])


def nan_pose(folder):
    table = np.load(folder / "poses_bounds.npy")
    table[2, 3] = np.nan
    np.save(folder / "poses_bounds.npy", table)


def skewed_pose(folder):
    table = np.load(folder / "poses_bounds.npy")
    table[1, 0] += 0.1
    np.save(folder / "poses_bounds.npy", table)


def shorter_video(folder):
    write_mp4(folder / "cam02.mp4", torch.zeros(3, 48, 48, 3, dtype=torch.uint8))


def cut_video(folder):
    content = (folder / "cam02.mp4").read_bytes()
    (folder / "cam02.mp4").write_bytes(content[: len(content) // 3])


def no_video(folder):
    for video in folder.glob("*.mp4"):
        video.unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (drop_video, "poses_bounds.npy has 3 rows, but there are 2 cameras: cam00, cam02"),
        (drop_row, "poses_bounds.npy has 2 rows, but there are 3 cameras"),
        (nan_pose, "poses_bounds.npy row 2: its pose holds NaN"),
        (skewed_pose, "poses_bounds.npy row 1: the rotation of its pose is not orthonormal"),
        (shorter_video, "cam02.mp4 has 3 frames and .*cam00.mp4 4; expected as many"),
        (cut_video, r"cam02.mp4 is cut: it has \d+ bytes"),
        (no_video, "holds no video and no folder frames"),
    ],
)
def test_broken_folders_are_refused_before_any_decoding(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        module(folder)


def test_what_shows_only_in_the_frames_is_refused_when_they_are_read(folder):
    content = bytearray((folder / "cam02.mp4").read_bytes())
    half = len(content) // 2
    content[-half:] = bytes(half)
    (folder / "cam02.mp4").write_bytes(content)
    with pytest.raises(ValueError, match="cam02.mp4 is no whole video: decoding stopped after"):
        _ = module(folder).scene
    write_mp4(folder / "cam02.mp4", torch.zeros(4, 32, 32, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="cam02.mp4 has frames of 32 x 32 pixels and .* 48 x 48"):
        _ = module(folder).scene
    for camera in range(3):
        write_mp4(folder / f"cam{camera:02d}.mp4", torch.zeros(4, 32, 48, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="frames of 48 x 32 pixels, but row 0 .* 48 x 48"):
        _ = module(folder).scene


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"hold_out_cameras": [3]}, "data.hold_out_cameras names camera 3; expected a position"),
        ({"hold_out_cameras": ["cam9"]}, "names camera 'cam9'; .* cam00, cam01, cam02"),
        ({"skip_cameras": [0, 1, 2]}, "data.skip_cameras leaves no camera"),
        ({"frame_list": "0:9"}, "data.frame_list asks for frame 4"),
        ({"space": "sphere"}, "data.space is 'sphere'; expected 'world' or 'ndc'"),
        ({"normalise": "yes"}, "data.normalise is 'yes'"),
        ({"space": "ndc", "normalise": "none"}, "data.space: ndc needs data.normalise: llff"),
    ],
)
def test_keys_that_cannot_work_are_refused(written, keys, message):
    with pytest.raises(ValueError, match=message):
        module(written[0], **keys)
