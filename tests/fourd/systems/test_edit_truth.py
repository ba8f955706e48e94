"""The true edited world is found for what the world wrote, in every format, and only there."""

import math

import pytest
import torch

from custom.fourd.data.open_scene import open_scene
from custom.fourd.metrics.image_quality import psnr
from custom.fourd.metrics.warp_consistency import warped_difference
from custom.fourd.systems.edit_truth import find_truth
from custom.fourd.world.capture import path_capture
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.render import render
from custom.fourd.world.writers import write_dycheck, write_dynerf, write_video

SIZE = 24


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    scene = parse_caption("a red cube sliding")
    write_dynerf(folder / "dynerf", scene, 3, 4, SIZE)
    write_dycheck(folder / "dycheck", scene, 6, SIZE, n_val=1)
    write_video(folder / "film.mp4", path_capture(scene, 3, SIZE))
    return folder


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("dynerf", {}),
        ("dynerf", {"normalise": "llff"}),
        ("dynerf", {"downsample": 2}),
        ("dycheck", {}),
        ("film.mp4", {}),
    ],
)
def test_truth_is_the_edited_scene_seen_by_the_frames_camera(written, name, keys):
    frames = open_scene(written / name, **keys)
    truth = find_truth(written / name, frames, "make it blue")
    for row in (0, len(frames) - 1):
        blue = parse_caption("a blue cube sliding")
        c2w, fovy, time = truth._camera(row)
        expected = render(blue, c2w, fovy, frames.height, frames.width, time).rgb
        assert torch.equal(truth.render(row), expected)
        assert truth.agrees(row), "unedited, it is what was filmed"
        assert float(psnr(truth.render(row), frames.frames[row : row + 1].float() / 255)) < 25


def test_there_is_no_truth_for_other_data_instructions_or_selections(written, caplog):
    frames = open_scene(written / "dynerf")
    assert find_truth(written, frames, "make it blue") is None
    assert find_truth(written / "dynerf", frames, "make it bounce") is None
    assert find_truth(written / "dynerf", frames, "make it look like my uncle") is None
    some = open_scene(written / "dynerf", frame_list=[0, 2])
    assert find_truth(written / "dynerf", some, "make it blue") is None
    assert "the frames are not those of world.json" in caplog.text


def test_true_flow_leads_to_the_same_surface_in_time_and_between_cameras(written):
    frames = open_scene(written / "dynerf")
    truth = find_truth(written / "dynerf", frames, "make it blue")
    for row, other in ((0, 1), (0, 4)):
        flow, seen = truth.flow(row, other)
        pair = truth.render(row), truth.render(other)
        along = float(warped_difference(*pair, flow, seen))
        across = float(warped_difference(*pair, 0 * flow, seen))
        assert bool(seen.any()) and along < 0.5 * across, (row, other)


def test_of_several_answers_the_nearest_is_taken(written):
    frames = open_scene(written / "dynerf")
    truth = find_truth(written / "dynerf", frames, "give it a random color")
    assert len(truth.answers) > 3
    wanted = next(a for a in truth.answers if "yellow" in a.scene.caption)
    images = torch.cat([truth.render(row, wanted) for row in (0, 2)])
    truth.choose([0, 2], (images + 0.02).clamp(0, 1))
    assert truth.answer == wanted and math.isfinite(float(psnr(images, images).mean()))
