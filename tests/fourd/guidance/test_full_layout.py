import pytest

from tests.benchmarks.full_layout_two_steps import two_steps


def check(report):
    assert report["moved"] and len(report["losses"]) == 2
    assert all(loss == loss and loss > 0 for loss in report["losses"])


def test_two_steps_on_folders_of_the_real_layout_in_tiny(tmp_path):
    check(two_steps(tmp_path, full=False))


@pytest.mark.slow
def test_two_steps_on_full_size_random_weights(tmp_path):
    report = two_steps(tmp_path, full=True)
    check(report)
    assert report["parameters_millions"] == pytest.approx(867.6, abs=0.1)
    assert report["peak_memory_gb"] < 20
