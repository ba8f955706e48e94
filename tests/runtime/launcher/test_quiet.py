import logging
import warnings

import pytest
from threestudio.launcher.quiet import silence_lightning


@pytest.fixture(autouse=True)
def restore():
    names = [name for name in logging.root.manager.loggerDict if "lightning" in name]
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_lightnings_tips_are_silent_and_its_warnings_and_our_lines_are_not(caplog):
    chatter = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    ours = logging.getLogger("pytorch_lightning")
    ours.setLevel(logging.INFO)
    silence_lightning()
    chatter.info("GPU available: False")
    chatter.warning("a true problem")
    ours.info("resuming")
    assert "GPU available" not in caplog.text
    assert "a true problem" in caplog.text and "resuming" in caplog.text


def test_useless_warnings_are_ignored_and_others_shown():
    silence_lightning()
    with warnings.catch_warnings(record=True) as caught:
        silence_lightning()
        warnings.warn("The 'train_dataloader' does not have many workers, slow", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["something else"]


def test_verbose_lets_everything_through(caplog):
    chatter = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    chatter.setLevel(logging.INFO)
    silence_lightning(verbose=True)
    chatter.info("GPU available: False")
    assert "GPU available" in caplog.text
