"""What a tool answers to the shell."""

import pytest
from threestudio.utils.pretrained import ModelUnavailableError

from custom.fourd.scripts.exit_status import run_tool


def refuse(error):
    def work():
        raise error

    return work


def test_done_is_zero_and_says_nothing(capsys):
    done = []
    assert run_tool("tool", lambda: done.append(1)) == 0
    assert done == [1] and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [ValueError, ModelUnavailableError])
def test_a_refusal_is_one_sentence(kind, capsys):
    assert run_tool("tool", refuse(kind("the size is 0; expected 1 or more."))) == 1
    assert capsys.readouterr().err == "tool: the size is 0; expected 1 or more.\n"


def test_a_fault_of_the_tool_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_tool("tool", refuse(ZeroDivisionError()))
