"""Every image of the world against a second, plain computation of it."""

import math

import pytest
import torch

from custom.fourd.ops.camera import (
    camera_from_orbit,
    intrinsics_from_fovy,
    look_at,
    project_points,
)
from custom.fourd.ops.camera import camera_rays as rays_of_ops
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.render import (
    camera_rays,
    composite_layers,
    flow,
    project,
    render,
    render_layers,
)
from tests.fixtures import world_reference as reference

CAPTIONS = [
    "a small striped red cube spinning next to a wooden blue torus",
    "a metal yellow cone sliding on top of a large pink sphere growing",
    "a wooden green pyramid orbiting and a striped cyan cylinder bouncing",
]
SIZE = 22
FOVY = torch.full((2,), math.radians(42))
TIMES = torch.tensor([0.15, 0.7])


def cameras(first=25.0, second=200.0):
    return camera_from_orbit(torch.tensor([20.0, 5.0]), torch.tensor([first, second]), 3.0)


def near_an_edge(values, margin=1):
    """Pixels within `margin` of a change of an integer image [b h w]; rounding may move edges."""
    wide = values.double().unsqueeze(1)
    window = 2 * margin + 1
    pool = torch.nn.functional.max_pool2d
    return (pool(wide, window, 1, margin) != -pool(-wide, window, 1, margin))[:, 0]


def trace(scene, rays_o, rays_d, time, steps=500):
    """First occupied distance and object of rays [h w 3] of one image."""
    origins, directions = rays_o.reshape(-1, 3).double(), rays_d.reshape(-1, 3).double()
    distance = reference.march(
        lambda p: reference.occupant(scene, time, p) >= 0, origins, directions, 1.7, 4.3, steps
    )
    just_inside = origins + (distance.nan_to_num(posinf=0) + 1e-7)[:, None] * directions
    index = reference.occupant(scene, time, just_inside)
    index[distance.isinf()] = -1
    return distance.view(rays_d.shape[:-1]), index.view(rays_d.shape[:-1])


@pytest.fixture(scope="module", params=CAPTIONS)
def case(request):
    """A scene, its images by the renderer, and by marching."""
    scene = parse_caption(request.param)
    c2w = cameras()
    images = render(scene, c2w, FOVY, SIZE, SIZE, TIMES, samples_per_axis=1)
    rays_o, rays_d = rays_of_ops(c2w, intrinsics_from_fovy(FOVY, SIZE, SIZE), SIZE, SIZE)
    marched = [trace(scene, o, d, t) for o, d, t in zip(rays_o, rays_d, TIMES.tolist())]
    distance, index = (torch.stack(parts) for parts in zip(*marched))
    return scene, c2w, images, rays_o, rays_d, distance, index


# Cameras


def test_a_camera_by_hand():
    """At the front, 3 away, 90 degrees high: the top left pixel of 2 x 2 looks left and up."""
    c2w = camera_from_orbit(torch.zeros(1), torch.zeros(1), 3.0)
    rays_o, rays_d = camera_rays(c2w, torch.tensor([math.pi / 2]), 2, 2)
    assert rays_o[0, 0, 0].tolist() == pytest.approx([3, 0, 0], abs=1e-6)
    # Camera x is world y there; pixel centres stand half a focal length off the axis.
    length = math.sqrt(1 + 0.25 + 0.25)
    expected = [[-1, -0.5, 0.5], [-1, 0.5, 0.5], [-1, -0.5, -0.5], [-1, 0.5, -0.5]]
    for ray, direction in zip(rays_d.reshape(-1, 3).tolist(), expected):
        assert ray == pytest.approx([value / length for value in direction], abs=1e-6)


def test_rays_and_projections_are_those_of_the_camera_module():
    g = torch.Generator().manual_seed(0)
    c2w, fovy = cameras(10, 275), torch.tensor([0.4, 1.1])
    for ours, theirs in zip(
        camera_rays(c2w, fovy, 6, 9), rays_of_ops(c2w, intrinsics_from_fovy(fovy, 6, 9), 6, 9)
    ):
        torch.testing.assert_close(ours, theirs)
    points = torch.rand(2, 5, 4, 3, generator=g) * 2 - 1
    pixels, in_front = project(points, c2w, fovy, 6, 9)
    expected, depth = project_points(points.flatten(1, 2), c2w, intrinsics_from_fovy(fovy, 6, 9))
    torch.testing.assert_close(pixels.flatten(1, 2), expected, atol=1e-4, rtol=1e-5)
    assert in_front.all() and (depth > 0).all()


def test_projection_inverts_rays_and_knows_what_is_behind():
    c2w = cameras()
    rays_o, rays_d = camera_rays(c2w, FOVY, 5, 7)
    pixels, in_front = project(rays_o + 2.5 * rays_d, c2w, FOVY, 5, 7)
    columns, rows = torch.meshgrid(torch.arange(7) + 0.5, torch.arange(5) + 0.5, indexing="xy")
    grid = torch.stack((columns, rows), dim=-1)
    torch.testing.assert_close(pixels, grid.expand(2, 5, 7, 2), atol=1e-4, rtol=0)
    assert in_front.all()
    assert not project(rays_o - rays_d, c2w, FOVY, 5, 7)[1].any()


# What one image shows


def test_objects_and_depth_are_those_of_marching(case):
    _, _, images, _, _, distance, index = case
    steady = ~near_an_edge(index)
    assert steady.float().mean() > 0.6 and (index[steady] >= 0).any()
    assert torch.equal(images.object_index[steady], index[steady])
    assert (images.object_index == index).float().mean() > 0.985
    seen = (index >= 0) & (images.object_index == index)
    error = (images.depth[..., 0] - distance).abs()[seen]
    # Single precision at a distance of 3; grazing rays amplify it.
    assert error.median() < 3e-6 and (error < 1e-4).float().mean() > 0.97
    assert not images.depth[images.object_index < 0].any()


def test_points_at_depth_lie_on_the_surface_of_their_object(case):
    scene, _, images, rays_o, rays_d, _, _ = case
    points = rays_o + images.depth * rays_d
    for image, time in enumerate(TIMES.tolist()):
        for index, item in enumerate(scene.objects):
            mine = images.object_index[image] == index
            local = reference.to_object(scene, index, time, points[image][mine])
            ray = reference.turned(
                rays_d[image][mine].double(), -reference.pose(scene, index, time)[1]
            )
            assert not reference.is_inside(item.shape, local - 4e-3 * ray).any()
            inside = reference.is_inside(item.shape, local + 4e-3 * ray)
            assert inside.float().mean() > 0.85, "the rest graze a corner"


def test_normals_are_the_tangent_plane_of_neighbouring_hits(case):
    """The normal is perpendicular to two tangents found by marching rays a little to the side."""
    scene, _, images, rays_o, rays_d, distance, index = case
    normals = images.normal
    seen = images.object_index >= 0
    torch.testing.assert_close(normals[seen].norm(dim=-1), torch.ones(int(seen.sum())))
    assert not normals[~seen].any()
    assert ((normals * rays_d).sum(-1)[seen] < 1e-6).all()
    agree, total = 0, 0
    for image, time in enumerate(TIMES.tolist()):
        pixels = (index[image] >= 0) & (images.object_index[image] == index[image])
        origins, directions = rays_o[image][pixels], rays_d[image][pixels]
        here = origins.double() + distance[image][pixels][:, None] * directions.double()
        tangents = []
        for side in torch.eye(3)[:2]:
            tilted = torch.nn.functional.normalize(directions + 2e-4 * side, dim=-1)
            there, _ = trace(scene, origins, tilted, time, steps=500)
            tangents.append(origins.double() + there[:, None] * tilted.double() - here)
        crossed = torch.linalg.cross(*tangents)
        crossed = torch.nn.functional.normalize(crossed, dim=-1)
        cosine = (crossed * normals[image][pixels].double()).sum(-1).abs()
        agree, total = agree + int((cosine > 0.999).sum()), total + len(cosine)
    # Where a tangent crosses an edge or leaves the silhouette there is no single normal.
    assert total > 40 and agree / total > 0.85


def test_colour_is_the_shading_formula(case):
    """With one ray a pixel, colour is the object's colour times light and pattern at the hit."""
    scene, _, images, rays_o, rays_d, _, _ = case
    points = rays_o + images.depth * rays_d
    checked, wrong = 0, 0
    for image, time in enumerate(TIMES.tolist()):
        for row in range(0, SIZE, 2):
            for column in range(0, SIZE, 2):
                index = int(images.object_index[image, row, column])
                rgb = images.rgb[image, row, column].tolist()
                if index < 0:
                    assert rgb == [1, 1, 1]
                    continue
                item = scene.objects[index]
                local = reference.to_object(scene, index, time, points[image, row, column])
                normal = images.normal[image, row, column].tolist()
                factor = reference.shade(item, normal, local.tolist())
                expected = [factor * c for c in reference.COLOURS[item.colour]]
                checked, wrong = checked + 1, wrong + (rgb != pytest.approx(expected, abs=2e-3))
    assert checked > 20 and wrong <= checked * 0.02, "a pixel may fall on a stripe's edge"


@pytest.mark.parametrize("caption", CAPTIONS)
def test_alpha_is_the_share_of_sub_rays_that_hit(caption):
    """Coverage of 6 x 6 sub-rays against marching of the same finer grid, object by object."""
    scene, c2w, n, size = parse_caption(caption), cameras()[:1], 6, 10
    cover, _ = render_layers(scene, c2w, FOVY[:1], size, size, TIMES[:1], n)
    fine = intrinsics_from_fovy(FOVY[:1], size * n, size * n)
    rays_o, rays_d = rays_of_ops(c2w, fine, size * n, size * n)
    _, index = trace(scene, rays_o[0], rays_d[0], float(TIMES[0]), steps=400)
    for number in range(len(scene.objects)):
        mask = (index == number).float()
        expected = mask.view(size, n, size, n).mean(dim=(1, 3))
        # A sub-ray in 36 may fall on an edge; most pixels agree exactly.
        assert (cover[0, number] - expected).abs().max() <= 2.1 / n**2
        assert (cover[0, number] - expected).abs().mean() < 0.002
    images = render(scene, c2w, FOVY[:1], size, size, TIMES[:1], samples_per_axis=n)
    torch.testing.assert_close(images.alpha[0, ..., 0], cover[0].sum(dim=0))
    rough = render(scene, c2w, FOVY[:1], size, size, TIMES[:1], samples_per_axis=2)
    # Four sub-rays know a straight edge's coverage to about an eighth.
    assert (rough.alpha - images.alpha).abs().max() < 0.4
    assert (rough.alpha - images.alpha).abs().mean() < 0.025


@pytest.mark.parametrize("shape", ["sphere", "cube", "cylinder", "cone", "torus", "pyramid"])
def test_the_silhouette_is_the_shadow_of_the_surface(shape):
    """Projected surface points fall on covered pixels, and span the covered rectangle."""
    scene, size = parse_caption(f"a large red {shape} spinning"), 40
    c2w = cameras()
    images = render(scene, c2w, FOVY, size, size, TIMES, samples_per_axis=4)
    for image, time in enumerate(TIMES.tolist()):
        points = reference.to_world(scene, 0, time, reference.surface_points(shape)).float()
        pixels, _ = project_points(
            points, c2w[image], intrinsics_from_fovy(FOVY[image], size, size)
        )
        covered = images.alpha[image, ..., 0] > 0
        grown = torch.nn.functional.max_pool2d(covered[None].float(), 3, 1, 1)[0] > 0
        columns, rows = pixels.floor().long().unbind(-1)
        assert grown[rows, columns].all()
        where = covered.nonzero().flip(-1)
        low, high = where.amin(dim=0), where.amax(dim=0) + 1
        assert (pixels.amin(dim=0) - low).abs().max() < 1.0
        assert (pixels.amax(dim=0) - high).abs().max() < 1.0


def test_shading_does_not_depend_on_the_viewpoint():
    """One-pixel cameras around a scene, all aimed at one point, see the same colour."""
    for caption in ("a metal red sphere", "a wooden blue cube", "a striped green cone"):
        scene = parse_caption(caption)
        c2w = cameras()[:1]
        first = render(scene, c2w, FOVY[:1], 15, 15, samples_per_axis=1)
        rays_o, rays_d = camera_rays(c2w, FOVY[:1], 15, 15)
        points = (rays_o + first.depth * rays_d)[first.object_index == 0]
        normals, rgb = first.normal[first.object_index == 0], first.rgb[first.object_index == 0]
        g = torch.Generator().manual_seed(2)
        aside = torch.nn.functional.normalize(
            normals + 0.5 * torch.randn(normals.shape, generator=g), dim=-1
        )
        # The shapes are convex: whoever stands before a point's tangent plane sees the point.
        visible = (aside * normals).sum(-1) > 0.3
        up = torch.tensor([0.0, 0.0, 1.0]).expand_as(points[visible])
        poses = look_at((points + 2 * aside)[visible], points[visible], up)
        again = render(scene, poses, torch.full((len(poses),), 0.1), 1, 1, samples_per_axis=1)
        error = (again.rgb[:, 0, 0] - rgb[visible]).abs().amax(dim=-1)
        assert len(error) > 20 and (error < 2e-3).float().mean() > 0.97, caption


# Composition and determinism


def test_the_background_shows_through_what_alpha_leaves():
    scene, c2w = parse_caption(CAPTIONS[0]), cameras()
    white = render(scene, c2w, FOVY, 12, 12, TIMES)
    black = render(scene, c2w, FOVY, 12, 12, TIMES, background=torch.zeros(3))
    torch.testing.assert_close(white.rgb - black.rgb, (1 - white.alpha).expand(-1, -1, -1, 3))
    colours = torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.5, 0.0]])
    each = render(scene, c2w, FOVY, 12, 12, TIMES, background=colours)
    expected = black.rgb + (1 - black.alpha) * colours[:, None, None]
    torch.testing.assert_close(each.rgb, expected)
    assert white.rgb.min() >= 0 and white.rgb.max() <= 1 + 1e-6


def test_layers_by_hand():
    scene = parse_caption("a red cube and a blue ball")
    cover = torch.tensor([0.5, 0.25]).view(1, 2, 1, 1)
    shade = torch.tensor([0.4, 0.1]).view(1, 2, 1, 1)
    rgb, alpha = composite_layers(scene, cover, shade, torch.tensor([1.0, 1.0, 0.0]))
    assert alpha.item() == 0.75
    expected = [
        0.4 * 0.90 + 0.1 * 0.12 + 0.25,
        0.4 * 0.12 + 0.1 * 0.24 + 0.25,
        0.4 * 0.10 + 0.1 * 0.90,
    ]
    assert rgb.flatten().tolist() == pytest.approx(expected)


def test_equal_captions_equal_pixels_and_no_time_is_time_zero():
    c2w = cameras()
    first = render(parse_caption("a red box and a small blue ball sliding"), c2w, FOVY, 9, 9)
    second = render(
        parse_caption("The red cube next to a small blue sphere sliding."), c2w, FOVY, 9, 9,
        torch.zeros(2),
    )
    still = render(parse_caption("a red cube and a small blue sphere"), c2w, FOVY, 9, 9, TIMES)
    for name in ("rgb", "alpha", "depth", "normal", "object_index"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert torch.equal(getattr(first, name), getattr(still, name))
    moved = render(parse_caption("a red box and a small blue ball sliding"), c2w, FOVY, 9, 9, TIMES)
    assert not torch.equal(first.rgb, moved.rgb)


def test_images_of_a_batch_do_not_know_of_each_other(case):
    scene, c2w, images, *_ = case
    for image in range(2):
        one = slice(image, image + 1)
        alone = render(scene, c2w[one], FOVY[one], SIZE, SIZE, TIMES[one], samples_per_axis=1)
        torch.testing.assert_close(alone.rgb, images.rgb[one], atol=1e-5, rtol=0)
        assert torch.equal(alone.object_index, images.object_index[one])


def test_the_nearer_object_hides_the_farther():
    """From the right, the second of two neighbours covers the first; from the left, reversed."""
    scene = parse_caption("a red cube next to a blue cube")
    c2w = camera_from_orbit(torch.zeros(2), torch.tensor([90.0, -90.0]), 3.0)
    seen = render(scene, c2w, FOVY, 9, 9).object_index
    assert seen[0, 4, 4] == 1 and seen[1, 4, 4] == 0
    front = render(scene, camera_from_orbit(torch.zeros(1), torch.zeros(1), 3.0), FOVY[:1], 9, 9)
    assert front.object_index[0, 4, 2] == 0 and front.object_index[0, 4, 6] == 1
    assert front.object_index[0, 4, 4] == -1


# Flow


@pytest.fixture(scope="module", params=CAPTIONS)
def moved(request):
    scene = parse_caption(request.param)
    here, there = cameras(), cameras(55.0, 150.0)
    fovy_to, times_to = FOVY * 0.9, torch.tensor([0.4, 0.35])
    result = flow(scene, here, FOVY, TIMES, there, fovy_to, times_to, SIZE, SIZE)
    images = render(scene, here, FOVY, SIZE, SIZE, TIMES, samples_per_axis=1)
    rays_o, rays_d = camera_rays(here, FOVY, SIZE, SIZE)
    points = rays_o + images.depth * rays_d
    return scene, there, fovy_to, times_to, result, images, points


def destinations(scene, index, time, time_to, points):
    return reference.to_world(
        scene, index, time_to, reference.to_object(scene, index, time, points)
    )


def test_flow_is_where_the_formulas_take_each_point(moved):
    scene, there, fovy_to, times_to, result, images, points = moved
    assert torch.equal(result.is_surface, images.object_index >= 0)
    assert not result.optical[~result.is_surface].any() and not result.scene[
        ~result.is_surface
    ].any()
    columns, rows = torch.meshgrid(*[torch.arange(SIZE) + 0.5] * 2, indexing="xy")
    centres = torch.stack((columns, rows), dim=-1)
    for image in range(2):
        for index in range(len(scene.objects)):
            mine = images.object_index[image] == index
            start = points[image][mine].double()
            end = destinations(scene, index, float(TIMES[image]), float(times_to[image]), start)
            torch.testing.assert_close(
                result.scene[image][mine].double(), end - start, atol=2e-6, rtol=0
            )
            pixels, _ = project_points(
                end.float(), there[image], intrinsics_from_fovy(fovy_to[image], SIZE, SIZE)
            )
            torch.testing.assert_close(
                result.optical[image][mine], pixels - centres[mine], atol=2e-4, rtol=0
            )


def test_visibility_is_what_marching_to_the_point_says(moved):
    scene, there, fovy_to, times_to, result, images, points = moved
    agree, total, hidden = 0, 0, 0
    for image in range(2):
        eye = there[image, :3, 3].double()
        time_to = float(times_to[image])
        for index in range(len(scene.objects)):
            mine = images.object_index[image] == index
            if not mine.any():
                continue
            start = points[image][mine].double()
            end = destinations(scene, index, float(TIMES[image]), time_to, start)
            distance = (end - eye).norm(dim=-1)
            directions = (end - eye) / distance[:, None]
            first = reference.march(
                lambda p, at=time_to: reference.occupant(scene, at, p) >= 0,
                eye.expand_as(end), directions, 1.7, 4.5, 900,
            )
            pixels, depth = project_points(
                end.float(), there[image], intrinsics_from_fovy(fovy_to[image], SIZE, SIZE)
            )
            in_view = ((pixels >= 0) & (pixels <= SIZE)).all(-1) & (depth > 0)
            # Rays almost tangent to the surface are decided by rounding; leave a margin out.
            clear = ((first - distance).abs() < 1e-4) | (first < distance - 0.02)
            expected = (first > distance - 1e-3) & in_view
            got = result.is_visible[image][mine]
            agree += int((got == expected)[clear].sum())
            total += int(clear.sum())
            hidden += int((~expected & clear).sum())
    assert total > 60 and hidden > 0
    assert agree / total > 0.985
    assert not (result.is_visible & ~result.is_surface).any()


def test_nothing_flows_from_an_image_to_itself():
    scene, c2w = parse_caption(CAPTIONS[1]), cameras()
    same = flow(scene, c2w, FOVY, TIMES, c2w, FOVY, TIMES, SIZE, SIZE)
    assert same.optical.abs().max() < 2e-4 and same.scene.abs().max() < 1e-6
    # Points at the very rim may hide from their own ray by rounding.
    assert (same.is_visible == same.is_surface).float().mean() > 0.99


def test_scene_flow_by_hand():
    """A slide moves every point of the object alike; an object at rest does not move."""
    scene = parse_caption("a red cube sliding next to a blue sphere")
    c2w = cameras(0.0, 10.0)
    times = torch.zeros(2), torch.full((2,), 0.25)
    images = render(scene, c2w, FOVY, SIZE, SIZE)
    result = flow(scene, c2w, FOVY, times[0], c2w, FOVY, times[1], SIZE, SIZE)
    slide = result.scene[images.object_index == 0]
    torch.testing.assert_close(slide, torch.tensor([0, 0.3 * 0.62 * 0.6, 0]).expand_as(slide))
    assert result.scene[images.object_index == 1].abs().max() < 1e-6
    # To the right in the image, by focal length times displacement over depth, about.
    assert (result.optical[images.object_index == 0][:, 0] > 0.5).all()


def test_optical_flow_is_the_derivative_for_small_steps(case):
    """Half the step, half the flow: flow is smooth and starts at zero."""
    scene, c2w, images, *_ = case
    steps = [1e-2, 5e-3]
    whole, half = (
        flow(scene, c2w, FOVY, TIMES, c2w, FOVY, TIMES + step, SIZE, SIZE).optical
        for step in steps
    )
    surface = images.object_index >= 0
    assert (whole[surface] - 2 * half[surface]).abs().max() < 0.06 * whole.abs().max() + 1e-3
