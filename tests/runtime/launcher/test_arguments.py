"""Flags, overrides and the sentences for what is wrong with them."""

from pathlib import Path

import pytest
from threestudio.launcher.arguments import ArgumentError, parse_arguments, select_gpus


def test_flags_and_overrides_are_separated_in_any_order():
    arguments = parse_arguments(
        ["seed=1", "--config", "a.yaml", "b.yaml", "x.y=2", "--train", "--gpu", "1,2", "p=a b=c"]
    )
    assert arguments.configs == (Path("a.yaml"), Path("b.yaml"))
    assert arguments.mode == "train" and arguments.gpu == "1,2"
    assert set(arguments.overrides) == {"seed=1", "x.y=2", "p=a b=c"}
    assert not arguments.verbose and not arguments.typecheck


def test_config_may_be_given_twice():
    arguments = parse_arguments(["--config", "a.yaml", "--train", "--config", "b.yaml"])
    assert arguments.configs == (Path("a.yaml"), Path("b.yaml"))


def test_a_file_with_an_equals_sign_is_a_file(tmp_path):
    path = tmp_path / "a=b.yaml"
    path.touch()
    arguments = parse_arguments(["--config", str(path), "--test"])
    assert arguments.configs == (path,) and arguments.overrides == ()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config", "a", "--trian"], "unknown flag '--trian'. Did you mean '--train'"),
        (["--config", "a", "--frobnicate"], "unknown flag '--frobnicate'. Run launch.py --help"),
        (
            ["--config", "a", "--train", "--trainer.max_steps=5"],
            "overrides have no dashes, write trainer.max_steps=5",
        ),
        (["--config", "a"], "no mode given; add one of --train, --validate, --test, --export"),
        (["--train"], "--config is missing"),
        (["--config", "a", "--train", "cube"], "'cube' is neither a flag nor key=value"),
        (["--config", "a", "b", "--test"], "--test takes one --config, not 2"),
        (["--config", "a", "--train", "--gpu", "first"], "--gpu is 'first'; expected ids"),
        (["--config", "a", "--train", "--gradio"], "--gradio is not provided"),
    ],
)
def test_bad_command_lines_are_one_sentence(argv, message):
    with pytest.raises(ArgumentError) as caught:
        parse_arguments(argv)
    assert message in str(caught.value)


def test_modes_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--config", "a", "--train", "--test"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_completion_script_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--print-completion", "bash"])
    assert caught.value.code == 0
    script = capsys.readouterr().out
    assert "--train" in script and "complete" in script


def test_chosen_gpus_are_made_visible():
    environment = {}
    assert select_gpus("0,2", environment) == 2
    assert environment == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0,2"}


def test_each_process_of_torchrun_has_its_gpu():
    torchrun = {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}
    environment = dict(torchrun)
    assert select_gpus("0", environment) == 4
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    environment = dict(torchrun)
    assert select_gpus("3,5", environment) == 4
    assert environment["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_visible_devices_win_over_the_flag():
    environment = {"CUDA_VISIBLE_DEVICES": "5,6,7"}
    assert select_gpus("0", environment) == 3
    assert environment["CUDA_VISIBLE_DEVICES"] == "5,6,7"


def test_an_empty_variable_counts_as_unset():
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    assert select_gpus("3", environment) == 1
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
