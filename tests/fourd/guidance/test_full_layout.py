import pytest

from tests.benchmarks.full_layout_two_steps import two_steps
from tests.benchmarks.full_size_mvdream_call import one_call


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


def check_call(report):
    assert report["loss"] > 0 and report["gradient_norm"] > 0
    assert report["views"] == 4 and report["seconds"]["forward"] > 0


def test_one_call_on_a_converted_checkpoint_in_tiny(tmp_path):
    check_call(one_call(tmp_path, full=False))


@pytest.mark.slow
def test_one_call_on_a_converted_full_size_checkpoint(tmp_path):
    report = one_call(tmp_path, full=True)
    check_call(report)
    assert report["unet_parameters_millions"] == pytest.approx(867.6, abs=0.1)
    assert report["original_tensors"] == 690 + 248 + 294 + 12 and report["peak_memory_gb"] < 20
