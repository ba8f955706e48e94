"""Memory of denoising in pieces, at the published size; what it computes is shown beside `edit`."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from threestudio.models.guidance.noise_schedule import noise_schedule

from custom.fourd.diffusion.edit_denoiser import ATTENTIONS, EditDenoiser, EditInputs
from custom.fourd.scripts.live_bytes import FusedAttention, LiveBytes
from tests.fixtures.edit_folders import FULL_EDIT_UNET
from tests.fixtures.model_folders import TINY_UNET

SCHEDULE = noise_schedule(
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
)
MIB = 2**20


def inputs(frames, size, text, device="cpu", dtype=torch.float32):
    latents = torch.zeros(frames, 4, *size, device=device)
    return EditInputs(latents, latents, torch.zeros(3, 77, text, device=device, dtype=dtype))


def on_meta(config):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).half().eval().requires_grad_(False)
    return EditDenoiser(unet, SCHEDULE, 1.0, "anchor")


def peak(denoiser, frames, chunk_size, size, text):
    """Bytes beside the weights at the highest, in one step."""
    given = inputs(frames, size, text, "meta", torch.float16)
    with FusedAttention(), LiveBytes() as live:
        denoiser.denoise(given, [481], (7.5, 1.5), chunk_size)
    return live.peak


def test_memory_depends_on_the_pieces_and_hardly_on_the_frames():
    denoiser = on_meta({**TINY_UNET, "in_channels": 8})
    small, whole, many = (
        peak(denoiser, frames, chunk_size, (32, 32), 24)
        for frames, chunk_size in ((6, 3), (6, 18), (12, 3))
    )
    assert small < 0.5 * whole and many < 1.3 * small


def test_memory_at_the_published_size():
    """Frames of 512 x 512 pixels in fp16, one at a time beside the kept anchor: below 800 MiB."""
    found = peak(on_meta(FULL_EDIT_UNET), 2, 3, (64, 64), 768)
    assert 200 * MIB < found < 800 * MIB, found / MIB


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_features_are_freed_in_the_end(attention):
    unet = UNet2DConditionModel(**{**TINY_UNET, "in_channels": 8}).eval()
    denoiser = EditDenoiser(unet, SCHEDULE, 1.0, attention)
    given = inputs(2, (8, 8), 24)
    denoiser.denoise(given, [11, 1], (7.5, 1.5), 4)
    assert denoiser.shared is None or not (denoiser.shared.kept or denoiser.shared.before)
    with pytest.raises(RuntimeError):
        wrong = EditInputs(given.latents, given.conditions, given.text[:, :, :5])
        denoiser.denoise(wrong, [11, 1], (7.5, 1.5), 4)
    assert denoiser.shared is None or not (denoiser.shared.kept or denoiser.shared.before)


def test_an_unknown_attention_is_refused():
    unet = UNet2DConditionModel(**TINY_UNET)
    with pytest.raises(ValueError, match="attention is 'own'; expected one of anchor, anchor_self"):
        EditDenoiser(unet, SCHEDULE, 1.0, "own")


@pytest.mark.parametrize("shares_norms", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    ("scales", "branches"), [((7.5, 1.5), 3), ((7.5, 1.0), 2), ((1.5, 1.5), 2), ((1.0, 1.0), 1)]
)
def test_branches_without_a_weight_are_not_computed(
    attention, scales, branches, shares_norms, monkeypatch
):
    """The same as with all three, in a share of the images."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel(**{**TINY_UNET, "in_channels": 8}).eval()
    denoiser = EditDenoiser(unet, SCHEDULE, 1.0, attention)
    given = EditInputs(torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.randn(3, 5, 24))
    rows = []
    unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))

    def run():
        rows.clear()
        return denoiser.denoise(given, [501, 1], scales, 4, shares_norms)

    fewer = run()
    assert sum(rows) == 2 * 3 * branches
    monkeypatch.setattr("custom.fourd.diffusion.edit_denoiser.needed_branches",
                        lambda *scales: (0, 1, 2))  # fmt: skip
    whole = run()
    assert sum(rows) == 2 * 3 * 3
    torch.testing.assert_close(fewer, whole, atol=1e-4, rtol=1e-4)
