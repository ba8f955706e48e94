"""Pictures of what a prior makes of the renders: the walk's laws and one by hand."""

import math

import pytest
import torch
from threestudio.models.guidance.image_distillation import ImageDistillation, ddim_walk
from threestudio.models.guidance.noise_schedule import NoiseSchedule
from threestudio.models.prompt_processors.base import PromptProcessorOutput
from threestudio.models.prompt_processors.view_directions import view_directions

ABAR = torch.linspace(0.99, 0.02, 100)


def test_a_perfect_prior_walks_straight_to_the_image():
    clean = torch.full((1, 1, 2, 2), 0.3)
    noise = torch.tensor([[[[1.0, -1.0], [0.5, 2.0]]]])
    noisy = ABAR[70].sqrt() * clean + (1 - ABAR[70]).sqrt() * noise
    visited = []

    def predict(x, timesteps):
        visited.append(int(timesteps))
        abar = ABAR[timesteps]
        torch.testing.assert_close(x, abar.sqrt() * clean + (1 - abar).sqrt() * noise)
        return noise, clean

    first, last = ddim_walk(predict, noisy, 70, ABAR, n_steps=10)
    assert visited == [70, 60, 50, 40, 30, 20, 10, 0], "multiples of ten below the image's own"
    torch.testing.assert_close(first, ABAR[60].sqrt() * clean + (1 - ABAR[60]).sqrt() * noise)
    torch.testing.assert_close(last, clean)


def test_one_step_by_hand():
    """From the first timestep there is only the end."""
    noisy = torch.full((1, 1, 1, 1), 0.8)
    first, last = ddim_walk(
        lambda x, t: (x * 0 + 0.1, x * 0.5), noisy, 0, torch.tensor([0.64, 0.36]), n_steps=2
    )
    assert float(first) == float(last) == pytest.approx(0.4)
    first, last = ddim_walk(
        lambda x, t: (x * 0 + 0.1, x * 0.5), noisy, 1, torch.tensor([0.64, 0.36]), n_steps=2
    )
    assert float(first) == pytest.approx(0.8 * 0.4 + 0.6 * 0.1)
    assert float(last) == pytest.approx(float(first) * 0.5)


class Grey(ImageDistillation):
    """A prior of pixels that takes every image for grey, whatever the text."""

    def configure(self):
        self.setup_schedule(NoiseSchedule(ABAR, "epsilon"))

    def model_output(self, noisy, timesteps, text, labels):
        abar = ABAR[timesteps].view(-1, 1, 1, 1)
        return (noisy - abar.sqrt() * 0.25) / (1 - abar).sqrt()

    def decode(self, clean):
        return clean.clamp(0, 1)


def prompt(n_tokens=2):
    directions = view_directions(45, 45, 60)
    texts = (torch.zeros(n, n_tokens, 3) for n in (1, 1, 4, 4))
    index = {d.name: i for i, d in enumerate(directions)}
    return PromptProcessorOutput(*texts, directions, index, use_perp_neg=False)


@pytest.mark.parametrize("items, count", [(2, 2), (-1, 3), (9, 3)])
def test_pictures_of_a_prior_that_sees_grey(items, count):
    g = Grey({"max_items_eval": items, "min_step_percent": 0.5, "max_step_percent": 0.5})
    angles = (torch.tensor([0.0, 15.0, 70.0]), torch.tensor([10.0, -90.0, 180.0]), torch.ones(3))
    clean = torch.rand(3, 3, 4, 4)
    score = g.score(clean, prompt(), angles)
    assert score.timesteps.tolist() == [50, 50, 50]
    torch.testing.assert_close(score.denoised, torch.full_like(clean, 0.25), atol=1e-4, rtol=0)
    shown = g.pictures(score, prompt(), angles)
    assert shown["bs"] == count and shown["noise_levels"] == [0.5] * count
    assert shown["texts"][:2] == ["n0.50\ne0\na10\nc1.00", "n0.50\ne15\na-90\nc1.00"]
    for key in ("imgs_1orig", "imgs_final"):
        grey = torch.full((count, 4, 4, 3), 0.25)
        torch.testing.assert_close(shown[key], grey, atol=1e-3, rtol=0)
    expected = score.noisy[:count].permute(0, 2, 3, 1).clamp(0, 1)
    torch.testing.assert_close(shown["imgs_noisy"], expected)
    # One step, from timestep 50 to 48, keeps the noise and lowers its share.
    step = math.sqrt(float(ABAR[48])) * 0.25 + math.sqrt(1 - float(ABAR[48])) * score.noise_pred
    torch.testing.assert_close(
        shown["imgs_1step"], step[:count].permute(0, 2, 3, 1).clamp(0, 1), atol=1e-4, rtol=0
    )


def test_what_a_subclass_must_define():
    class Nothing(ImageDistillation):
        def configure(self):
            self.setup_schedule(NoiseSchedule(ABAR, "epsilon"))

    with pytest.raises(NotImplementedError, match="Nothing defines no model_output"):
        Nothing({}).model_output(None, None, None, None)
    with pytest.raises(NotImplementedError, match="Nothing defines no decode"):
        Nothing({}).decode(None)
