"""Meshes over time of a field that is known exactly: where the surface is, and its colours."""

import math

import pytest
import threestudio
import torch

from custom.fourd.renderers.scene import Scene
from custom.fourd.renderers.scene_mesh import scene_meshes, separating_density
from tests.fixtures.tiny_scenes import (
    DENSITY,
    RADIUS,
    MovingBall,
    PlaceColor,
    ball_scene,
    center_at,
)

# The box of all times is 1.6 high, of which 40 cells.
CELL = 1.8 / 40


@pytest.fixture(scope="module")
def found():
    return scene_meshes(ball_scene(), [0.0, 0.5, 1.0], resolution=40, threshold=DENSITY / 2)


def test_the_sphere_is_where_the_field_says_at_each_time(found):
    for time, mesh in zip((0.0, 0.5, 1.0), found.meshes, strict=True):
        center = center_at(torch.tensor(time))
        distance = (mesh.v_pos - center).norm(dim=-1)
        assert (distance - RADIUS).abs().max() < 0.1 * CELL
        torch.testing.assert_close(mesh.v_pos.mean(dim=0), center, atol=0.1 * CELL, rtol=0)
        corners = mesh.v_pos[mesh.t_pos_idx]
        volume = (corners[:, 0] * torch.linalg.cross(corners[:, 1], corners[:, 2])).sum() / 6
        assert float(volume) == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.03)


def test_vertices_have_the_colour_of_their_place(found):
    mesh = found.meshes[1]  # its centre is at the height where the colour changes
    far = mesh.v_pos[:, 2].abs() > 0.12
    upper = mesh.v_pos[:, 2] > 0
    red, green = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    torch.testing.assert_close(mesh.v_rgb[far & upper], red.expand(int((far & upper).sum()), 3))
    torch.testing.assert_close(mesh.v_rgb[far & ~upper], green.expand(int((far & ~upper).sum()), 3))


class ShellColor(PlaceColor):
    """Blue in the ball at time 0; white, which nothing shows, in the thin mist around it."""

    def export(self, points, **kwargs):
        inside = (points - center_at(torch.tensor(0.0))).norm(dim=-1, keepdim=True) < RADIUS + 0.04
        return {"albedo": torch.where(inside, torch.tensor([0.0, 0.0, 1.0]), torch.ones(3))}


def test_a_vertex_shows_what_a_ray_sees_and_not_the_empty_space_s_colour():
    """At a low threshold the surface lies outside of what is coloured."""
    scene = ball_scene()
    scene.material = ShellColor({})
    mesh = scene_meshes(scene, [0.0], resolution=24, threshold=DENSITY / 10).meshes[0]
    own = scene.material.export(mesh.v_pos)["albedo"]
    assert own[:, 0].mean() > 0.95 and mesh.v_rgb[:, 0].mean() < 0.5


def test_times_are_none_for_a_scene_at_rest():
    still = scene_meshes(ball_scene(), None, resolution=12, threshold=DENSITY / 2)
    at_zero = scene_meshes(ball_scene(), [0.0], resolution=12, threshold=DENSITY / 2)
    assert torch.equal(still.meshes[0].v_pos, at_zero.meshes[0].v_pos)


def test_one_threshold_for_all_times_separates_full_from_empty():
    found = scene_meshes(ball_scene(), [0.0, 1.0], resolution=20)
    assert 0.1 * DENSITY < found.threshold < 0.9 * DENSITY
    radii = [
        float((mesh.v_pos - center_at(torch.tensor(time))).norm(dim=-1).mean())
        for time, mesh in zip((0.0, 1.0), found.meshes, strict=True)
    ]
    # The density rises from a tenth to nine tenths over a shell of 0.15.
    assert radii == pytest.approx([RADIUS, RADIUS], abs=0.07)
    assert radii[0] == pytest.approx(radii[1], abs=0.005), "nothing swells or shrinks"


def test_otsu_by_hand():
    """Two densities: any threshold between them separates best, and the rule gives one."""
    values = torch.tensor([0.1] * 900 + [20.0] * 100)
    assert 0.1 < separating_density(values, 1.0) < 20.0
    # A few very dense points do not decide, as they would if densities were compared directly.
    outliers = torch.cat([values, torch.tensor([1e4] * 5)])
    assert separating_density(outliers, 1.0) < 20.0
    assert separating_density(torch.zeros(10), 1.0) == 0.0


def test_otsu_against_all_thresholds():
    """The variance between the classes at the answer is the largest that any threshold has."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([
        torch.rand(3000, generator=generator) * 2,
        8 + 6 * torch.rand(700, generator=generator),
    ])  # fmt: skip
    opacity = 1 - torch.exp(-values.double() * 0.05)

    def between(threshold):
        low = values <= threshold
        share = low.double().mean()
        return float(share * (1 - share) * (opacity[low].mean() - opacity[~low].mean()) ** 2)

    best = max(between(float(t)) for t in torch.linspace(0.1, 13.9, 200))
    assert between(separating_density(values, 1.0)) == pytest.approx(best, rel=1e-3)


def test_a_signed_distance_keeps_its_own_threshold():
    class Distance(MovingBall):
        def forward_field(self, points, frame_times=None):
            return points.norm(dim=-1, keepdim=True) - 0.5, None

        def forward_level(self, field, threshold):
            return field - threshold

    scene = Scene(Distance({"radius": 1.0}), PlaceColor({}), None, None)
    mesh = scene_meshes(scene, None, resolution=16).meshes[0]
    assert (mesh.v_pos.norm(dim=-1) - 0.5).abs().max() < 0.01


def test_a_foreign_field_without_times_is_asked_without():
    class Foreign(MovingBall):
        def forward_field(self, points):
            return super().forward_field(points)

        def export(self, points, **kwargs):
            assert "frame_times" not in kwargs
            return {"features": points}

    scene = Scene(Foreign({"radius": 1.0}), PlaceColor({}), None, None)
    first, second = scene_meshes(scene, [0.0, 1.0], 12, DENSITY / 2).meshes
    assert torch.equal(first.v_pos, second.v_pos)


def test_an_explicit_mesh_is_the_same_at_all_times():
    mesh = threestudio.models.mesh.Mesh(torch.eye(3), torch.tensor([[0, 1, 2]]))

    class Explicit(torch.nn.Module):
        def isosurface(self):
            return mesh

        def export(self, points, **kwargs):
            return {"features": points}

    found = scene_meshes(Scene(Explicit(), PlaceColor({}), None, None), [0.0, 1.0])
    assert found.meshes == [mesh, mesh] and not found.is_empty
    assert mesh.v_rgb.tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match="Linear has neither a field nor an isosurface"):
        scene_meshes(Scene(torch.nn.Linear(1, 1), None, None, None), None)


def test_nothing_at_the_threshold_gives_advice():
    empty = scene_meshes(ball_scene(), [0.0, 1.0], resolution=8, threshold=1000.0)
    assert empty.is_empty and empty.meshes == [None, None]
    low, high = empty.field_range
    assert 0 <= low < 1e-3 and DENSITY / 2 < high < DENSITY
    advice = empty.advice()
    assert "nothing reaches the threshold 1000" in advice and "mesh_threshold" in advice
    assert f"{high:.4g}" in advice
    # The middle that it proposes works.
    assert not scene_meshes(ball_scene(), [0.0], 8, (low + high) / 2).is_empty


def test_a_field_that_is_the_same_everywhere_says_so():
    class Empty(MovingBall):
        def forward_density(self, points, frame_times=None):
            return torch.zeros_like(points[..., :1])

    empty = scene_meshes(Scene(Empty({"radius": 1.0}), PlaceColor({}), None, None), [0.0], 6)
    assert empty.is_empty and "the field is 0 everywhere" in empty.advice()


def test_progress_and_refusals():
    reported = []
    scene_meshes(ball_scene(), [0.0, 0.5], 6, 1.0, reported.append)
    assert reported == [1, 2]
    with pytest.raises(ValueError, match="mesh_resolution is 1; expected at least 2"):
        scene_meshes(ball_scene(), None, resolution=1)
