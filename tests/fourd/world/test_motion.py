"""Motions against their formulas, layouts by hand, and whether scenes fit into their box."""

import itertools
import math

import pytest
import torch

from custom.fourd.world.grammar import WorldObject, WorldScene
from custom.fourd.world.motion import object_poses, pose_of_motion, returns_to_start
from custom.fourd.world.vocabulary import MOTIONS, RELATIONS, SHAPES, SIZES
from tests.fixtures import world_reference as reference

TIMES = torch.linspace(0, 1, 17)


@pytest.mark.parametrize("motion", [None, *MOTIONS])
def test_every_motion_starts_at_rest(motion):
    offset, angle, scale = pose_of_motion(motion, torch.zeros(3))
    assert torch.equal(offset, torch.zeros(3, 3))
    assert torch.equal(angle, torch.zeros(3)) and torch.equal(scale, torch.ones(3))


@pytest.mark.parametrize("motion", [m for m in MOTIONS if m not in ("growing", "shrinking")])
def test_all_but_growing_and_shrinking_return(motion):
    offset, angle, scale = pose_of_motion(motion, torch.ones(1))
    assert offset.abs().max() < 1e-6 and abs(float(angle) % (2 * math.pi)) < 1e-6
    assert float(scale) == 1


def test_a_scene_returns_if_all_of_its_objects_do():
    for motion in (None, *MOTIONS):
        thing = WorldObject("cube", "red", motion=motion)
        last, start = (object_poses(WorldScene((thing,)), torch.full((1,), t)) for t in (1.0, 0.0))
        same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(last[0], start[0], strict=True))
        assert returns_to_start(WorldScene((thing,))) is same, motion
    sliding, growing = (WorldObject("cube", "red", motion=m) for m in ("sliding", "growing"))
    assert not returns_to_start(WorldScene((sliding, growing), "next to"))


@pytest.mark.parametrize("motion", [None, *MOTIONS])
@pytest.mark.parametrize(("count", "relation"), [(1, "next to"), (2, "next to"), (2, "on top of")])
def test_poses_are_the_formulas(motion, count, relation):
    scene = WorldScene((WorldObject("cube", "red", "small", motion=motion),) * count, relation)
    points = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double()
    poses = object_poses(scene, TIMES.double())
    assert len(poses) == count
    for index, (rotation, translation, scale) in enumerate(poses):
        for n, time in enumerate(TIMES.tolist()):
            ours = scale[n] * points @ rotation[n].T + translation[n]
            torch.testing.assert_close(ours, reference.to_world(scene, index, time, points))


def test_a_pose_by_hand():
    """A quarter turn sends the object's x axis (its front) to world y, its right seen from it."""
    scene = WorldScene(
        (WorldObject("cube", "red", "large"), WorldObject("cone", "blue", motion="spinning"))
    )
    (_, left, _), (rotation, right, scale) = object_poses(scene, torch.tensor([0.25]))
    assert left.tolist()[0] == pytest.approx([0, -0.46, 0])
    assert right.tolist()[0] == pytest.approx([0, 0.46, 0])
    assert (rotation[0] @ torch.tensor([1.0, 0, 0])).tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    assert float(scale) == pytest.approx(0.66 * 0.62)
    top, bottom = object_poses(WorldScene(scene.objects, "on top of"), torch.zeros(1))
    assert top[1].tolist()[0] == pytest.approx([0, 0, 0.46])
    assert bottom[1].tolist()[0] == pytest.approx([0, 0, -0.46])


def test_growth_ends_where_it_should():
    assert float(pose_of_motion("growing", torch.ones(()))[2]) == pytest.approx(1.35)
    assert float(pose_of_motion("shrinking", torch.ones(()))[2]) == pytest.approx(1.35**-2)
    assert float(pose_of_motion("bouncing", torch.tensor(0.25))[0][2]) == pytest.approx(0.30)


def test_motions_are_smooth_and_move():
    """A step of 1/1000 of the clip moves any point by less than 1/100; each motion moves it."""
    times = torch.linspace(0, 1, 1001).double()
    for motion in MOTIONS:
        scene = WorldScene((WorldObject("cube", "red", "large", motion=motion),))
        ((rotation, translation, scale),) = object_poses(scene, times)
        point = torch.tensor([0.6, 0.5, 0.4]).double()
        path = scale[:, None] * (rotation @ point) + translation
        assert 0 < (path[1:] - path[:-1]).norm(dim=-1).max() < 0.01
        assert (path - path[0]).norm(dim=-1).max() > 0.1


def test_an_unknown_motion_is_refused():
    with pytest.raises(ValueError, match="'flying' is not a motion of the world"):
        pose_of_motion("flying", torch.zeros(1))


# How large scenes get


def reach(shape, size, motion, count, relation):
    """Largest absolute coordinate of an object over the clip."""
    scene = WorldScene((WorldObject(shape, "red", size, motion=motion),) * count, relation)
    points = reference.surface_points(shape, n=12)
    return max(
        float(reference.to_world(scene, index, time, points).abs().max())
        for index in range(count)
        for time in (TIMES[::2].tolist() if motion else [0.0])
    )


def test_every_scene_at_rest_and_every_lone_object_fits_into_the_box():
    for shape, size, motion in itertools.product(SHAPES, SIZES, (None, *MOTIONS)):
        # A large sphere in orbit touches the box's side exactly.
        assert reach(shape, size, motion, 1, "next to") <= 1 + 1e-6
    for shape, size, relation in itertools.product(SHAPES, SIZES, RELATIONS):
        assert reach(shape, size, None, 2, relation) < 0.90


def test_every_moving_pair_fits_into_the_box():
    for shape, size, motion, relation in itertools.product(SHAPES, SIZES, MOTIONS, RELATIONS):
        assert reach(shape, size, motion, 2, relation) <= 1 + 1e-6, (shape, size, motion, relation)


@pytest.mark.parametrize("relation", RELATIONS)
def test_pairs_at_rest_do_not_touch(relation):
    for first, second in itertools.product(SHAPES, SHAPES):
        scene = WorldScene(
            (WorldObject(first, "red", "large"), WorldObject(second, "blue", "large")), relation
        )
        # Extents along the axis between the centres; the solids are convex along it.
        axis = 1 if relation == "next to" else 2
        ends = [
            reference.to_world(scene, index, 0.0, reference.surface_points(shape))[:, axis]
            for index, shape in enumerate((first, second))
        ]
        low, high = (ends[0], ends[1]) if relation == "next to" else (ends[1], ends[0])
        assert low.max() < high.min()
