"""Progress lines and pictures of items, by hand."""

import io
from types import SimpleNamespace

import pytest
import torch
from threestudio.launcher.progress import ProgressDisplay

from custom.fourd.editing.options import Strength
from custom.fourd.editing.plan import Window
from custom.fourd.editing.worker import EditResult, ShownFrame
from custom.fourd.systems.edit_reporter import EditReporter, picture

ITEM = Window(id="pass0/camera03/window002", stage=1, shard=0, strength=Strength(600, 4), camera=3,
              times=(10, 11, 12), kept=(10, 11, 12), reference=9, anchor=None)  # fmt: skip


class System:
    """The savers and the trainer that a reporter uses."""

    global_step = 7

    def __init__(self, *callbacks):
        self.saved, self.trainer = [], SimpleNamespace(callbacks=list(callbacks))

    def save_image_grid(self, filename, imgs, **_):
        self.saved.append((filename, imgs))


def shown(size=8):
    image = torch.linspace(0, 1, size * size * 3).view(size, size, 3)
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[0] = True
    return ShownFrame((3, 10), image, image / 2, image / 4, mask)


def reporter(every=1, *callbacks):
    made = EditReporter(System(*callbacks), every)
    made._display = ProgressDisplay(live=False, stream=io.StringIO(), line_pause_sec=0.0)
    return made


def test_the_line_says_what_is_edited_now():
    told = reporter()
    told.wait(20)
    told.begin(ITEM, 11, 20)
    line = told._display.stream.getvalue()
    assert "edit 12/20" in line
    assert "camera 3, times 10-12, after 9, T 600 in 4 steps" in line


def test_lines_of_a_training_are_rare(caplog):
    told = reporter()
    told.train()
    told._display.pause_sec = 3600.0
    with caplog.at_level("INFO"):
        for done in range(3):
            told.begin(ITEM, done, 20)
    assert caplog.text.count("edit ") == 1, "one at once, others after a pause"


@pytest.mark.parametrize(("every", "names"), [(0, []), (1, [1, 2, 3, 4]), (2, [1, 3]), (3, [1, 4])])
def test_pictures_are_written_where_they_are_due(every, names):
    told = reporter(every)
    result = EditResult((1,), torch.zeros(1, 8, 8, 3), [shown()])
    for done in range(1, 5):
        told.end(ITEM, result, done, 4)
    expected = [f"edits/{n:04d}-pass0-camera03-window002.png" for n in names]
    assert [name for name, _ in told.system.saved] == expected
    told.end(ITEM, None, 5, 5)
    assert len(told.system.saved) == len(names), "what was found on disk was shown before"


def test_a_picture_has_original_start_result_and_mask():
    rows = picture([shown(), shown()])
    assert [len(row) for row in rows] == [2, 2, 2, 2]
    image = shown().before
    for row, expected in zip(rows, (image, image / 2, image / 4), strict=False):
        assert torch.equal(row[0]["img"], expected)
    assert rows[3][0]["img"].sum() == 8 and rows[3][0]["type"] == "grayscale"


def test_large_frames_are_shown_small():
    (before, *_) = picture([shown(512)])
    assert before[0]["img"].shape == (256, 256, 3)
    assert torch.allclose(before[0]["img"].mean(), shown(512).before.mean(), atol=1e-5)


def test_a_stop_is_asked_for_while_training_waits_and_not_later():
    signals = SimpleNamespace(signals=SimpleNamespace(requested=True))
    told = reporter(1, signals)
    assert told.should_stop() and not reporter(1, SimpleNamespace()).should_stop()
    told.train()
    assert not told.should_stop(), "the training's own loop stops after its step"
