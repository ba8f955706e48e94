"""The text-to-4D benchmark's own arithmetic: which prompts, which verdict, what is written."""

import json

import pytest
import torch

from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.vocabulary import MOTIONS, SHAPES


@pytest.fixture
def benchmark(load):
    return load("text_to_4d")


@pytest.fixture
def report_of(load):
    return load("text_to_4d_report")


def row(
    prompt="a red cube bouncing", psnr=21.0, static=17.0, correlation=0.95, ratio=1.0, **values
):
    scene = parse_caption(prompt)
    words = dict.fromkeys(item.motion for item in scene.objects if item.motion)
    facts = {
        "prompt": prompt, "seed": 0, "objects": len(scene.objects),
        "held_out": scene.is_held_out or scene.has_held_out_motion,
        "held_out_appearance": scene.is_held_out, "held_out_motion": scene.has_held_out_motion,
        "psnr": psnr, "psnr_best_static": static, "psnr_stage_1": 15.0, "psnr_white": 9.0,
        "alpha_iou": 0.9, "correlation": correlation, "amplitude_ratio": ratio,
        "motion": {w: {"correlation": correlation, "amplitude_ratio": ratio} for w in words},
        "seconds": 300.0, "seconds_stage_1": 100.0, "seconds_stage_3": 200.0,
        "wall_seconds": 400.0, "peak_memory_gb": 1.0, "overrides": [],
        "embedded_weights": ["x", "y"],
    }  # fmt: skip
    return facts | values


def verdicts(module, rows, kind="thresholds"):
    return {item["name"]: item for item in module.summarise(rows)[kind]}


# Prompts and views


def test_half_of_the_twelve_prompts_are_held_out(benchmark):
    scenes = [parse_caption(prompt) for prompt in benchmark.PROMPTS]
    assert len(set(benchmark.PROMPTS)) == 12
    held = [scene for scene in scenes if scene.is_held_out or scene.has_held_out_motion]
    assert len(held) == 6
    assert any(scene.is_held_out for scene in held)
    assert any(scene.has_held_out_motion for scene in held)
    assert sum(len(scene.objects) == 1 for scene in scenes) == 10


def test_every_motion_is_shown_by_a_seen_and_by_a_held_out_prompt(benchmark):
    shown = {True: set(), False: set()}
    for prompt in benchmark.PROMPTS:
        scene = parse_caption(prompt)
        words = {item.motion for item in scene.objects if item.motion}
        assert words, prompt
        shown[scene.is_held_out or scene.has_held_out_motion] |= words
    assert shown[True] == shown[False] == set(MOTIONS)


def test_the_prompts_are_canonical_and_show_every_shape(benchmark):
    scenes = [parse_caption(prompt) for prompt in benchmark.PROMPTS]
    assert [scene.caption for scene in scenes] == list(benchmark.PROMPTS)
    assert {item.shape for scene in scenes for item in scene.objects} == set(SHAPES)


def test_spins_are_of_shapes_whose_silhouette_turns(benchmark):
    objects = [item for prompt in benchmark.PROMPTS for item in parse_caption(prompt).objects]
    spinning = {item.shape for item in objects if item.motion == "spinning"}
    assert spinning <= {"cube", "pyramid", "torus"}


def test_views_are_those_of_neither_validation_nor_test(benchmark):
    from custom.fourd.systems.motion_evaluation import ViewTimeGrid

    grid = ViewTimeGrid.around(benchmark.N_AZIMUTHS, benchmark.N_TIMES, 8)
    assert all(azimuth % 90 and azimuth % 7.5 for azimuth in grid.azimuths_deg)
    assert grid.shape == (8, 16)
    assert max(benchmark.SHEET_VIEWS) < 8 and max(benchmark.SHEET_TIMES) < 16


def test_runs_of_another_video_prior_are_made_again(benchmark, tmp_path):
    lines = [json.dumps(row()), json.dumps(row("a pink cube growing", embedded_weights=["x", "z"]))]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = benchmark.finished_rows(tmp_path, [], ["x", "y"])
    assert list(found) == [benchmark.Run("a red cube bouncing", 0)]


def test_hashes_of_both_priors_are_read(load, tmp_path):
    module = load("circumstances")
    manifest = tmp_path / "MANIFEST.json"
    name = "unet/diffusion_pytorch_model.safetensors"
    content = {"video": {"files": {name: {"sha256": "0123456789abcdef"}}}}
    manifest.write_text(json.dumps(content), encoding="utf-8")
    assert module.embedded_weights(manifest, "video") == "0123456789ab"
    assert module.embedded_weights(manifest) is None
    assert module.embedded_weights(tmp_path / "missing.json", "video") is None


def test_the_picture_shows_each_camera_above_its_truth(benchmark, tmp_path):
    import cv2

    times = torch.arange(16.0).view(1, 16, 1, 1, 1).expand(8, 16, 2, 2, 3) / 16
    benchmark._write_strip(tmp_path / "strip.png", times, torch.ones_like(times))
    picture = cv2.imread(str(tmp_path / "strip.png"))
    assert picture.shape == (2 * benchmark.SHEET_ROWS, 2 * 8, 3)
    expected = [round(255 * index / 16) for index in range(0, 16, 2)]
    assert picture[0, ::2, 0].tolist() == picture[4, ::2, 0].tolist() == expected
    assert (picture[2:4] == 255).all()


# Verdicts


def test_a_scene_must_beat_the_best_static_picture_where_much_moves(report_of):
    rows = [row(psnr=20.0), row("a yellow sphere bouncing", psnr=18.0, static=18.0)]
    rows.append(row("a yellow cone shrinking", psnr=22.0, static=22.5))
    found = verdicts(report_of, rows)
    large = found["above the best static picture, where that is below 20 dB: mean, dB"]
    assert (large["value"], large["reached"]) == (1.5, False)  # (3 + 0) / 2
    small = found["above the best static picture elsewhere: lowest, dB"]
    assert (small["value"], small["reached"]) == (-0.5, False)
    assert found["mean PSNR, dB"]["value"] == 20.0 and found["mean PSNR, dB"]["reached"]


def test_every_motion_has_its_own_bound_and_that_of_a_spin_is_lower(report_of):
    rows = [row(correlation=0.75), row("a cyan cube spinning", correlation=0.75)]
    found = verdicts(report_of, rows)
    assert not found["correlation, bouncing"]["reached"]
    assert found["correlation, spinning"]["reached"]
    assert found["correlation, spinning"]["limit"] == ">= 0.7"
    assert "correlation, growing" not in found


def test_means_of_a_motion_are_over_prompts(report_of):
    rows = [row(correlation=0.9, ratio=1.2), row("a yellow sphere bouncing", correlation=0.7)]
    assert report_of.by_motion(rows)["bouncing"] == pytest.approx(
        {"correlation": 0.8, "amplitude_ratio": 1.1}
    )


@pytest.mark.parametrize(("ratio", "missed"), [(0.6, "lowest"), (1.5, "highest")])
def test_amplitudes_are_bounded_on_both_sides_run_by_run(report_of, ratio, missed):
    found = verdicts(report_of, [row(), row("a pink cube growing", ratio=ratio)])
    assert not found[f"{missed} amplitude ratio"]["reached"]
    assert sum(not item["reached"] for item in found.values()) == 1


def test_a_motion_that_no_camera_measured_is_left_out(report_of):
    unknown = row("a pink cube growing", correlation=None, ratio=None)
    found = report_of.summarise([row(), unknown])
    assert found["groups"]["all"]["correlation"] == 0.95
    assert found["motions"]["growing"] == {}
    assert found["groups"]["held out"]["correlation"] is None
    assert "| - | - |" in "\n".join(report_of.group_table(found))


def test_time_is_that_of_the_whole_command(report_of):
    found = verdicts(report_of, [row(wall_seconds=1201.0)])
    assert not found["longest run from words to evaluated scene, s"]["reached"]
    goals = verdicts(report_of, [row(wall_seconds=599.0, psnr=24.5)], "goals")
    assert all(item["reached"] for item in goals.values()) and len(goals) == 2


# What is written


def whole(module, rows):
    return {"circumstances": {"date": "2026-01-01"}, "jobs": 1, "planned_runs": 12, "views": "8",
            "runs": rows, **module.summarise(rows)}  # fmt: skip


def test_the_report_says_what_was_not_reached_and_what_is_held_out(report_of):
    rows = [row(psnr=18.0), row("a pink cube growing"), row("a yellow sphere bouncing")]
    text = report_of.markdown(whole(report_of, rows), ["- hardware: none"])
    assert "runs: 3 of 12" in text and "- hardware: none" in text
    assert "| mean PSNR, dB | >= 24 | 20.00 | **no** |" in text
    assert "| a pink cube growing | motion | 21.00 | 17.00 | 15.00 |" in text
    assert "| a yellow sphere bouncing | appearance |" in text
    assert "| a red cube bouncing | no |" in text


def test_the_readme_gets_a_section_once_there_is_a_result(load, report_of, tmp_path):
    report = load("report")
    assert "Moving scenes" not in report.figures(tmp_path)
    name = "text_to_4d_2core_2026-01-02"
    (tmp_path / f"{name}.json").write_text(json.dumps(whole(report_of, [row()])), encoding="utf-8")
    (tmp_path / f"{name}.png").write_bytes(b"")
    text = report.figures(tmp_path)
    assert "**Moving scenes from words" in text and f"results/{name}.png" in text
    assert "| seen | 1 | 21.00 | 17.00 | 15.00 | 9.00 | 0.900 | 0.95 | 1.00 | 100 | 200 |" in text


def test_a_sheet_of_taller_strips(load, tmp_path):
    import cv2
    import numpy as np

    module = load("text_to_3d_report")
    cv2.imwrite(str(tmp_path / "strip.png"), np.zeros((4 * 16, 8 * 16, 3), np.uint8))
    module.write_contact_sheet(tmp_path / "sheet.png", {"one": tmp_path / "strip.png"}, 4)
    cell = module.SHEET_CELLS_PX[0]
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[0] == 4 * cell + 18


# A real checkpoint


def test_a_checkpoint_is_measured_and_pictured(benchmark, monkeypatch, tmp_path):
    """A scene that two steps made moves nowhere: what stage 1 left is all there is."""
    from tests.fixtures.launched import trained

    run = trained()
    monkeypatch.setattr(benchmark, "SIZE_PX", 12)
    monkeypatch.setattr(benchmark, "N_AZIMUTHS", 3)
    strip = tmp_path / "strips" / "one.png"
    values = benchmark.evaluate(run.checkpoint, run.checkpoint, "a red cube sliding", strip)
    assert strip.is_file()
    assert values["psnr"] == pytest.approx(values["psnr_stage_1"], abs=1e-3)
    assert values["psnr_min"] <= values["psnr"] < values["psnr_best_static"]
    assert values["amplitude_ratio"] < 0.05 and values["motion"].keys() == {"sliding"}
    assert {"alpha_iou", "ssim", "psnr_white", "psnr_first_frame", "correlation"} <= values.keys()
    json.dumps(values, allow_nan=False)
