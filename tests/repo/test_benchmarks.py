"""The benchmarks' own arithmetic: which prompts, which views, how values become a verdict."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.vocabulary import COLOURS, SHAPES, SIZES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def text_to_3d(load):
    return load("text_to_3d")


@pytest.fixture
def report(load):
    return load("report")


def row(prompt="a red cube", seed=0, psnr=25.0, **values):
    scene = parse_caption(prompt)
    facts = {
        "prompt": prompt, "seed": seed, "objects": len(scene.objects),
        "held_out": scene.is_held_out, "psnr": psnr, "psnr_white": 9.0, "psnr_object": 18.0,
        "psnr_object_white": 3.0, "psnr_wrong_prompt": 12.0, "psnr_min": psnr - 2, "ssim": 0.9,
        "alpha_iou": 0.95, "alpha_iou_min": 0.9, "seconds": 100.0, "wall_seconds": 130.0,
        "steps_per_second": 3.0, "peak_memory_gb": 1.0, "overrides": [], "embedded_weights": "x",
    }  # fmt: skip
    return facts | values


def verdicts(module, rows):
    return {item["name"]: item for item in module.summarise(rows)["thresholds"]}


def test_half_of_the_sixteen_prompts_are_held_out(text_to_3d):
    scenes = [parse_caption(prompt) for prompt in text_to_3d.PROMPTS]
    assert len(set(text_to_3d.PROMPTS)) == 16
    for count, held in ((1, 5), (2, 3)):
        group = [scene for scene in scenes if len(scene.objects) == count]
        assert len(group) == 2 * held
        assert sum(scene.is_held_out for scene in group) == held


def test_the_prompts_show_every_shape_colour_and_size(text_to_3d):
    objects = [item for prompt in text_to_3d.PROMPTS for item in parse_caption(prompt).objects]
    assert {item.shape for item in objects} == set(SHAPES)
    assert {item.colour for item in objects} == set(COLOURS)
    assert {item.size for item in objects} == set(SIZES)
    assert not any(item.motion for item in objects)


def test_prompts_are_written_as_the_grammar_writes_them(text_to_3d):
    assert [parse_caption(prompt).caption for prompt in text_to_3d.PROMPTS] == list(
        text_to_3d.PROMPTS
    )


def test_every_prompt_runs_once_before_any_runs_again(text_to_3d):
    runs = text_to_3d.planned_runs()
    assert len(runs) == len(set(runs)) == 16 + 4 * 2
    assert [run.seed for run in runs[:16]] == [0] * 16
    assert len({run.tag for run in runs}) == 24


@pytest.mark.parametrize("prompt", ["a red cube", "a large pink pyramid on top of a blue torus"])
def test_a_wrong_prompt_changes_shape_and_colour_of_every_object(text_to_3d, prompt):
    right, wrong = parse_caption(prompt), parse_caption(text_to_3d.wrong_prompt(prompt))
    assert wrong.relation == right.relation
    for one, other in zip(right.objects, wrong.objects, strict=True):
        assert one.shape != other.shape and one.colour != other.colour and one.size == other.size


def test_views_are_those_of_neither_validation_nor_test(text_to_3d):
    for azimuth in text_to_3d.AZIMUTHS_DEG:
        assert azimuth % 90 and azimuth % 7.5
    c2w, fovy = text_to_3d.evaluation_cameras()
    assert c2w.shape == (24, 4, 4)
    assert torch.allclose(c2w[:, :3, 3].norm(dim=1), torch.tensor(3.0))
    heights = c2w[:, 2, 3].reshape(3, 8)[:, 0] / 3
    assert torch.allclose(heights, torch.tensor([5.0, 15.0, 25.0]).deg2rad().sin(), atol=1e-6)
    assert fovy[0].item() == pytest.approx(math.radians(40))


def test_finished_runs_are_skipped_and_a_cut_line_is_not(text_to_3d, tmp_path, monkeypatch):
    monkeypatch.setattr(text_to_3d, "embedded_weights", lambda: "x")
    lines = [json.dumps(row()), json.dumps(row(seed=1, embedded_weights="older"))]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines) + '\n{"prompt": "a re', encoding="utf-8")
    assert list(text_to_3d.finished_rows(tmp_path, [])) == [text_to_3d.Run("a red cube", 0)]
    assert text_to_3d.finished_rows(tmp_path, ["trainer.max_steps=4"]) == {}


def test_runs_are_recorded_as_they_finish_and_a_failure_is_not(text_to_3d, tmp_path, capsys):
    def job(run):
        if run.seed == 1:
            raise RuntimeError("out of paper")
        return row(run.prompt, run.seed)

    runs = [text_to_3d.Run("a red cube", seed) for seed in (0, 1, 2)]
    text_to_3d.run_all(runs, tmp_path, job, jobs=2, deadline=math.inf)
    written = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert {item["seed"] for item in written} == {0, 2}
    assert "FAILED a red cube (seed 1): out of paper" in capsys.readouterr().out


def test_no_run_starts_after_the_deadline(text_to_3d, tmp_path):
    runs = [text_to_3d.Run("a red cube", 0)]
    text_to_3d.run_all(runs, tmp_path, lambda run: pytest.fail("started"), 1, deadline=0)
    assert not (tmp_path / "runs.jsonl").exists()


def test_means_are_over_prompts_and_worst_over_runs(load):
    module = load("text_to_3d_report")
    rows = [row(psnr=20.0), row(seed=1, psnr=30.0), row("a yellow sphere", psnr=35.0)]
    group = module.summarise(rows)["groups"]["one object"]
    assert group["psnr"] == 30.0  # (mean(20, 30) + 35) / 2
    assert group["psnr_worst_run"] == 20.0
    assert module.summarise(rows)["seed_spread_db"] == {"a red cube": 10.0}


def test_thresholds_are_those_of_the_requirement(load):
    module = load("text_to_3d_report")
    pair, held_pair = "a red cube next to a blue sphere", "a red cube next to a green torus"
    rows = [row(psnr=26.0), row("a yellow sphere", psnr=24.0), row(pair, psnr=22.0)]
    rows.append(row(held_pair, psnr=21.0, alpha_iou=0.85, seconds=400.0, psnr_wrong_prompt=18.0))
    found = verdicts(module, rows)
    assert found["one object: mean PSNR, dB"]["value"] == 25.0
    assert found["one object: mean PSNR above the white image, dB"]["value"] == 16.0
    assert found["one object: held-out behind seen, dB"] == {
        "name": "one object: held-out behind seen, dB", "limit": "<= 2", "value": 2.0,
        "reached": True,
    }  # fmt: skip
    # The mean IoU is (3 * 0.95 + 0.85) / 4 = 0.925.
    missed = {name for name, item in found.items() if not item["reached"]}
    assert missed == {
        "mean silhouette IoU",
        "worst silhouette IoU",
        "right prompt above a wrong one, worst run, dB",
        "longest training, s",
    }
    assert module.summarise([row()])["thresholds"][-1]["name"] == "longest training, s"


def test_the_report_says_what_was_not_reached(load):
    module = load("text_to_3d_report")
    rows = [row(psnr=18.0)]
    whole = {
        "circumstances": {"date": "2026-01-01"}, "jobs": 1, "planned_runs": 2, "views": "8",
        "runs": rows, **module.summarise(rows),
    }  # fmt: skip
    text = module.markdown(whole, ["- hardware: none"])
    assert "| one object: worst PSNR, dB | >= 19 | 18.00 | **no** |" in text
    assert "runs: 1 of 2" in text and "- hardware: none" in text


def test_the_contact_sheet_stays_below_its_limit(load, tmp_path):
    import cv2
    import numpy as np

    module = load("text_to_3d_report")
    noise = np.random.default_rng(0).integers(0, 255, (256, 1024, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "strip.png"), noise)
    strips = {f"prompt {i}": tmp_path / "strip.png" for i in range(3)}
    module.write_contact_sheet(tmp_path / "sheet.png", strips)
    assert (tmp_path / "sheet.png").stat().st_size <= module.LARGEST_SHEET_BYTES
    width = cv2.imread(str(tmp_path / "sheet.png")).shape[1]
    assert width % (2 * module.VIEWS_PER_STRIP) == 0


def test_a_strip_of_few_cells_is_not_stretched(load, tmp_path):
    import cv2
    import numpy as np

    module = load("text_to_3d_report")
    black = np.zeros((128, 64, 3), dtype=np.uint8)  # one render above its truth
    cv2.imwrite(str(tmp_path / "one.png"), black)
    cv2.imwrite(str(tmp_path / "row.png"), np.tile(black, (1, module.VIEWS_PER_STRIP, 1)))
    strips = {name: tmp_path / f"{name}.png" for name in ("one", "row")}
    module.write_contact_sheet(tmp_path / "sheet.png", strips)
    sheet = cv2.imread(str(tmp_path / "sheet.png"))[20:]  # below the labels
    half = sheet.shape[1] // 2
    cell = half // module.VIEWS_PER_STRIP
    assert not sheet[:, :cell].any() and (sheet[:, cell:half] == 255).all()
    assert not sheet[:, half:].any()


def test_a_step_is_divided_into_parts_that_sum_to_it(load):
    module = load("step_clock")
    clock = module.StepClock()
    images = torch.ones(2, requires_grad=True)
    for _ in range(4):
        with clock.part("data"):
            pass
        loss = module.BackwardMark.apply(images * 2, clock).sum()
        clock.backward_began = clock.step_began
        loss.backward()
        clock.end_step()
    assert images.grad.tolist() == [8.0, 8.0]
    assert all("guidance, backward" in step for step in clock.steps)
    table = clock.table()
    assert sum(table[part] for part in module.PARTS) == pytest.approx(table["total"])


def test_the_readme_holds_the_figures_of_the_results(report, root):
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert report.with_figures(readme, report.figures()) == readme, (
        "run python tests/benchmarks/report.py --write"
    )


def test_figures_come_from_the_newest_result(report, load, tmp_path):
    assert report.figures(tmp_path) == "No result is committed yet.\n"
    rows = [row(psnr=21.0)]
    module = load("text_to_3d_report")
    for date, psnr in (("2026-01-02", 21.0), ("2026-01-01", 99.0)):
        rows = [row(psnr=psnr)]
        content = {"circumstances": {"date": date, "commit": "abc"}, **module.summarise(rows)}
        path = tmp_path / f"text_to_3d_2core_{date}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
    text = report.figures(tmp_path)
    assert "| one object | 1 | 21.00 |" in text and "99.00" not in text and "commit abc" in text


def test_a_readme_without_marks_is_refused(report):
    with pytest.raises(ValueError, match="README.md lacks the lines .* put them back"):
        report.with_figures("# Title", "figures")


@pytest.mark.parametrize("name", ["text_to_3d", "text_to_4d", "edit_4d", "stage_1_step", "report"])
def test_each_explains_itself_from_any_folder(name, tmp_path):
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--help"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


def test_a_stage_3_step_is_timed_with_every_sampler_and_guided_by_the_first(load, monkeypatch):
    script = load("stage_3_step")
    assert script.cases_of(["cpu", "torch"], ["auto", "nerfacc"], True) == [
        ("cpu", "auto", True),
        ("torch", "auto", True),
        ("cpu", "auto", False),
        ("cpu", "nerfacc", False),
        ("torch", "auto", False),
        ("torch", "nerfacc", False),
    ]
    assert not any(guided for *_, guided in script.cases_of(["cpu"], ["auto"], False))
    monkeypatch.setattr("threestudio.stand_ins.finder.is_installed", lambda name: True)
    assert script.default_samplers(torch.device("cuda")) == ["auto", "nerfacc"]
    assert script.default_samplers(torch.device("cpu")) == ["auto"]
