"""A teacher of time and view words for the training of the embedded image model.

The U-Net of a time or view mapper is frozen: whatever a mapper can make it do, its text pathway
must have learned before. So while the image model is trained, the placeholders of its prompts
carry codes of the target's scene time and azimuth, in the way in which a mapper's words enter
(`TextInjection`): a base of fixed length in place of the token's embedding, and a bypass on its
values. The codes are linear in low harmonics, the same for every scene, layer and noise level. They
are thrown away with the training: a mapper finds words of its own, from images alone.

A placeholder that is told nothing stands for its super-category, and then nothing changes: the
target has the time, or the azimuth, of the image prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from custom.fourd.diffusion.layer_contexts import LayerContexts
from custom.fourd.mappers.composition import TIME, VIEW
from custom.fourd.mappers.mapper import MapperOutput
from custom.fourd.mappers.text_injection import TextInjection, unit_length

TIME_HARMONICS, AZIMUTH_HARMONICS = (1, 2), (1, 2)
BYPASS_SHARE = 0.5
"""Of the samples: told by base and bypass; the others by the base alone."""
NOISY_SHARE, MOST_NOISE, WARM_NOISE = 0.7, 4.0, 0.8
"""Of the codes: disturbed by a random direction of up to this length, theirs being 1, in the
training and in its warm-up. A mapper's words begin far from any code, and must still be heard."""


class ControlTeacher(nn.Module):
    """Codes of scene times and azimuths.

    Args:
        width: of the text encoder's tokens.

    Random: initial weights from torch's global generator.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time = nn.Linear(1 + 2 * len(TIME_HARMONICS), 2 * width, bias=False)
        self.view = nn.Linear(2 * len(AZIMUTH_HARMONICS), 2 * width, bias=False)

    def forward(
        self, frame_times: Float[Tensor, "b"], azimuths_rad: Float[Tensor, "b"]
    ) -> dict[str, Float[Tensor, "b two d"]]:
        """Base and bypass of each placeholder, at length 1."""
        turns = 2 * math.pi * frame_times
        time = torch.cat((2 * frame_times[:, None] - 1, harmonics(turns, TIME_HARMONICS)), dim=1)
        view = harmonics(azimuths_rad, AZIMUTH_HARMONICS)
        return {
            TIME: unit_length(self.time(time).unflatten(1, (2, -1))),
            VIEW: unit_length(self.view(view).unflatten(1, (2, -1))),
        }


def taught_contexts(
    injection: TextInjection,
    prompts: list[str],
    codes: Mapping[str, Float[Tensor, "b two d"]],
    told: Mapping[str, Bool[Tensor, "b"]],
    n_layers: int,
    generator: torch.Generator | None = None,
    most_noise: float = MOST_NOISE,
) -> LayerContexts:
    """Keys and values of prompts whose placeholders carry codes where they are told.

    Args:
        injection: of the text encoder, with the placeholders of the prompts.
        prompts: full prompts.
        codes: base and bypass of each placeholder, at length 1.
        told: which samples hear each placeholder's code.
        n_layers: of the denoiser; all are given the same.
        generator: source of disturbances and of the choice of bypasses; None leaves all codes as
            they are.
        most_noise: length of the largest disturbance.
    """
    words = {}
    for placeholder, code in codes.items():
        device, heard = code.device, told[placeholder].to(code.device).unsqueeze(-1)
        has_bypass: Tensor | bool = True
        if generator is not None:
            noise = torch.randn(code.shape, generator=generator).to(device)
            drawn = torch.rand((3, len(code), 1), generator=generator).to(device)
            size = most_noise * drawn[0] * (drawn[1] < NOISY_SHARE)
            code = unit_length(code + size.unsqueeze(-1) * unit_length(noise))
            has_bypass = drawn[2] < BYPASS_SHARE
        table = injection.encoder.embeddings.token_embedding.weight
        neutral = table[injection.super_ids[placeholder]]
        base = torch.where(heard, code[:, 0] * neutral.detach().norm(), neutral)
        # A bypass of length 0 adds nothing.
        bypass = code[:, 1] * (heard & has_bypass)
        words[placeholder] = MapperOutput(base.unsqueeze(0), bypass.unsqueeze(0))
    contexts = injection.contexts(injection.tokenize(prompts), words)
    return LayerContexts(
        contexts.keys.expand(n_layers, -1, -1, -1), contexts.values.expand(n_layers, -1, -1, -1)
    )


def harmonics(angles: Float[Tensor, "b"], numbers: tuple[int, ...]) -> Float[Tensor, "b n"]:
    """Cosine and sine of multiples of angles in radians."""
    parts = [function(k * angles) for k in numbers for function in (torch.cos, torch.sin)]
    return torch.stack(parts, dim=1)
