import json

import pytest

from custom.fourd.scripts.doctor_timing import estimate, measured, memory_seen_gb


def write_result(folder, name, groups, hardware="two cores"):
    content = {"circumstances": {"hardware": hardware}, "groups": groups}
    (folder / name).write_text(json.dumps(content))


@pytest.fixture
def results(tmp_path):
    one = {"seconds": 60.0, "peak_memory_gb": 0.5, "steps_per_second": 5.0}
    two = {"seconds": 75.0, "peak_memory_gb": 0.4, "steps_per_second": 4.0}
    write_result(tmp_path, "text_to_3d_2core_2026-01-01.json", {"a": {**one, "seconds": 999}})
    write_result(tmp_path, "text_to_3d_2core_2026-02-01.json", {"one": one, "two": two})
    (tmp_path / "text_to_3d_2core_2026-03-01.json").write_text('{"groups": {}}')
    return tmp_path


def test_the_newest_readable_result_counts_by_its_slowest_group(results):
    seen = measured("text_to_3d", results)
    assert (seen.seconds, seen.steps_per_second, seen.peak_memory_gb) == (75.0, 4.0, 0.5)
    assert seen.source == "text_to_3d_2core_2026-02-01.json" and seen.hardware == "two cores"
    assert measured("text_to_4d", results) is None


@pytest.mark.parametrize("steps, words", [(300, "75 s"), (2400, "10 min"), (28800, "2.0 h")])
def test_an_estimate_scales_with_the_steps_and_names_the_machine(results, steps, words):
    text = estimate("embedded", [("fourdfy_stage_1", steps)], results)
    source = "two cores; text_to_3d_2core_2026-02-01.json"
    assert text == f"fourdfy_stage_1: about {words} ({source})"


def test_what_was_not_measured_is_said_so(results, tmp_path):
    text = estimate("embedded", [("fourdfy_stage_3", 300), ("mine", 5)], results)
    assert text == "fourdfy_stage_3: not measured; mine: not measured"
    assert "A100" in estimate("paper", []) and "not measured" in estimate("low_vram", [])
    assert estimate("mine", []) == "not measured"
    assert memory_seen_gb(results) == (0.5, "text_to_3d_2core_2026-02-01.json")
    (empty := tmp_path / "empty").mkdir()
    assert memory_seen_gb(empty) is None


def test_the_committed_results_are_read():
    seen = measured("text_to_3d")
    assert seen is not None and seen.seconds > 1 and seen.steps_per_second > 0.1
