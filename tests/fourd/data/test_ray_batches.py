"""Which pixels a step looks at, and the rays and colours that it gets for them."""

import math

import pytest
import torch
from threestudio.utils.ops import get_mvp_matrix

from custom.fourd.data.ray_batches import (
    RaySampler,
    SamplingOptions,
    frame_batch,
    moving_pixels,
)
from custom.fourd.data.video_scene import VideoScene
from custom.fourd.ops.camera import (
    camera_from_orbit,
    camera_rays,
    ndc_distance,
    project_points,
)

HEIGHT, WIDTH = 6, 8


def scene_of(cameras=3, times=12, **changes):
    """Random frames; camera 0 is held out. Focal lengths differ per axis and camera."""
    n = cameras * times
    stream = torch.Generator().manual_seed(0)
    camera_ids = torch.arange(cameras).repeat_interleave(times)
    intrinsics = torch.eye(3).repeat(n, 1, 1)
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = 7.0 + camera_ids, 9.0
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = 0.5 * WIDTH, 0.5 * HEIGHT
    parts = {
        "frames": torch.randint(0, 256, (n, HEIGHT, WIDTH, 3), generator=stream, dtype=torch.uint8),
        "c2w": camera_from_orbit(10.0, 20.0 * camera_ids, 3.0),
        "intrinsics": intrinsics,
        "camera_ids": camera_ids,
        "time_ids": torch.arange(times).repeat(cameras),
        "frame_times": (torch.arange(times) / (times - 1)).repeat(cameras),
        "held_out": camera_ids == 0,
        "near": 1.0,
        "far": 5.0,
    }
    return VideoScene(**parts | changes)


def still_scene(moves, **shape):
    """Black frames in which ``moves`` maps (camera, time, row, column) to a grey."""
    scene = scene_of(**shape)
    scene.frames.zero_()
    for (camera, time, y, x), grey in moves.items():
        scene.frames[scene.index(camera, time), y, x] = grey
    return scene


def test_motion_reaches_five_frames_to_both_sides_and_never_around_the_end():
    """One flash at time 8 changes frames 8 and 9, so frames 3 to 14 look there; 0 to 2 do not."""
    scene = still_scene({(1, 8, 2, 5): 200}, times=18)
    rows = scene.camera_rows(1)
    masks = torch.stack(moving_pixels(scene, rows))
    assert masks[:, 2, 5].nonzero().flatten().tolist() == list(range(3, 15))
    assert int(masks.sum()) == 12
    assert not torch.stack(moving_pixels(scene, scene.camera_rows(2))).any()
    # A last frame unlike the first one is motion at the end, not at the beginning.
    ending = still_scene({(1, 17, 0, 0): 200}, times=18)
    masks = torch.stack(moving_pixels(ending, rows))
    assert masks[:, 0, 0].nonzero().flatten().tolist() == [12, 13, 14, 15, 16, 17]


def test_motion_is_between_frames_that_are_asked_for():
    """A frame that training must not see tells nothing about those that it may."""
    scene = still_scene({(1, 6, 0, 0): 200}, times=12)
    rows = torch.tensor([row for row in scene.camera_rows(1).tolist() if row != scene.index(1, 6)])
    assert not torch.stack(moving_pixels(scene, rows)).any()


def test_motion_is_a_change_of_more_than_ten_levels():
    at_threshold = still_scene({(1, 5, 0, 0): 10, (1, 5, 0, 1): 11})
    masks = torch.stack(moving_pixels(at_threshold, at_threshold.camera_rows(1)))
    assert not masks[:, 0, 0].any() and masks[5, 0, 1]


def test_a_batch_says_what_its_pixels_show():
    scene = scene_of(
        depth=torch.rand(36, HEIGHT, WIDTH),
        masks=255 * (torch.arange(36 * HEIGHT * WIDTH) % 3 == 0).byte().view(36, HEIGHT, WIDTH),
    )
    batch = RaySampler(scene, SamplingOptions(n_rays=200, motion_share=0.3)).batch(7)
    rows, (x, y) = batch["index"], batch["pixels"].unbind(dim=-1)
    assert torch.equal(batch["rgb"], scene.frames[rows, y, x] / 255.0)
    assert torch.equal(batch["frame_times"], scene.frame_times[rows])
    assert torch.equal(batch["depth"][:, 0], scene.depth[rows, y, x])
    assert torch.equal(batch["mask"][:, 0], scene.masks[rows, y, x] / 255.0)
    whole = frame_batch(scene, 25)
    assert torch.equal(whole["depth"][0, ..., 0], scene.depth[25])
    assert torch.equal(whole["mask"][0, ..., 0], scene.masks[25] / 255.0)
    rays_o, rays_d = camera_rays(scene.c2w, scene.intrinsics, HEIGHT, WIDTH)
    assert torch.allclose(batch["rays_d"], rays_d[rows, y, x], atol=1e-6)
    assert torch.equal(batch["rays_o"], rays_o[rows, y, x])
    assert (batch["near"], batch["far"], batch["step"]) == (1.0, 5.0, 7)


def test_held_out_cameras_are_never_drawn_but_with_parity():
    options = SamplingOptions(n_rays=600)
    rows = RaySampler(scene_of(), options).draw(0)[0]
    assert set((rows // 12).tolist()) == {1, 2}
    rows = RaySampler(scene_of(train_on_held_out=True), options).draw(0)[0]
    assert set((rows // 12).tolist()) == {0, 1, 2}


def test_a_draw_depends_on_step_and_shard_alone():
    options = SamplingOptions(n_rays=64, motion_share=0.5)
    first, second = RaySampler(scene_of(), options), RaySampler(scene_of(), options)
    second.draw(0), second.draw(1)
    for one, other in zip(first.draw(5, 1), second.draw(5, 1), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(first.draw(5, 1)[1], first.draw(5, 0)[1])
    assert not torch.equal(first.draw(5, 1)[1], first.draw(6, 1)[1])


def test_the_share_of_moving_pixels_is_kept():
    scene = still_scene({(1, 8, 2, 5): 200, (2, 0, 1, 1): 90}, times=18)
    sampler = RaySampler(scene, SamplingOptions(1000, motion_share=0.4, motion_until=3))
    rows, y, x = sampler.draw(2)
    masks = dict(zip(sampler.rows.tolist(), moving_pixels(scene, sampler.rows), strict=True))
    hits = [bool(masks[int(r)][int(i), int(j)]) for r, i, j in zip(rows, y, x, strict=True)]
    assert all(hits[:400])
    assert sum(hits[400:]) < 30, "two pixels of 48 move"
    # 12 frames of camera 1 and 7 of camera 2 have one moving pixel each, all equally likely.
    counts = torch.bincount(rows[:400], minlength=54)
    assert int((counts > 0).sum()) == 12 + 7
    assert abs(int(counts[18:36].sum()) - 400 * 12 / 19) < 40
    rows, y, x = sampler.draw(3)
    hits = [bool(masks[int(r)][int(i), int(j)]) for r, i, j in zip(rows, y, x, strict=True)]
    assert sum(hits) < 60


def test_a_frame_with_more_moving_pixels_is_drawn_more_often():
    moves = {(1, 0, 0, column): 200 for column in range(WIDTH)} | {(2, 0, 5, 5): 200}
    sampler = RaySampler(still_scene(moves, times=2), SamplingOptions(900, motion_share=1.0))
    rows, y, x = sampler.draw(0)
    drawn = torch.unique(torch.stack((rows, y, x)), dim=1)
    assert drawn.shape[1] == 2 * (WIDTH + 1), "every moving pixel, in both frames"
    assert 60 < int((rows >= 4).sum()) < 140, "a ninth of them"


def test_a_still_scene_fills_the_batch_all_the_same():
    sampler = RaySampler(still_scene({}), SamplingOptions(50, motion_share=0.9))
    assert len(sampler.draw(0)[0]) == 50


def test_every_pixel_is_as_likely_as_any_other():
    rows, y, x = RaySampler(scene_of(), SamplingOptions(24 * 48 * 50)).draw(0)
    counts = torch.bincount(((rows - 12) * HEIGHT + y) * WIDTH + x, minlength=24 * 48)
    # Poisson with mean 50: the chi-square of 1152 cells lies within five deviations.
    chi_square = float(((counts - 50.0) ** 2 / 50).sum())
    assert abs(chi_square - 1151) < 5 * math.sqrt(2 * 1151)


def test_one_time_per_batch_is_shared_by_all_shards():
    options = SamplingOptions(40, motion_share=0.5, one_time_per_batch=True)
    sampler = RaySampler(scene_of(), options)
    seen = set()
    for step in range(40):
        batches = [sampler.batch(step, shard)["frame_times"] for shard in (0, 1)]
        (time,) = set(torch.cat(batches).tolist())
        seen.add(time)
    assert len(seen) > 8


def test_patches_are_whole_squares():
    sampler = RaySampler(scene_of(), SamplingOptions(45, patch_size=3, motion_share=0.4))
    batch = sampler.batch(0)
    pixels, rows = batch["pixels"].view(5, 3, 3, 2), batch["index"].view(5, 9)
    assert bool((rows == rows[:, :1]).all())
    offset = pixels - pixels[:, :1, :1]
    expected = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="xy"), -1)
    assert torch.equal(offset, expected.expand(5, 3, 3, 2))
    assert int(pixels[..., 0].max()) < WIDTH and int(pixels[..., 1].max()) < HEIGHT
    whole = RaySampler(scene_of(), SamplingOptions(72, patch_size=6)).batch(0)["pixels"]
    assert set(whole[:, 1].tolist()) == set(range(HEIGHT)), "a patch may be as high as the frame"


def test_rays_of_a_pixel_look_through_all_its_parts():
    """By projection: one ray somewhere in each quarter, pixel after pixel, elsewhere each step."""
    sampler = RaySampler(scene_of(), SamplingOptions(80, samples_per_axis=2, motion_share=0.3))
    batch = sampler.batch(5)
    rows, pixels = batch["index"], batch["pixels"]
    assert batch["rays_per_pixel"] == 4 and len(rows) == len(batch["rgb"]) == 20
    assert torch.equal(batch["rgb"], sampler.scene.frames[rows, pixels[:, 1], pixels[:, 0]] / 255.0)
    expected_times = sampler.scene.frame_times[rows].repeat_interleave(4)
    assert torch.equal(batch["frame_times"], expected_times)
    points = (batch["rays_o"] + 2.0 * batch["rays_d"]).view(20, 4, 3)
    c2w, intrinsics = sampler.scene.c2w[rows], sampler.scene.intrinsics[rows]
    within = project_points(points, c2w, intrinsics)[0] - pixels[:, None]
    assert float(within.min()) > -1e-4 and float(within.max()) < 1 + 1e-4
    quarters = (within > 0.5).long() @ torch.tensor([2, 1])
    assert torch.equal(quarters, torch.arange(4).expand(20, 4))
    assert float(within.std(dim=0).min()) > 0.05, "not at one place of the quarter"
    again, later = sampler.batch(5), sampler.batch(6)
    assert torch.equal(again["rays_d"], batch["rays_d"])
    assert not torch.equal(later["rays_d"], batch["rays_d"])


@pytest.mark.parametrize(
    ("moving", "corner"), [((3, 4), (2, 3)), ((0, 0), (0, 0)), ((5, 7), (3, 5))]
)
def test_patches_are_centred_on_what_moves_and_stay_in_the_frame(moving, corner):
    scene = still_scene({(1, 0, *moving): 200}, times=2)
    options = SamplingOptions(9, patch_size=3, motion_share=1.0)
    _, y, x = RaySampler(scene, options).draw(0)
    assert (int(y.min()), int(x.min())) == corner
    assert (int(y.max()), int(x.max())) == (corner[0] + 2, corner[1] + 2)


@pytest.mark.parametrize(
    "options, message",
    [
        (SamplingOptions(10, patch_size=3), "batch_size is 10 rays; expected a multiple .* 9"),
        (
            SamplingOptions(18, patch_size=3, samples_per_axis=2),
            "batch_size is 18 rays; .*patch_size times samples_per_axis.* squared, 36",
        ),
        (SamplingOptions(49, patch_size=7), "patch_size is 7 for frames of 6 x 8 pixels"),
    ],
)
def test_patches_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RaySampler(scene_of(), options)


def test_a_whole_frame_has_the_contract_s_keys():
    scene = scene_of()
    batch = frame_batch(scene, 25)
    assert batch["rgb"].shape == batch["rays_d"].shape == (1, HEIGHT, WIDTH, 3)
    assert torch.equal(batch["rgb"][0], scene.frames[25] / 255.0)
    assert (batch["height"], batch["width"]) == (HEIGHT, WIDTH)
    assert (batch["camera_id"], batch["time_id"]) == (2, 1)
    assert float(batch["elevation"]) == pytest.approx(10, abs=1e-4)
    assert float(batch["azimuth"]) == pytest.approx(40, abs=1e-4)
    assert float(batch["camera_distances"]) == pytest.approx(3, abs=1e-5)
    assert float(batch["frame_times"]) == pytest.approx(1 / 11)
    # The ray of a pixel ends where the projection puts it, focal lengths differ per axis.
    point = batch["rays_o"][0, 4, 6] + 2.5 * batch["rays_d"][0, 4, 6]
    clip = get_mvp_matrix(batch["c2w"], batch["proj_mtx"])[0] @ torch.cat([point, torch.ones(1)])
    place = (clip[:2] / clip[3] + 1) / 2 * torch.tensor([WIDTH, HEIGHT])
    assert place.tolist() == pytest.approx([6.5, 4.5], abs=1e-4)


def test_ndc_rays_show_the_same_points():
    """One map of space for all cameras, though their focal lengths differ."""
    scene = scene_of()
    scene.c2w[:] = torch.eye(4)
    scene.c2w[:, 0, 3] = 0.1 * scene.camera_ids
    batch = RaySampler(scene, SamplingOptions(32, ndc=True)).batch(3)
    assert (batch["near"], batch["far"]) == (0.0, 1.0)
    parameter = torch.linspace(0.1, 0.8, 32)[:, None]
    distance = ndc_distance(parameter, batch["world_rays_o"], batch["world_rays_d"])
    points = batch["world_rays_o"] + distance * batch["world_rays_d"]
    scale = torch.tensor([2 * 7.0 / WIDTH, 2 * 9.0 / HEIGHT])
    expected = torch.cat([-scale * points[:, :2] / points[:, 2:], 1 + 2 / points[:, 2:]], dim=-1)
    assert torch.allclose(batch["rays_o"] + parameter * batch["rays_d"], expected, atol=1e-5)
    whole = frame_batch(scene, 20, ndc=True)
    assert whole["rays_o"].shape == (1, HEIGHT, WIDTH, 3)
    assert torch.allclose(whole["rays_o"][..., 2], torch.tensor(-1.0))
