"""The exit status and the sentence of a failing launch."""

import pytest
from threestudio.launcher.main import main


@pytest.fixture
def no_gpu_selection(monkeypatch):
    # main() writes both variables; setting them first lets monkeypatch restore them.
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


def test_a_bad_command_line_is_status_2(capsys):
    assert main(["--config", "x.yaml"], root="/") == 2
    assert capsys.readouterr().err.startswith("launch.py: error: no mode given")


def test_a_bad_config_is_status_2_and_one_sentence(tmp_path, capsys, no_gpu_selection):
    (tmp_path / "x.yaml").write_text("sede: 1\n")
    assert main(["--config", str(tmp_path / "x.yaml"), "--train"], root=tmp_path) == 2
    error = capsys.readouterr().err
    assert f"launch.py: error: {tmp_path}/x.yaml:1: unknown key 'sede'" in error
    assert "Traceback" not in error


def test_a_failing_run_is_status_1_with_a_traceback_on_request(
    tmp_path, capsys, caplog, monkeypatch, no_gpu_selection
):
    def fail(*args):
        raise FileNotFoundError("the model 'owner/x' is not on this disk")

    monkeypatch.setattr("threestudio.launcher.stages.plan_stages", fail)
    argv = ["--config", "x.yaml", "--train"]
    assert main(argv, root=tmp_path) == 1
    assert capsys.readouterr().err.endswith("error: the model 'owner/x' is not on this disk\n")
    assert main([*argv, "--verbose"], root=tmp_path) == 1
    assert any(record.exc_info for record in caplog.records)


def test_an_error_of_the_code_keeps_its_traceback(tmp_path, monkeypatch, no_gpu_selection):
    def fail(*args):
        raise AttributeError("a defect")

    monkeypatch.setattr("threestudio.launcher.stages.plan_stages", fail)
    with pytest.raises(AttributeError, match="a defect"):
        main(["--config", "x.yaml", "--train"], root=tmp_path)


def test_an_error_is_told_without_credentials(tmp_path, capsys, monkeypatch, no_gpu_selection):
    monkeypatch.setenv("HF_TOKEN", "canary-value")

    def fail(*args):
        raise OSError("https://me:pass-word@hub refuses canary-value")

    monkeypatch.setattr("threestudio.launcher.stages.plan_stages", fail)
    assert main(["--config", "x.yaml", "--train"], root=tmp_path) == 1
    assert capsys.readouterr().err.endswith("https://<redacted>@hub refuses <redacted>\n")
