"""Depth of the unedited field: on disk by field and camera, never another's, never remade later."""

import pytest
import torch

from custom.fourd.editing.field_depth import FieldDepth, field_name, render_row
from custom.fourd.renderers.scene import SceneImages
from tests.fixtures.edited_scenes import SIZE, hand_made_scene
from tests.fixtures.tiny_scenes import random_scene


def images(depth, alpha=1.0):
    ones = torch.ones(1, SIZE, SIZE, 1)
    return SceneImages(ones.expand(-1, -1, -1, 3), ones * alpha, ones * depth)


class Renders:
    """Makes depth 2 + row / 10, and counts."""

    def __init__(self):
        self.rows = []

    def __call__(self, row):
        self.rows.append(row)
        return images(2 + row / 10)


def test_each_depth_is_rendered_once(tmp_path):
    frames, renders = hand_made_scene(), Renders()
    depth = FieldDepth(tmp_path, "abc", frames, renders)
    assert depth.prepare([1, 2]) == 2 and depth.prepare([1, 2, 3]) == 1
    found = depth([1, 2, 3])
    assert found.shape == (3, SIZE, SIZE) and renders.rows == [1, 2, 3]
    # 16 bits: a thousandth of the distance is far below the warps' tolerance.
    assert torch.allclose(found[:, 0, 0], torch.tensor([2.1, 2.2, 2.3]), rtol=1e-3)
    later = FieldDepth(tmp_path, "abc", frames, None)
    assert torch.equal(later([1, 2, 3]), found)
    with pytest.raises(ValueError, match="is missing, and the field has been trained since"):
        later([4])


def test_what_is_hardly_there_has_no_depth(tmp_path):
    depth = FieldDepth(tmp_path, "abc", hand_made_scene(), lambda row: images(2.0, 0.4))
    assert not depth([0]).any()


def test_another_field_or_camera_is_another_file(tmp_path):
    frames = hand_made_scene()
    paths = [FieldDepth(tmp_path, name, frames, None).path(row) for name in "ab" for row in (0, 1)]
    assert len(set(paths)) == 4 and "camera00-time0001" in paths[1].name
    frames.c2w[0, 0, 3] += 0.1
    assert FieldDepth(tmp_path, "a", frames, None).path(0) != paths[0]


def test_a_damaged_file_is_made_again(tmp_path):
    renders = Renders()
    depth = FieldDepth(tmp_path, "abc", hand_made_scene(), renders)
    found = depth([1])
    depth.path(1).write_bytes(b"half")
    assert torch.equal(depth([1]), found) and renders.rows == [1, 1]
    assert torch.equal(FieldDepth(tmp_path, "abc", hand_made_scene(), None)([1]), found)


def test_the_name_of_a_field_is_that_of_its_weights():
    scene = random_scene()
    before = field_name(scene)
    assert field_name(random_scene()) == before, "equal weights, equal name"
    with torch.no_grad():
        next(scene.geometry.parameters()).view(-1)[0] += 1e-3
    assert field_name(scene) != before


def test_a_row_is_rendered_by_its_own_camera_and_time():
    scene, frames = random_scene(), hand_made_scene()
    found = render_row(scene, frames, 7)
    fovy = 2 * torch.atan(0.5 * SIZE / frames.intrinsics[7:8, 1, 1])
    again = scene.render(frames.c2w[7:8], fovy, SIZE, SIZE, frames.frame_times[7:8])
    assert torch.allclose(found.rgb, again.rgb, atol=1e-5)
    other = scene.render(frames.c2w[7:8], fovy, SIZE, SIZE, frames.frame_times[8:9])
    assert not torch.allclose(found.rgb, other.rgb, atol=1e-5)
