"""Warps by depth: a textured plane in closed form, an occluder, the world's exact depth."""

import math

import pytest
import torch

from custom.fourd.metrics.image_quality import psnr
from custom.fourd.ops.camera import camera_from_orbit, camera_rays, intrinsics_from_fovy
from custom.fourd.ops.depth_warp import DepthCheck, DepthWarper
from custom.fourd.ops.flow_warp import is_inside
from custom.fourd.world.capture import arc_azimuths, rig_capture
from custom.fourd.world.grammar import parse_caption

SIZE = 32
INTRINSICS = intrinsics_from_fovy(math.radians(40.0), SIZE, SIZE)


def poses(*azimuths_deg, distance=3.0):
    azimuths = torch.tensor(azimuths_deg)
    return camera_from_orbit(torch.full_like(azimuths, 15.0), azimuths, distance)


def texture(y, z):
    """Colours on the plane x = 0 in [0, 1]; no wave shorter than 17 pixels of a test's image."""
    waves = [torch.sin(4 * y + 1), torch.sin(4 * z), torch.sin(3 * y - 3 * z)]
    return torch.stack([0.5 + 0.45 * wave for wave in waves], dim=-1)


def plane_views(c2w):
    """Exact images and depths of the plane x = 0."""
    rays_o, rays_d = camera_rays(c2w, INTRINSICS.expand(len(c2w), 3, 3), SIZE, SIZE)
    depth = -rays_o[..., 0] / rays_d[..., 0]
    points = rays_o + depth[..., None] * rays_d
    return texture(points[..., 1], points[..., 2]), depth


def warper(depth, c2w, **check):
    return DepthWarper(depth, c2w, INTRINSICS.expand(len(c2w), 3, 3), DepthCheck(**check))


def test_a_textured_plane_arrives_within_bilinear_noise():
    c2w = poses(0.0, 25.0, -20.0)
    images, depth = plane_views(c2w)
    found = warper(depth, c2w).warp(images, 0, [1, 2])
    assert float(found.is_covered.float().mean()) > 0.8
    # Bilinear error is at most f'' / 8 per axis: a pixel is 0.068 wide on the plane, 0.085 where it
    # is seen aslant, so f'' <= 0.45 * (4.3 * 0.085)^2 = 0.06.
    error = (found.image - images[0]).abs().amax(dim=-1)[found.is_covered]
    assert float(error.max()) < 0.06 / 8 * 2
    assert float(psnr(found.image[None], images[:1], found.is_covered[None])) > 45


def side_by_side_poses(shift_px):
    """Two cameras that look along -x at the plane 3 away; content in the second's image stands
    f * b / 3 pixels further left, for a distance b between them."""
    c2w = poses(0.0, 0.0)
    c2w[:, :3, 3] = torch.tensor([3.0, 0.0, 0.0])
    c2w[:, :3, :3] = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    c2w[1, 1, 3] = shift_px * 3.0 / float(INTRINSICS[0, 0])
    return c2w


def test_positions_are_those_of_the_plane_by_hand():
    c2w = side_by_side_poses(4)
    images, depth = plane_views(c2w)
    found = warper(depth, c2w, border_px=0).reproject(0, [1])
    for row, column in ((0, 4), (7, 20), (31, 31)):
        expected = torch.tensor([column + 0.5 - 4, row + 0.5])
        assert torch.allclose(found.pixels[0, row, column], expected, atol=1e-3)
    assert bool(found.is_valid[0, :, 4:].all()) and not bool(found.is_valid[0, :, :4].any())
    warped = warper(depth, c2w, border_px=0).warp(images, 0, [1])
    assert torch.allclose(warped.image[:, 4:], images[1][:, :-4], atol=1e-3)
    assert warped.coverage.tolist() == [pytest.approx(28 / 32)]


def test_a_sample_of_which_one_pixel_is_unknown_or_far_is_not_valid():
    # Half a pixel aside, target column c reads the key's columns c - 1 and c.
    c2w = side_by_side_poses(0.5)
    _, depth = plane_views(c2w)
    wide = {"border_px": 0, "relative": 0.9}
    hole, step = depth.clone(), depth.clone()
    hole[1, 10, 10] = 0
    is_valid = warper(hole, c2w, edge=0.0, **wide).reproject(0, [1]).is_valid[0, 10]
    assert torch.nonzero(~is_valid).flatten().tolist() == [0, 10, 11]
    step[1, :, 16:] *= 1.5
    for edge, expected in ((0.1, [0, 16]), (0.0, [0])):
        is_valid = warper(step, c2w, edge=edge, **wide).reproject(0, [1]).is_valid[0, 10]
        assert torch.nonzero(~is_valid).flatten().tolist() == expected


def occluded_plane():
    """The plane, and before it a small disc that only hides things from the key's camera."""
    c2w = poses(0.0, 25.0)
    images, depth = plane_views(c2w)
    rays_o, rays_d = camera_rays(c2w, INTRINSICS.expand(2, 3, 3), SIZE, SIZE)
    # A disc of radius 0.3 on the axis of the second camera, 1.5 before it.
    forward = -c2w[1, :3, 2]
    centre = c2w[1, :3, 3] + 1.5 * forward
    reach = 1.5 / (rays_d[1] @ forward)
    hits = (rays_o[1] + reach[..., None] * rays_d[1] - centre).norm(dim=-1) < 0.3
    depth[1] = torch.where(hits, reach, depth[1])
    images[1] = torch.where(hits[..., None], torch.zeros(3), images[1])
    return c2w, images, depth, hits


def test_what_an_occluder_hides_is_not_valid():
    c2w, images, depth, hits = occluded_plane()
    found = warper(depth, c2w).reproject(0, [1])
    free = warper(plane_views(c2w)[1], c2w).reproject(0, [1])
    # The key's pixel that a free point falls into shows the disc, so the disc hides the point.
    nearest = free.pixels[0].floor().long().clamp(0, SIZE - 1)
    hidden = hits[nearest[..., 1], nearest[..., 0]] & free.is_valid[0]
    assert int(hidden.sum()) > 20 and not bool((found.is_valid[0] & hidden).any())
    lost = free.is_valid[0] & ~found.is_valid[0]
    assert 0.5 * hits.sum() < lost.sum() < 3 * hits.sum()
    image = warper(depth, c2w).warp(images, 0, [1])
    assert float((image.image - images[0]).abs().amax(-1)[image.is_covered].max()) < 0.03


def test_points_behind_a_camera_are_not_valid():
    c2w = poses(0.0, 0.0)
    # The second camera stands beyond the plane and looks away from it.
    c2w[1, :3, 3] = -c2w[1, :3, 3]
    depth = torch.stack([plane_views(c2w[:1])[1][0], torch.full((SIZE, SIZE), 3.0)])
    assert not bool(warper(depth, c2w, relative=100.0).reproject(0, [1]).is_valid.any())
    warp = warper(depth, c2w).warp(torch.ones(2, SIZE, SIZE, 3), 0, [1])
    assert not bool(warp.is_covered.any()) and bool((warp.image == 0).all())


def test_thresholds_are_shares_of_the_distance():
    c2w = poses(0.0, 0.0)
    for scale in (1.0, 50.0):
        far = poses(0.0, 0.0, distance=3.0 * scale)
        _, depth = plane_views(far)
        for wrong, expected in ((1.015, True), (1.025, False)):
            known = depth.clone()
            known[1] *= wrong
            is_valid = warper(known, far).reproject(0, [1]).is_valid[0, 4:-4, 4:-4]
            assert bool(is_valid.all()) is expected and bool(is_valid.any()) is expected
    _, depth = plane_views(c2w)
    depth[1] += 0.1
    assert bool(warper(depth, c2w, relative=0.0, absolute=0.11).reproject(0, [1]).is_valid.any())
    assert not bool(
        warper(depth, c2w, relative=0.0, absolute=0.09).reproject(0, [1]).is_valid.any()
    )


def test_unknown_depth_is_neither_made_nor_read():
    c2w = poses(0.0, 0.0)
    _, depth = plane_views(c2w)
    depth[0, 10, 10] = 0
    depth[1, 20, 20] = 0
    valid = warper(depth, c2w, border_px=0).reproject(0, [1]).is_valid[0]
    assert not bool(valid[10, 10]) and not bool(valid[20, 20]) and bool(valid[10, 12])
    wide = warper(depth, c2w, border_px=2).reproject(0, [1]).is_valid[0]
    assert not bool(wide[8:13, 8:13].any()) and bool(wide[10, 14])


def test_silhouettes_are_left_out_by_their_range_of_depth():
    c2w = poses(0.0, 0.0)
    _, depth = plane_views(c2w)
    depth[:, :, 16:] *= 1.5
    made = {
        px: warper(depth, c2w, border_px=px).reproject(0, [1]).is_valid[0, 10] for px in (0, 1, 3)
    }
    assert torch.nonzero(~made[1][2:-2]).flatten().add(2).tolist() == [15, 16]
    assert torch.nonzero(~made[3][5:-5]).flatten().add(5).tolist() == [13, 14, 15, 16, 17, 18]
    # Without a border only samples whose four pixels lie on both surfaces are refused.
    assert int((~made[0]).sum()) <= 1


def test_the_average_weighs_keys_by_their_coverage_and_not_by_their_order():
    c2w = poses(0.0, 25.0, -35.0, 10.0)
    _, depth = plane_views(c2w)
    depth[2, :, :20] = 0
    images = torch.stack([torch.full((SIZE, SIZE, 3), value) for value in (0.9, 0.1, 0.3, 0.7)])
    views = warper(depth, c2w)
    found = views.warp(images, 0, [1, 2, 3])
    valid = views.reproject(0, [1, 2, 3]).is_valid
    shares = [float(mask.float().mean()) for mask in valid]
    assert found.coverage.tolist() == pytest.approx(shares) and min(shares) < 0.5 * max(shares)
    for row, column in ((16, 16), (16, 1), (1, 30)):
        pairs = [(s, v) for s, v, m in zip(shares, (0.1, 0.3, 0.7), valid) if m[row, column]]
        expected = sum(s * v for s, v in pairs) / max(1e-12, sum(s for s, _ in pairs))
        assert float(found.image[row, column, 0]) == pytest.approx(expected, abs=1e-5)
    images = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    straight, turned = (views.warp(images, 0, keys) for keys in ([1, 2, 3], [3, 1, 2]))
    assert torch.equal(straight.image, turned.image)
    assert torch.equal(straight.coverage[[2, 0, 1]], turned.coverage)


def test_views_are_updated_from_the_images_as_given():
    c2w = poses(0.0, 12.0, -12.0)
    _, depth = plane_views(c2w)
    images = torch.rand(3, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(1))
    before = images.clone()
    views = warper(depth, c2w)
    made, covered = views.propagate(images, [0, 1, 2], [0, 1, 2], ratio=0.5)
    assert torch.equal(images, before)
    turned, _ = views.propagate(images, [2, 0, 1], [1, 2, 0], ratio=0.5)
    assert torch.equal(made, turned[[1, 2, 0]])
    assert torch.equal(made[~covered], images[~covered])
    one = views.warp(images, 1, [0, 1, 2])
    half = 0.5 * one.image + 0.5 * images[1]
    assert torch.allclose(made[1][covered[1]], half[covered[1]], atol=1e-6)


def test_a_view_fetched_from_itself_is_itself():
    c2w = poses(0.0, 30.0)
    images, depth = plane_views(c2w)
    found = warper(depth, c2w).warp(images, 1, [1])
    assert float(found.is_covered.float().mean()) > 0.99
    assert torch.allclose(found.image[found.is_covered], images[1][found.is_covered], atol=1e-4)


@pytest.mark.parametrize("caption, floor_db", [("a red cube", 38), ("a wooden blue cylinder", 33)])
def test_cameras_of_an_arc_agree_with_the_truth(caption, floor_db):
    # The inner camera of the world's 60-degree arc from the two at its rims and two between.
    capture = rig_capture(parse_caption(caption), arc_azimuths(8), 1, 64)
    images, depth = capture.render()
    intrinsics = intrinsics_from_fovy(capture.fovy_rad, 64, 64).expand(8, 3, 3)
    found = DepthWarper(depth, capture.c2w, intrinsics).warp(images, 0, [1, 3, 5, 7])
    share = float(found.is_covered.sum() / (depth[0] > 0).sum())
    quality = float(psnr(found.image[None], images[:1], found.is_covered[None]))
    naive = float(psnr(images[3:4], images[:1], found.is_covered[None]))
    print(f"{caption}: {quality:.1f} dB on {share:.0%} of the surface, {naive:.1f} unwarped")
    assert share > 0.6 and quality > floor_db and quality > naive + 10


@pytest.mark.parametrize(
    "change, message",
    [
        ({"c2w": 1}, r"\(2, 32, 32\), \(1, 4, 4\) and \(2, 3, 3\); expected \(n, h, w\)"),
        ({"depth": -1.0}, "depth of view 1 is -1.0 at row 3, column 4; expected finite"),
        ({"depth": math.nan}, "depth of view 1 is nan at row 3"),
        ({"keys": []}, "no view is given"),
        ({"keys": [2]}, "view 2 is none; expected 0 to 1"),
        ({"keys": [1, 1]}, "name one twice"),
        ({"size": 8}, r"images has shape \(2, 8, 8, 3\); expected \(2, 32, 32, 3\)"),
    ],
)
def test_what_cannot_work_is_refused(change, message):
    c2w, depth = poses(0.0, 10.0), torch.full((2, SIZE, SIZE), 3.0)
    depth[1, 3, 4] = change.get("depth", 3.0)
    size = change.get("size", SIZE)
    with pytest.raises(ValueError, match=message):
        views = DepthWarper(depth, c2w[: change.get("c2w", 2)], INTRINSICS.expand(2, 3, 3))
        views.warp(torch.zeros(2, size, size, 3), 0, change.get("keys", [1]))


@pytest.mark.parametrize(
    "check, message",
    [
        ({"relative": -0.1}, "relative is -0.1; expected 0 or more"),
        ({"relative": 0.0}, "relative and absolute are both 0"),
        ({"border_px": 1.5}, "border_px is 1.5; expected a whole number"),
    ],
)
def test_checks_that_accept_nothing_are_refused(check, message):
    with pytest.raises(ValueError, match=message):
        DepthCheck(**check)
    assert bool(is_inside(torch.tensor([1.0, 1.0]), 2, 2))
