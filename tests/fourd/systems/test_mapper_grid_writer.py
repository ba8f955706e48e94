"""Files of a grid of time x view: what lies where, and that nothing is written over."""

import json
from pathlib import Path

import cv2
import pytest
import torch
from threestudio.utils.saving import SaverMixin

from custom.fourd.systems.mapper_grid import GridOptions
from custom.fourd.systems.mapper_grid_writer import GridWriter
from tests.fixtures.mapper_scenes import Shades, plan_of, scene_truth


class Saver(SaverMixin):
    true_global_step = 7


def saver(folder):
    made = Saver()
    made.set_save_dir(folder)
    return made


@pytest.fixture(scope="module")
def truth():
    return scene_truth("a red cube sliding")


def test_rows_are_views_and_columns_times_beside_the_truth(truth, tmp_path):
    plan = plan_of(truth, n_times=4, n_views=2)
    options = GridOptions(n_times=4, n_views=2, seed=5)
    (facts,) = GridWriter(saver(tmp_path), Shades(), options).write(plan)
    folder = tmp_path / "it7-grid" / "a_red_cube_sliding" / "0-a_red_cube_sliding"
    assert tmp_path / facts["folder"] == folder
    sheet = cv2.imread(str(folder / "sheet.png"))[..., ::-1] / 255
    assert sheet.shape == (2 * 16, (4 + 1 + 4) * 16, 3)
    for v in range(2):
        for t in range(4):
            assert sheet[16 * v + 8, 16 * t + 8] == pytest.approx([t / 4, v / 2, 0.5], abs=0.01)
            true = sheet[16 * v : 16 * v + 16, 16 * (5 + t) : 16 * (6 + t)]
            assert abs(torch.from_numpy(true.copy()) - plan.truth[t, v]).max() < 0.01
    assert (sheet[:, 64:80] == 1).all()
    names = {path.name for path in folder.iterdir()}
    videos = {f"time-at-view{v:02d}.mp4" for v in range(2)}
    videos |= {f"view-at-time{t:02d}.mp4" for t in range(4)}
    assert names == {"sheet.png", "grid.json", "cells", *videos}
    written = json.loads((folder / "grid.json").read_text())
    assert written["times"] == [0, 0.25, 0.5, 0.75] and written["azimuths_deg"] == [0, 180]
    assert written["psnr"] == pytest.approx(facts["psnr"]) and written["prompt"] == plan.caption


def test_videos_sweep_time_and_view(truth, tmp_path):
    import imageio.v3 as iio

    plan = plan_of(truth, n_times=4, n_views=2)
    (facts,) = GridWriter(saver(tmp_path), Shades(), GridOptions()).write(plan)
    frames = iio.imread(tmp_path / facts["folder"] / "time-at-view01.mp4", plugin="pyav")
    assert frames.shape == (4, 16, 32, 3)
    reds = frames[:, 8, 8, 0] / 255
    assert reds == pytest.approx([0, 0.25, 0.5, 0.75], abs=0.08)
    turns = iio.imread(tmp_path / facts["folder"] / "view-at-time00.mp4", plugin="pyav")
    assert turns[:, 8, 8, 1] / 255 == pytest.approx([0, 0.5], abs=0.08)


def test_edited_prompts_have_grids_of_their_own_and_no_truth(truth, tmp_path):
    controls = Shades()
    options = GridOptions(n_times=2, n_views=1, prompts=["{caption}", "{noun} made of wood"])
    plan = plan_of(truth, n_times=2, n_views=1)
    facts = GridWriter(saver(tmp_path), controls, options).write(plan)
    assert controls.prompts == ["a red cube sliding", "red cube sliding made of wood"]
    assert facts[0]["psnr"] is not None and facts[1]["psnr"] is None
    sheet = cv2.imread(str(tmp_path / facts[1]["folder"] / "sheet.png"))
    assert sheet.shape == (16, 32, 3)
    assert not list((tmp_path / facts[1]["folder"]).glob("view-at*")), "one view sweeps nothing"


def test_nothing_is_written_over(truth, tmp_path):
    plan = plan_of(truth, n_times=1, n_views=1)
    options = GridOptions(n_times=1, n_views=1)
    for name in ("it7-grid", "it7-grid-2", "it7-grid-3"):
        (facts,) = GridWriter(saver(tmp_path), Shades(), options).write(plan)
        assert Path(facts["folder"]).parts[0] == name
