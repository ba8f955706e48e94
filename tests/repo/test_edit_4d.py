"""The editing benchmark's own arithmetic: which edits, what is compared, which verdict."""

import json

import numpy as np
import pytest
import torch

from custom.fourd.world.capture import arc_azimuths, rig_capture
from custom.fourd.world.edits import EditedScene, parse_instruction
from custom.fourd.world.grammar import parse_caption

PALETTE = "give it a random palette"


@pytest.fixture
def benchmark(load):
    return load("edit_4d")


@pytest.fixture
def report_of(load):
    return load("edit_4d_report")


@pytest.fixture(scope="module")
def capture():
    return rig_capture(parse_caption("a large red cube spinning"), arc_azimuths(3), 4, 16)


def row(instruction="make it green", variant="full", psnr=24.0, **values):
    parsed = parse_instruction(instruction)
    group = "several answers" if parsed.random else "shape" if parsed.shape else "look"
    facts = {
        "caption": "a large red cube spinning", "instruction": instruction, "variant": variant,
        "group": group, "held_out": False, "overrides": [], "embedded_weights": "x",
        "psnr": psnr, "psnr_unedited": 12.0, "temporal_error_ratio": 1.1, "view_error_ratio": 1.2,
        "edits_temporal_error": 0.02, "edits_temporal_ratio": 1.5, "edit_seconds": 90.0,
        "wall_seconds": 300.0, "fit_wall_seconds": 200.0,
    }  # fmt: skip
    return facts | values


def fit(psnr=30.0, **values):
    facts = {"caption": "a large red cube spinning", "held_out": False, "psnr": psnr,
             "psnr_best_static": 20.0, "ssim": 0.97, "depth_error": 0.01, "seconds": 150.0,
             "wall_seconds": 200.0}  # fmt: skip
    return facts | values


def verdicts(module, edits, fits=(), kind="thresholds"):
    return {item["name"]: item for item in module.summarise(list(fits), edits)[kind]}


# Which edits


def test_two_of_six_instructions_are_held_out_and_every_requirement_has_one(benchmark):
    edits = [benchmark.Edit(*edit) for edit in benchmark.EDITS]
    assert len(set(edits)) == 6
    held = [edit for edit in edits if benchmark.is_held_out(edit)]
    assert {benchmark.group_of(edit) for edit in held} == {"look", "shape"} and len(held) == 2
    groups = [benchmark.group_of(edit) for edit in edits]
    assert (groups.count("look"), groups.count("shape")) == (3, 2)
    styles = [parse_instruction(edit.instruction).style for edit in edits]
    assert sum(style is not None for style in styles) == 1


def test_scenes_move_were_seen_and_are_changed_a_lot(benchmark, capture):
    for caption in {caption for caption, _ in benchmark.EDITS}:
        scene = parse_caption(caption)
        assert scene.caption == caption and not scene.is_held_out
        assert not scene.has_held_out_motion and any(item.motion for item in scene.objects)
    rows = benchmark.camera_rows(capture, 0)
    before = benchmark.true_frames(capture, rows, EditedScene(capture.scene))
    for answer in benchmark.answers_of(benchmark.Edit(*benchmark.EDITS[0])):
        after = benchmark.true_frames(capture, rows, answer)
        assert float(benchmark.psnr(before, after).mean()) < 19


def test_every_instruction_runs_whole_before_any_ablation(benchmark):
    runs = benchmark.planned_edits()
    assert len(runs) == len({run.tag for run in runs}) == 24
    assert {run.variant for run in runs[:6]} == {"full"}
    assert set(benchmark.KEYS) == {run.variant for run in runs}


def test_ablations_set_keys_that_edits_have(benchmark):
    from threestudio.utils.config import parse_structured

    from custom.fourd.editing.options import edit_options
    from custom.fourd.guidance.anchor_instructpix2pix_guidance import AnchorInstructPix2PixGuidance

    for variant, keys in benchmark.KEYS.items():
        values = {"edit": {}, "guidance": {}}
        for key in keys:
            name, word = key.removeprefix("system.").split("=")
            part, field = name.split(".")
            values[part][field] = {"false": False}.get(word, word)
        guidance = parse_structured(AnchorInstructPix2PixGuidance.Config, values["guidance"])
        assert (guidance.timestep_spacing, guidance.shared_noise) == ("leading", 0.0)
        options = edit_options(values["edit"])
        assert options.use_flow == (variant != "no flow")
        assert options.use_depth == (variant != "no depth")
        assert (options.attention == "none") == (variant == "frame by frame")


# What is compared


def test_rows_of_a_journal_are_those_of_the_truth(benchmark, tmp_path):
    """A frame's row in the videos, as the edit reads them, is its row in the capture."""
    from custom.fourd.data.open_scene import open_scene
    from custom.fourd.world.capture import read_truth
    from custom.fourd.world.writers import write_dynerf

    write_dynerf(tmp_path / "videos", parse_caption("a red cube"), 3, 2, 16)
    frames, capture = open_scene(tmp_path / "videos"), read_truth(tmp_path / "videos")
    assert torch.equal(frames.camera_ids, capture.camera_ids)
    assert torch.equal(frames.time_ids, capture.time_ids)
    assert (
        frames.held_out.nonzero().flatten().tolist() == benchmark.camera_rows(capture, 0).tolist()
    )


def test_the_newest_edit_of_a_frame_counts(benchmark, capture, tmp_path):
    (tmp_path / "items").mkdir()
    lines = [{"format": 1}]
    for number, rows in enumerate(([4, 5], [5, 6])):
        np.save(tmp_path / "items" / f"round-{number}.npy",
                np.full((2, 16, 16, 3), number, np.float16))  # fmt: skip
        lines.append({"item": f"round/{number}", "rows": rows, "step": 0, "sha256": ""})
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (tmp_path / "journal.jsonl").write_text(text, encoding="utf-8")
    found = benchmark.edited_frames(tmp_path, capture)
    assert {key: float(image.mean()) for key, image in found.items()} == {4: 0, 5: 1, 6: 1}


def test_true_edits_agree_with_the_truth_and_other_answers_along_time_do_not(benchmark, tmp_path):
    capture = rig_capture(parse_caption("a large red cube sliding"), arc_azimuths(2), 6, 32)
    edit = benchmark.Edit(capture.scene.caption, PALETTE)
    answers = benchmark.answers_of(edit)
    rows = benchmark.camera_rows(capture, 1)

    def consistency(name, choose):
        images = torch.cat([
            benchmark.true_frames(capture, row[None], answers[choose(int(row))]) for row in rows
        ])  # fmt: skip
        folder = tmp_path / name
        (folder / "items").mkdir(parents=True)
        np.save(folder / "items" / "all.npy", images.numpy().astype(np.float16))
        line = {"item": "all", "rows": rows.tolist(), "step": 0, "sha256": ""}
        text = f"{json.dumps({'format': 1})}\n{json.dumps(line)}\n"
        (folder / "journal.jsonl").write_text(text, encoding="utf-8")
        return benchmark.consistency_of_edits(folder, capture, edit)

    same = consistency("same", lambda row: 2)
    assert same["edits_psnr"] > 60
    assert same["edits_temporal_ratio"] == pytest.approx(1.0, abs=0.02)
    mixed = consistency("mixed", lambda row: row % len(answers))
    assert mixed["edits_temporal_ratio"] > 10


def test_the_nearest_answer_is_the_one_that_images_show(benchmark, capture):
    edit = benchmark.Edit(capture.scene.caption, PALETTE)
    rows = benchmark.camera_rows(capture, 0)
    for answer in benchmark.answers_of(edit):
        images = benchmark.true_frames(capture, rows, answer)
        assert benchmark.nearest_answer(capture, rows, images, edit) == answer


# Verdicts


def test_looks_and_shapes_have_their_own_bounds_and_ablations_none(report_of):
    rows = [row(psnr=22.0), row("make it yellow", psnr=19.0), row(variant="no flow", psnr=9.0)]
    rows.append(row("turn it into a cylinder", psnr=18.5))
    found = verdicts(report_of, rows, [fit(), fit(26.9)])
    looks = found["colour and style edits: mean PSNR, dB"]
    assert (looks["value"], looks["reached"]) == (20.5, False)
    shapes = found["shape edits: mean PSNR, dB"]
    assert (shapes["value"], shapes["limit"], shapes["reached"]) == (18.5, ">= 19", False)
    field = found["fitted field on the held-out camera: lowest PSNR, dB"]
    assert (field["value"], field["reached"]) == (26.9, False)
    assert found["longest fit and edit of a scene, s"]["value"] == 500.0


def test_consistency_is_the_worst_whole_run(report_of):
    rows = [row(temporal_error_ratio=1.31), row("make it yellow", view_error_ratio=None)]
    rows.append(row(variant="no depth", view_error_ratio=9.0))
    found = verdicts(report_of, rows)
    assert not found["error along time over the truth's: highest"]["reached"]
    between = found["error between cameras over the truth's: highest"]
    assert between["value"] == 1.2 and between["reached"]


def test_frames_edited_alone_are_compared_where_several_answers_are_right(report_of):
    rows = [row(PALETTE), row(PALETTE, "frame by frame", edits_temporal_error=0.05)]
    rows += [row(), row(variant="frame by frame", edits_temporal_error=9.0)]
    name = "several answers: edits' error along time, frame by frame over full"
    assert verdicts(report_of, rows)[name]["value"] == 2.5
    assert name not in verdicts(report_of, rows[:1] + rows[2:])


def test_full_is_held_against_the_best_variant_over_what_all_have_run(report_of):
    rows = [
        row(variant=variant, psnr=psnr)
        for variant, psnr in zip(report_of.VARIANTS, (24.0, 24.3, 20.0, 24.8), strict=True)
    ]
    rows += [row("make it yellow", psnr=1.0), row(PALETTE, "no flow", psnr=90.0)]
    found = verdicts(report_of, rows)["exact edits: best variant's mean PSNR above full, dB"]
    assert (found["value"], found["reached"]) == (0.8, False)
    assert report_of.behind_best(rows[:2]) is None


def test_goals_are_of_whole_exact_edits(report_of):
    rows = [row(psnr=26.0), row("make it yellow", psnr=24.5, held_out=True), row(PALETTE, psnr=5.0)]
    found = verdicts(report_of, rows, kind="goals")
    assert found["exact edits: mean PSNR, dB"]["reached"]
    assert not found["exact edits, held out: mean PSNR, dB"]["reached"]


def test_the_report_holds_one_table_of_ablations(report_of):
    rows = [row(), row(variant="no flow", psnr=21.0, view_error_ratio=None), row(PALETTE)]
    whole = {"circumstances": {"date": "2026-01-01"}, "jobs": 2, "planned_edits": 24, "views": "1",
             "fits": [fit()], "edits": rows, **report_of.summarise([fit()], rows)}  # fmt: skip
    text = report_of.markdown(whole, ["- hardware: none"])
    assert "| no flow | look | 1 | 21.00 | 12.00 | 1.10 | - | 1.50 | 90 | 300 |" in text
    assert "| full | several answers | 1 |" in text and "- edits: 3 of 24" in text
    assert "| a large red cube spinning | no | 30.00 | 20.00 | 0.970 | 1.0% | 150 | 200 |" in text
    assert "| shape edits" not in text and "- hardware: none" in text


def test_the_readme_gets_verdicts_ablations_and_the_editors_own_means(load, report_of, tmp_path):
    rows = [row(psnr=20.0), row("turn it into a cylinder")]
    content = {"circumstances": {"date": "2026-01-01"}, **report_of.summarise([fit()], rows)}
    path = tmp_path / "edit_4d_2core_2026-01-01.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    sampled = {"sampler": "DDIM", "means": {"seen": 25.0}, "unedited": {"seen": 14.0}}
    path = tmp_path / "sample_edit_2core_2026-01-01.json"
    path.write_text(json.dumps(sampled), encoding="utf-8")
    text = load("report").figures(tmp_path)
    assert "| colour and style edits: mean PSNR, dB | >= 21 | 20.00 | **no** |" in text
    assert "| full | shape | 1 | 24.00 |" in text
    assert "| seen | 25.00 | 14.00 |" in text
