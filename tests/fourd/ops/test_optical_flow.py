"""DIS against exact motion, and what is said where RAFT's library is missing."""

import importlib.util

import pytest
import torch

from custom.fourd.ops.flow_warp import valid_flow
from custom.fourd.ops.optical_flow import (
    DISFlow,
    RAFTFlow,
    estimate_both,
    make_flow_estimator,
    raft_padding,
)
from custom.fourd.world.capture import rig_capture
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.render import flow

without_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed"
)


def waves(height, width, x, y):
    """A smooth picture whose content is moved right by x and down by y pixels."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    u, v = columns - x, rows - y
    grey = 0.5 + 0.12 * (torch.sin(u / 3) + torch.sin(v / 4) + torch.sin((u + v) / 5))
    return grey[..., None].expand(height, width, 3)


@pytest.mark.parametrize("x, y", [(2.0, 0.0), (0.0, -1.5), (1.25, 1.0)])
@pytest.mark.parametrize("height, width", [(64, 80), (24, 40)])
def test_dis_finds_a_shift_with_x_first_and_y_down(x, y, height, width):
    a, b = waves(height, width, 0.0, 0.0), waves(height, width, x, y)
    found = DISFlow().estimate(a, b)
    assert found.shape == (2, height, width) and found.dtype == torch.float32
    inner = found[:, 6:-6, 6:-6]
    # Half a pixel is what a sign, an axis or a scale gone wrong would exceed.
    assert abs(float(inner[0].mean()) - x) < 0.3 and abs(float(inner[1].mean()) - y) < 0.3


def test_dis_on_a_clip_of_the_world_against_the_exact_flow():
    capture = rig_capture(parse_caption("a striped yellow sphere bouncing"), torch.zeros(1), 16, 64)
    capture.c2w, capture.frame_times = capture.c2w[2:4], capture.frame_times[2:4]
    (first, second), _ = capture.render()
    pose, fovy = capture.c2w[:1], torch.full((1,), capture.fovy_rad)
    times = capture.frame_times
    truth = flow(capture.scene, pose, fovy, times[:1], pose, fovy, times[1:], 64, 64)
    forth, back = estimate_both(DISFlow(), first, second)
    seen = truth.is_visible[0]
    error = (forth.movedim(0, -1) - truth.optical[0]).norm(dim=-1)[seen]
    moved = truth.optical[0].norm(dim=-1)[seen]
    is_valid = valid_flow(forth[None], back[None])[0][seen]
    print(f"end-point error {error.mean():.3f} px of {moved.mean():.2f} px, ", end="")
    print(f"{error[is_valid].mean():.3f} px on the {is_valid.float().mean():.0%} found valid")
    assert float(moved.mean()) > 2
    assert float(error.mean()) < 0.1 * float(moved.mean())
    assert float(is_valid.float().mean()) > 0.9


def test_a_flow_is_the_same_each_time():
    a, b = waves(32, 32, 0.0, 0.0), waves(32, 32, 1.0, 0.5)
    estimator = DISFlow("fast")
    first = estimator.estimate(a, b)
    estimator.estimate(b, a)
    assert torch.equal(estimator.estimate(a, b), first)
    assert torch.equal(DISFlow("fast").estimate(a, b), first)


def test_identities_differ_where_flows_do():
    names = {DISFlow(preset, px).identity for preset in ("fast", "medium") for px in (0, 64)}
    assert len(names) == 4


def test_rafts_padding_is_centred_and_of_its_sizes():
    assert raft_padding(64, 130) == (3, 3, 32, 32)
    assert raft_padding(129, 136) == (0, 0, 3, 4)
    for height, width in ((1, 500), (127, 128), (1014, 1352)):
        left, right, top, bottom = raft_padding(height, width)
        assert (height + top + bottom) % 8 == 0 and (width + left + right) % 8 == 0
        assert height + top + bottom >= 128 and 0 <= right - left <= 1 and 0 <= bottom - top <= 1


@without_torchvision
def test_without_torchvision_auto_is_dis_and_raft_says_what_to_do():
    assert isinstance(make_flow_estimator("auto"), DISFlow)
    for make in (RAFTFlow, lambda: make_flow_estimator("raft")):
        with pytest.raises(ValueError, match="'raft' needs torchvision.*or choose flow 'dis'"):
            make()


@pytest.mark.slow
def test_raft_finds_a_shift():
    pytest.importorskip("torchvision")
    a, b = waves(64, 136, 0.0, 0.0), waves(64, 136, 2.0, -1.0)
    found = make_flow_estimator("raft").estimate(a, b)
    assert found.shape == (2, 64, 136)
    assert float((found.mean(dim=(1, 2)) - torch.tensor([2.0, -1.0])).abs().max()) < 0.3


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda a: make_flow_estimator("farneback"),
            "'farneback'; expected one of auto, raft, dis",
        ),
        (lambda a: DISFlow("slow"), "preset is 'slow'; expected one of ultrafast, fast, medium"),
        (lambda a: DISFlow().estimate(a, a[1:]), r"\(20, 20, 3\) and \(19, 20, 3\); expected the"),
        (lambda a: DISFlow().estimate(a[..., :1], a[..., :1]), r"\(20, 20, 1\).*height, width, 3"),
    ],
)
def test_what_cannot_work_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(20, 20, 3))
