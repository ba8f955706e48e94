"""The benchmark of time and view control: which runs, which commands, which verdict."""

import json
from argparse import Namespace

import pytest

from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.vocabulary import MOTIONS


@pytest.fixture
def benchmark(load):
    return load("time_view")


@pytest.fixture
def report_of(load):
    return load("time_view_report")


def row(scene="a red cube bouncing", above=4.0, time_error=1.0, angle=15.0, turned=0.8, **values):
    world = parse_caption(scene)
    figures = {
        "pairs": 16, "psnr": 20.0 + above, "psnr_masked": 17.0, "ssim": 0.9, "ssim_masked": 0.8,
        "time_error_frames": time_error, "angle_error_deg": angle, "copy_psnr": 20.0,
        "copy_psnr_masked": 12.0, "copy_ssim": 0.8, "copy_ssim_masked": 0.6,
        "copy_time_error_frames": 4.0, "copy_angle_error_deg": 90.0,
    }  # fmt: skip
    return {
        "scene": scene, "variant": "full", "overrides": [], "embedded_weights": "x",
        "held_out": world.is_held_out or world.has_held_out_motion, "threads": 1,
        "protocols": {kind: dict(figures) for kind in ("time", "view", "both")},
        "control": {"time_error_frames": time_error, "angle_error_deg": angle},
        "reversal": {kind: {"correlation": turned, "share": 1.0} for kind in ("time", "view")},
        "identity": {"psnr": 25.0, "cells": 4}, "feature_space": "squares",
        "absent": {"lpips": "no weights"}, "steps": 2000, "seconds": 900.0, "wall_seconds": 1000.0,
    } | values  # fmt: skip


def verdicts(module, rows, kind="thresholds"):
    return {item["name"]: item for item in module.summarise(rows)[kind]}


# Runs


def test_six_scenes_show_every_motion_seen_and_held_out_in_turn(benchmark):
    scenes = [parse_caption(caption) for caption in benchmark.SCENES]
    assert [scene.caption for scene in scenes] == list(benchmark.SCENES)
    words = {item.motion for scene in scenes for item in scene.objects}
    assert len(scenes) == 6 and words == set(MOTIONS)
    held = [scene.is_held_out or scene.has_held_out_motion for scene in scenes]
    assert held == [False, True] * 3


def test_what_others_need_runs_before_them(benchmark):
    assert [run.variant for run in benchmark.planned_runs(False)] == ["full"] * 6
    runs = benchmark.planned_runs(True)
    assert len({run.tag for run in runs}) == len(runs) and {run.scene for run in runs} == {
        benchmark.ABLATED
    }
    first, last = benchmark.run_batches(runs)
    assert {run.variant for run in last} == {
        "composed by attention", "composed by guidance", *benchmark.SCHEDULE[2:],
    }  # fmt: skip
    assert first[0].variant == "full" and len(first) + len(last) == len(runs)
    assert len(benchmark.run_batches(benchmark.planned_runs(False, 2))) == 1


def test_ablations_are_those_of_the_issue(benchmark):
    keys = " ".join(key for keys in benchmark.TRAINED.values() for key in keys)
    for wanted in ("outputs=base", "outputs=bypass", "mode=literal", "unsigned", "bypass_strength",
                   "ip_adapter.scale", "input=absolute", "input=relative", "sigma_"):  # fmt: skip
        assert wanted in keys


def test_commands_train_a_scene_or_test_what_was_trained(benchmark, tmp_path):
    scene = benchmark.ABLATED
    full = benchmark.command(benchmark.Run(scene), tmp_path, ["a=1"])
    assert full[:4] == ["--config", "custom/configs/time_view_mapper.yaml", "--train",
                        "profile=embedded"]  # fmt: skip
    assert f'data.scenes=["{scene}"]' in full and full[-1] == "a=1"
    assert any("oracle" in part for part in full)
    other = benchmark.command(benchmark.Run(scene, "literal bypass"), tmp_path, [])
    assert "system.injection.mode=literal" in other and not any("oracle" in p for p in other)
    tested = benchmark.command(benchmark.Run(scene, "composed by guidance"), tmp_path, [])
    assert "--test" in tested and "system.compose.mode=guidance" in tested
    checkpoint = benchmark.trial_of(tmp_path, benchmark.Run(scene)) / "ckpts" / "last.ckpt"
    assert f"resume={checkpoint}" in tested


def test_the_schedule_hands_mappers_on(benchmark, tmp_path):
    scene = benchmark.ABLATED
    runs = [benchmark.Run(scene, variant) for variant in benchmark.SCHEDULE]
    assert benchmark.command(runs[0], tmp_path, [])[1] == "custom/configs/time_mapper.yaml"
    assert benchmark.command(runs[1], tmp_path, [])[1] == "custom/configs/view_mapper.yaml"
    with pytest.raises(RuntimeError, match="left no time mapper; run it first"):
        benchmark.command(runs[2], tmp_path, [])
    for run, kind in zip(runs, ("time", "view"), strict=False):
        folder = benchmark.trial_of(tmp_path, run) / "save"
        folder.mkdir(parents=True)
        for step in (200, 1000):
            (folder / f"{kind}-mapper-step-{step}.safetensors").touch()
    composed, trained = (benchmark.command(run, tmp_path, []) for run in runs[2:])
    assert "--test" in composed and "--train" in trained
    given = next(part for part in composed if part.startswith("system.mapper_weights=["))
    assert given.count("step-1000.safetensors") == 2 and given in trained


def test_runs_of_another_model_are_made_again(benchmark, tmp_path):
    lines = [json.dumps(row()), json.dumps(row("a pink cube growing", embedded_weights="y"))]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = benchmark.finished_rows(tmp_path, [], "x", benchmark.run_of)
    assert list(found) == [benchmark.Run("a red cube bouncing")]


def test_pictures_are_rows_of_generated_cells_above_their_truth(benchmark, tmp_path):
    import cv2
    import numpy as np

    sheet = np.zeros((3 * 64, 9 * 64, 3), np.uint8)
    for view in range(3):
        sheet[64 * view : 64 * view + 64, : 4 * 64] = 10 * view + 1
        sheet[64 * view : 64 * view + 64, 5 * 64 :] = 10 * view + 2
    cv2.imwrite(str(tmp_path / "sheet.png"), sheet)
    benchmark.write_strip(tmp_path / "strips" / "a.png", tmp_path / "sheet.png")
    strip = cv2.imread(str(tmp_path / "strips" / "a.png"))
    assert strip.shape == (benchmark.SHEET_ROWS * 64, 4 * 64, 3)
    assert strip[32::64, 32, 0].tolist() == [1, 2, 11, 12]


def test_options_of_the_command_line(benchmark):
    found = benchmark.parse_arguments(["--ablations", "--steps", "5", "--jobs", "2", "a=1"])
    assert found.overrides == ["a=1", "trainer.max_steps=5"] and found.ablations
    assert found.output.name == "time_view_ablations"
    assert benchmark.parse_arguments([]).output.name == "time_view"


# Verdicts


def test_thresholds_are_those_of_the_requirement(report_of):
    found = verdicts(report_of, [row(), row("a pink cube growing", above=1.0, seconds=1600.0)])
    time = found["fixed view, varying time: mean PSNR above the copied source, dB"]
    assert (time["value"], time["limit"], time["reached"]) == (2.5, ">= 3", False)
    assert found["mean time error, frames of 16"]["reached"]
    assert found["mean azimuth error, degrees"]["limit"] == "<= 20"
    missed = {name for name, item in found.items() if not item["reached"]}
    assert missed == {
        "fixed view, varying time: mean PSNR above the copied source, dB",
        "varying view, fixed time: mean PSNR above the copied source, dB",
        "both varying: mean PSNR above the copied source, dB",
        "longest training of a scene, s",
    }
    assert len(found) == 9


def test_one_scene_that_does_not_reverse_is_enough_to_fail(report_of):
    rows = [row(), row("a pink cube growing", turned=0.2)]
    found = verdicts(report_of, rows)
    turned = found["turned sign of time: lowest correlation with the truth's change"]
    assert (turned["value"], turned["reached"]) == (0.2, False)


def test_goals_lie_beyond(report_of):
    assert not any(item["reached"] for item in report_of.summarise([row()])["goals"])
    best = [row(above=6.5, time_error=0.5, angle=7.0)]
    assert all(item["reached"] for item in report_of.summarise(best)["goals"])


def test_what_a_run_could_not_measure_is_left_out(report_of):
    rows = [row(reversal={"time": None}, identity=None), row("a pink cube growing", turned=0.6)]
    found = verdicts(report_of, rows)
    turned = "turned sign of {}: lowest correlation with the truth's change"
    assert found[turned.format("time")]["value"] == found[turned.format("view")]["value"] == 0.6
    assert "- |" in "\n".join(report_of.run_table(rows))


# What is written


def whole(module, rows, name="time_view"):
    return {
        "benchmark": name, "circumstances": {"date": "2026-01-01"}, "jobs": 1, "planned_runs": 6,
        "scored": "cells", "feature_space": "squares", "absent": {"lpips": "no weights"},
        "runs": rows, **(module.summarise(rows) if name == "time_view" else {}),
    }  # fmt: skip


def test_the_report_has_every_method_and_says_what_is_absent(report_of):
    text = report_of.markdown(whole(report_of, [row(above=1.0)]), ["- hardware: none"])
    assert "runs: 1 of 6" in text and "- lpips is absent: no weights" in text
    assert "| fixed view, varying time | copy of the source | 20.00 | 12.00 | 0.800 |" in text
    assert "| both varying | ours | 21.00 | 17.00 | 0.900 | 0.800 | 1.00 | 15.0 |" in text
    assert "oracle token |" not in text, "it did not run"
    assert "| a red cube bouncing | no | +1.00 | +1.00 | +1.00 | 21.00 | 1.00 | 15.0 |" in text
    assert "| **no** |" in text


def test_variants_are_a_table_of_their_own(report_of):
    rows = [row(variant="full"), row(variant="literal bypass", above=-1.0)]
    text = report_of.markdown(whole(report_of, rows, "time_view_ablations"), [])
    assert text.startswith("# Variants of time and view control") and "| required |" not in text
    assert "| literal bypass | no | -1.00 |" in text


def test_a_report_is_written_with_its_picture(benchmark, tmp_path, monkeypatch, capsys):
    import cv2
    import numpy as np

    monkeypatch.setattr(benchmark, "weights", lambda: "x")
    run = benchmark.Run("a red cube bouncing")
    strip = benchmark.strip_path(tmp_path, run)
    strip.parent.mkdir()
    cv2.imwrite(str(strip), np.zeros((4 * 64, 8 * 64, 3), np.uint8))
    arguments = Namespace(ablations=False, threads=1, jobs=1, write=False)
    benchmark.write_report(arguments, tmp_path, [row()], [run])
    assert {path.name for path in tmp_path.iterdir()} == {
        "strips", "report.json", "report.md", "report.png",
    }  # fmt: skip
    assert "Time and view control" in capsys.readouterr().out
    assert benchmark.told(row()).startswith("above copy, dB: time +4.00, view +4.00, both +4.00")


def test_the_readme_gets_both_tables_once_there_are_results(load, report_of, tmp_path):
    report = load("report")
    assert "Time and view" not in report.figures(tmp_path)
    for name, title in (
        ("time_view", "**Time and view of a"),
        ("time_view_ablations", "**Variants"),
    ):
        content = whole(report_of, [row()], name)
        path = tmp_path / f"{name}_2core_2026-01-02.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        text = report.figures(tmp_path)
        assert title in text and f"results/{path.stem}.json" in text
    assert text.count("| both varying | ours |") == 1, "each table has its own result"
