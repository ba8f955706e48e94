"""The benchmarks' clock: where a step's time goes, counted by hand."""

import pytest
import torch


@pytest.fixture
def clock(load):
    """A clock whose time is a number of seconds that the test sets."""
    made = load("step_clock").StepClock()
    made.seconds = 0.0
    made.read = lambda: made.seconds
    made.step_began = 0.0
    return made


def spend(clock, seconds):
    """Let time pass."""
    clock.seconds += seconds


def test_parts_add_up_and_the_remainder_is_the_rest(clock):
    for _ in range(2):
        with clock.part("data"):
            spend(clock, 0.25)
    clock.timed("optimizer", spend)(clock, 0.125)
    spend(clock, 0.5)
    clock.end_step()
    assert clock.steps == [{"data": 500.0, "optimizer": 125.0, "rest": 500.0, "total": 1125.0}]


@pytest.mark.parametrize("n_steps, left_out", [(3, 0), (4, 1), (12, 3), (400, 8)])
def test_a_quarter_of_the_steps_but_at_most_eight_warm_up(load, n_steps, left_out):
    assert load("step_clock").warm_up_steps(n_steps) == left_out


def test_a_table_is_the_mean_of_one_kind_after_the_warm_up(clock):
    for index, kind in enumerate(("video", "video", "multi_view", "video")):
        clock.note(kind=kind)
        with clock.part("data"):
            spend(clock, 2.0**index)
        clock.end_step()
    assert clock.table("video")["data"] == (2000.0 + 8000.0) / 2
    assert clock.table("multi_view")["total"] == 4000.0
    assert clock.table()["total"] == (2000.0 + 4000.0 + 8000.0) / 3


class OneStepSystem:
    """A system whose parts take known times: rendering 1 s, U-Net 2 s, all of guidance 5 s."""

    def __init__(self, clock):
        self.clock = clock
        self.renderer = torch.nn.Module()
        self.renderer.forward = self.render
        self.unet = torch.nn.Identity()
        self.unet.forward = lambda rgb: spend(clock, 2.0)

    def render(self):
        spend(self.clock, 1.0)
        rgb = torch.ones((1, 2, 3, 3), requires_grad=True) * 1.0
        rgb.register_hook(lambda grad: spend(self.clock, 8.0))
        return {"comp_rgb": rgb, "opacity": rgb[..., :1], "ray_indices": torch.zeros(7)}

    def drawn_guidance(self, kind):
        return self, "prompts"

    def __call__(self, rgb):
        spend(self.clock, 3.0)
        self.unet.forward(rgb)
        rgb.register_hook(lambda grad: spend(self.clock, 4.0))
        return rgb.sum()

    def do_update_step(self, epoch, step):
        spend(self.clock, 0.5)


def test_a_step_is_split_between_rendering_and_guidance(clock, load):
    system = OneStepSystem(clock)
    load("step_clock").instrument(system, clock)
    for _ in range(2):  # hooks of the first step must not count twice in the second
        system.do_update_step(0, 0)
        out = system.renderer.forward()
        guidance, prompts = system.drawn_guidance("video")
        loss = guidance(out["comp_rgb"])
        clock.backward_began = clock.now()
        loss.backward()
        clock.add("rendering, backward", clock.now() - clock.backward_began)
        clock.end_step()
    assert prompts == "prompts"
    assert clock.steps[1] == clock.steps[0] == {
        "occupancy update": 500.0,
        "rendering, forward": 1000.0,
        "guidance, U-Net": 2000.0,
        "guidance, rest of forward": 3000.0,
        "guidance, backward": 4000.0,
        "rendering, backward": 8000.0,
        "rest": 0.0,
        "total": 18500.0,
        "kind": "video",
        "rays": 6,
        "samples": 7,
    }  # fmt: skip


def test_renders_of_an_evaluation_belong_to_no_step(clock, load):
    """They hold no samples, and may come after the last step."""
    system = OneStepSystem(clock)
    system.renderer.forward = lambda: {"comp_rgb": torch.ones(1), "opacity": torch.ones(1)}
    load("step_clock").instrument(system, clock)
    system.renderer.eval()
    assert set(system.renderer.forward()) == {"comp_rgb", "opacity"}
    assert "rendering, forward" not in clock.current


def test_lines_show_each_part_with_its_share(clock, load):
    with clock.part("data"):
        spend(clock, 0.25)
    spend(clock, 0.75)
    clock.end_step()
    lines = load("step_clock").lines_of({"all": clock.table()})
    assert "| data | 250.0 | 25% |" in lines
    assert lines[-1] == "| steps per second | 1.00 | |"
