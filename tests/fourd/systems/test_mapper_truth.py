"""True cells as candidates, against the world's own renderer."""

import torch

from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.render import render
from tests.fixtures.mapper_scenes import scene_truth


def test_images_are_the_worlds():
    truth = scene_truth("a red cube sliding")
    rgb, alpha = truth.images([(2, 1), (0, 3)])
    cameras = truth.source.cameras
    for row, (time_id, camera_id) in enumerate([(2, 1), (0, 3)]):
        expected = render(
            parse_caption("a red cube sliding"),
            cameras.c2w[camera_id : camera_id + 1], cameras.fovy[:1], 16, 16,
            torch.tensor([time_id / 8]), torch.ones(3),
        )  # fmt: skip
        assert (rgb[row] - expected.rgb[0]).abs().max() < 2 / 255
        assert (alpha[row] - expected.alpha[0]).abs().max() < 1 / 255


def test_every_true_image_shows_itself():
    truth = scene_truth("a red cube sliding")
    for time_id in range(8):
        image, _ = truth.images([(time_id, 1)])
        assert truth.times(1).find(truth.features(image)[0], time_id) == (time_id, 0)
    for camera in range(4):
        image, _ = truth.images([(3, camera)])
        assert truth.views(3, camera).find(truth.features(image)[0], camera) == (camera, 0)


def test_gaps_are_frames_around_a_loop_and_degrees():
    truth = scene_truth("a red cube sliding")
    assert truth.times(0).gaps[0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    assert truth.views(0, 0).gaps[0].tolist() == [0, 90, 180, 90]
    growing = scene_truth("a red cube growing")
    assert growing.times(0).gaps[0].tolist() == list(range(8))


def test_the_halves_of_a_bounce_look_alike():
    """Its height is sin^2 of one turn, so times k, 4 - k and k + 4 of 8 are one."""
    alike = scene_truth("a red cube bouncing").times(0).look_alike
    assert torch.nonzero(alike[1]).flatten().tolist() == [1, 3, 5, 7]
    assert torch.nonzero(alike[2]).flatten().tolist() == [2, 6]


def test_candidates_are_kept():
    truth = scene_truth()
    assert truth.times(0) is truth.times(0)
    assert truth.views(1, 0) is truth.views(1, 3)
    assert truth.views(1, 0) is not truth.views(2, 0)
    assert truth.level_cameras(2) == [0, 1, 2, 3]
