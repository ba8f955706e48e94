import pytest
import torch
from threestudio.models.guidance.base import DiffusionGuidance
from threestudio.models.guidance.noise_schedule import NoiseSchedule


class ScheduleOnly(DiffusionGuidance):
    """A guidance with a schedule and no model."""

    def configure(self):
        self.setup_schedule(NoiseSchedule(torch.linspace(0.999, 0.001, 100), "epsilon"))


def test_range_of_timesteps_follows_its_schedule_at_any_step():
    g = ScheduleOnly({"max_step_percent": [10, 0.98, 0.5, 20, 0.6, 30]})
    for step, expected in ((0, 98), (15, 74), (20, 50), (30, 60), (99, 60), (15, 74)):
        g.update_step(0, step)
        assert g.max_step == expected
    assert g.min_step == 2


def test_both_ends_of_the_range_are_drawn_and_nothing_beyond():
    g = ScheduleOnly({"min_step_percent": 0.5, "max_step_percent": 0.53})
    drawn = g.draw_timesteps("test", 400, shared=False)
    assert sorted(set(drawn.tolist())) == [50, 51, 52, 53]
    whole = ScheduleOnly({"min_step_percent": 0.0, "max_step_percent": 1.0})
    assert whole.max_step == 99
    assert whole.draw_timesteps("test", 2000, shared=False).max() == 99


def test_ranks_share_the_shared_draw_and_split_the_others(monkeypatch):
    g = ScheduleOnly({})
    alone = g.draw_noise("noise", (4, 2))
    shared = g.draw_timesteps("t", 2, shared=True)
    own = g.draw_timesteps("t", 4, shared=False)
    monkeypatch.setenv("RANK", "1")
    assert torch.equal(g.draw_noise("noise", (2, 2)), alone[2:])
    assert torch.equal(g.draw_timesteps("t", 2, shared=True), shared)
    assert torch.equal(g.draw_timesteps("t", 2, shared=False), own[2:])


@pytest.mark.parametrize("low, high", [(-0.1, 0.5), (0.5, 1.1), (0.6, 0.5)])
def test_impossible_ranges_are_refused(low, high):
    with pytest.raises(ValueError, match=f"min_step_percent is {low} and max_step_percent {high}"):
        ScheduleOnly({"min_step_percent": low, "max_step_percent": high})


def test_the_answer_is_the_loss_with_the_clipped_gradient_and_the_range_of_the_step():
    g = ScheduleOnly({"grad_clip": [0, 10.0, 0.5, 10], "max_step_percent": 0.5})
    g.update_step(0, 10)
    latents = torch.zeros(2, 1, requires_grad=True)
    out = g.distillation("loss_here", latents, torch.tensor([[3.0], [-0.25]]))
    out["loss_here"].backward()
    # Clipped to [-0.5, 0.5]; the loss is a mean over the batch of two.
    torch.testing.assert_close(latents.grad, torch.tensor([[0.5], [-0.25]]) / 2)
    assert out["grad_norm"].item() == pytest.approx((0.5**2 + 0.25**2) ** 0.5)
    assert (out["min_step"], out["max_step"]) == (2, 50)
    assert set(out) == {"loss_here", "grad_norm", "min_step", "max_step"}


def test_a_guidance_holds_nothing_that_a_checkpoint_would_take():
    assert not isinstance(ScheduleOnly({}), torch.nn.Module)


class TestGuidedPrediction:
    """The model here returns its text: the conditional half is 3 everywhere, the other 1."""

    TEXT = torch.cat((torch.full((2, 1, 1), 3.0), torch.full((2, 1, 1), 1.0)))

    def predict(self, scale, **options):
        seen = []

        def model(halves, text):
            seen.append((halves, text.flatten().tolist()))
            return text.half()

        g = ScheduleOnly({"guidance_scale": scale})
        cond, guided = g.guided_prediction(model, self.TEXT, **options)
        assert len(seen) == 1, "the model is called once"
        return seen[0], None if cond is None else cond.unique().tolist(), guided

    @pytest.mark.parametrize(
        "scale, convention, expected",
        [
            (7.5, "standard", 1 + 7.5 * (3 - 1)),
            (7.5, "threestudio", 3 + 7.5 * (3 - 1)),
        ],
    )
    def test_both_halves_are_predicted_and_combined(self, scale, convention, expected):
        seen, cond, guided = self.predict(scale, convention=convention)
        assert seen == (2, [3.0, 3.0, 1.0, 1.0]) and cond == [3.0]
        assert guided.dtype == torch.float32 and guided.flatten().tolist() == [expected] * 2

    @pytest.mark.parametrize(
        "scale, options, rows, expected",
        [
            (1.0, {}, [3.0, 3.0], ([3.0], 3.0)),
            (0.0, {"convention": "threestudio"}, [3.0, 3.0], ([3.0], 3.0)),
            (0.0, {}, [1.0, 1.0], (None, 1.0)),
        ],
    )
    def test_a_half_that_nobody_reads_is_not_computed(self, scale, options, rows, expected):
        seen, cond, guided = self.predict(scale, **options)
        assert seen == (1, rows)
        assert (cond, guided.unique().item()) == expected

    def test_the_conditional_half_can_be_asked_for(self):
        seen, cond, guided = self.predict(0.0, needs_cond=True)
        assert seen[0] == 2 and cond == [3.0] and guided.unique().item() == 1.0

    @pytest.mark.parametrize("scale", [7.5, 1.0])
    def test_what_it_returns_may_enter_a_graph(self, scale):
        _, _, guided = self.predict(scale)
        weight = torch.ones((), requires_grad=True)
        (weight * guided).sum().backward()
        assert weight.grad == guided.sum() and not guided.requires_grad
