"""Warps along flow: hand-made shifts, laws of the masks, OpenCV as an independent sampler."""

import cv2
import numpy as np
import pytest
import torch

from custom.fourd.ops.flow_warp import (
    RELEASE_CHECK,
    FlowCheck,
    average_along_flow,
    backward_warp,
    composite,
    is_inside,
    round_trip_error,
    sample_at,
    valid_flow,
    warp_by_flow,
)


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def constant_flow(x, y, n=1, height=10, width=14):
    return torch.tensor([x, y]).view(1, 2, 1, 1).expand(n, 2, height, width).clone()


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_no_motion_gives_the_reference_everywhere(mode):
    reference, current = noise(2, 10, 14, 3), noise(2, 10, 14, 3, seed=1)
    still = constant_flow(0.0, 0.0, n=2)
    found = warp_by_flow(reference, current, still, still, mode=mode)
    assert bool(found.is_valid.all())
    # Rounding of normalised positions: some 1e-6 pixels, times a contrast of at most 1.
    assert torch.allclose(found.composite, reference, atol=1e-5)


@pytest.mark.parametrize("x, y", [(3, 0), (-2, 1), (0, -4), (5, 2)])
def test_a_whole_shift_is_exact_and_so_is_the_border_of_its_mask(x, y):
    reference, current = noise(1, 10, 14, 3), noise(1, 10, 14, 3, seed=1)
    flow = constant_flow(float(x), float(y))
    found = warp_by_flow(reference, current, flow, -flow, mode="bilinear")
    expected, is_valid = current.clone(), torch.zeros(1, 10, 14, dtype=torch.bool)
    for row in range(10):
        for column in range(14):
            if 0 <= row + y < 10 and 0 <= column + x < 14:
                expected[0, row, column] = reference[0, row + y, column + x]
                is_valid[0, row, column] = True
    assert torch.equal(found.is_valid, is_valid)
    assert torch.allclose(found.composite, expected, atol=1e-5)
    # What is kept is kept to the last bit.
    assert torch.equal(found.composite[~is_valid], current[~is_valid])


@pytest.mark.parametrize(
    "mode, flag", [("bilinear", cv2.INTER_LINEAR), ("bicubic", cv2.INTER_CUBIC)]
)
def test_sampling_is_that_of_opencv_inside(mode, flag):
    image = noise(1, 12, 16, 3)
    pixels = torch.stack([noise(1, 9, 9, seed=2) * 11 + 2.5, noise(1, 9, 9, seed=3) * 7 + 2.5], -1)
    # OpenCV counts from pixel centres, and in steps of 1/32.
    place = ((pixels - 0.5) * 32).round() / 32
    found = sample_at(image, place + 0.5, mode)
    maps = [place[0, ..., axis].numpy().astype(np.float32) for axis in (0, 1)]
    truth = cv2.remap(image[0].numpy(), *maps, flag, borderMode=cv2.BORDER_REPLICATE)
    assert np.abs(found[0].numpy() - truth).max() < 1e-4


def test_colours_pass_through_no_eight_bits():
    reference = noise(1, 6, 6, 3) * 1e-3
    flow = constant_flow(0.5, 0.0, height=6, width=6)
    warped, _ = backward_warp(reference, flow, "bilinear")
    mean = 0.5 * (reference[:, :, :-1] + reference[:, :, 1:])
    assert torch.allclose(warped[:, :, :-1], mean, atol=1e-8)
    reference.requires_grad_()
    backward_warp(reference, flow)[0].sum().backward()
    assert float(reference.grad.sum()) == pytest.approx(6 * 6 * 3, rel=1e-5)


def test_dark_borders_never_leak_in():
    white = torch.ones(1, 8, 8, 3)
    for mode in ("bilinear", "bicubic"):
        for shift in (0.3, -0.7, 4.0, 40.0):
            warped, _ = backward_warp(white, constant_flow(shift, shift, height=8, width=8), mode)
            assert torch.allclose(warped, white, atol=1e-5)


def test_inside_means_within_the_outermost_pixel_centres():
    positions = torch.tensor(
        [[0.5, 0.5], [0.4, 3.0], [13.5, 9.5], [13.6, 5.0], [7.0, 9.6], [float("nan"), 5.0]]
    )
    assert is_inside(positions, 10, 14).tolist() == [True, False, True, False, False, False]


def test_flows_that_disagree_are_not_valid():
    forth = constant_flow(2.0, 0.0)
    back = -forth
    back[:, 0, :, 7:] = 3.0
    error, returned = round_trip_error(forth, back)
    # Column 4 lands in column 6, which leads back; column 5 in column 7, which does not.
    assert error[0, 0, 5, 4] == 0 and error[0, 0, 5, 5] == pytest.approx(5, abs=1e-4)
    assert returned[0, 0, 5, 4] == -2
    is_valid = valid_flow(forth, back)
    assert bool(is_valid[0, :, :5].all()) and not bool(is_valid[0, :, 5:].any())


@pytest.mark.parametrize(
    "check, disagreement_px, expected",
    [
        # Squared: d^2 < 0.01 (10^2 + (10 - d)^2) + 0.5; at d = 1.5, 2.25 < 2.22 fails.
        (None, 1.4, True),
        (None, 1.5, False),
        # As released: d < 0.5 (10 + 10 - d) + 0.5, so d < 7: two thirds of the motion.
        (RELEASE_CHECK, 6.9, True),
        (RELEASE_CHECK, 7.1, False),
        (FlowCheck(0.0, 0.5, squared=False), 0.4, True),
        (FlowCheck(0.0, 0.5, squared=False), 0.6, False),
    ],
)
def test_thresholds_by_hand(check, disagreement_px, expected):
    forth = constant_flow(10.0, 0.0, width=30)
    back = constant_flow(disagreement_px - 10.0, 0.0, width=30)
    assert bool(valid_flow(forth, back, check)[0, 5, 5]) is expected


def test_small_motion_out_of_the_image_is_not_valid_in_the_release_check_either():
    # The release let the black border in below one pixel of motion.
    flow = constant_flow(0.7, 0.0)
    is_valid = valid_flow(flow, -flow, RELEASE_CHECK)
    assert bool(is_valid[..., :-1].all()) and not bool(is_valid[..., -1].any())


def test_composites_mix_by_their_ratio():
    warped, current = torch.ones(1, 2, 2, 3), torch.zeros(1, 2, 2, 3)
    is_valid = torch.tensor([[[True, False], [True, True]]])
    mixed = composite(warped, current, is_valid, 0.25)
    assert mixed[0, ..., 0].tolist() == [[0.25, 0.0], [0.25, 0.25]]
    assert torch.equal(composite(warped, current, is_valid, 0.0), current)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda i, f: sample_at(i, i[..., :2], "cubic"), "mode is 'cubic'; expected one of bilin"),
        (lambda i, f: backward_warp(i, f[:, :, 1:]), r"flow has shape \(1, 2, 9, 14\); expected"),
        (lambda i, f: valid_flow(f, f[..., 1:]), r"14\) and flow_back \(1, 2, 10, 13\); exp"),
        (lambda i, f: composite(i, i, i[..., 0] > 0, 1.5), "ratio is 1.5; expected the share"),
        (lambda i, f: FlowCheck(-0.1), "alpha_1 is -0.1; expected 0 or more"),
        (lambda i, f: FlowCheck(0.1, float("nan")), "alpha_2 is nan; expected 0 or more"),
    ],
)
def test_what_cannot_work_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(noise(1, 10, 14, 3), constant_flow(0.0, 0.0))


class TestAverageAlongFlow:
    """A texture that moves two pixels to the right each frame; edits of it with noise."""

    N, HEIGHT, WIDTH = 5, 12, 20

    def frames(self):
        wide = noise(self.HEIGHT, self.WIDTH + 2 * self.N, 3)
        starts = [2 * (self.N - 1 - t) for t in range(self.N)]
        return torch.stack([wide[:, start : start + self.WIDTH] for start in starts])

    def flows(self, of, towards):
        flow = constant_flow(2.0 * (towards - of), 0.0, 1, self.HEIGHT, self.WIDTH)[0]
        return flow, -flow

    def test_it_is_the_mean_over_a_slow_loop(self):
        """By hand, from whole shifts: inside, frame t is edit s moved by 2 (t - s)."""
        originals = self.frames()
        edits = noise(self.N, self.HEIGHT, self.WIDTH, 3, seed=2)
        found, is_joined = average_along_flow(edits, originals, self.flows, 1, 0.01)
        for t in range(self.N):
            for column in range(self.WIDTH):
                parts = [edits[t, :, column]]
                for s in (t - 1, t + 1):
                    there = column + 2 * (s - t)
                    if 0 <= s < self.N and 0 <= there < self.WIDTH:
                        parts.append(edits[s, :, there])
                expected = torch.stack(parts).mean(dim=0)
                # Bicubic sampling at whole pixels, positions rounded.
                torch.testing.assert_close(found[t, :, column], expected, atol=2e-5, rtol=0)
                assert bool((is_joined[t, :, column] == (len(parts) > 1)).all())

    def test_noise_shrinks_and_what_was_right_stays(self):
        originals = self.frames()
        noisy = originals + 0.1 * torch.randn(
            originals.shape, generator=torch.Generator().manual_seed(3)
        )
        inside = slice(4, -4)
        found, _ = average_along_flow(noisy, originals, self.flows, 2, 0.01)
        error = (found - originals)[2, :, inside].std()
        assert float(error) == pytest.approx(0.1 / 5**0.5, rel=0.15)
        same, _ = average_along_flow(originals, originals, self.flows, 2, 0.01)
        torch.testing.assert_close(same, originals, atol=2e-5, rtol=0)

    def test_where_the_originals_disagree_nothing_is_taken(self):
        """A flow that contradicts nothing but the colours: of all frames as if they stood still."""
        originals = self.frames()
        edits = noise(self.N, self.HEIGHT, self.WIDTH, 3, seed=2)
        still = torch.zeros(2, self.HEIGHT, self.WIDTH)
        kept, is_joined = average_along_flow(edits, originals, lambda *_: (still, still), 2, 0.01)
        assert float(is_joined.float().mean()) < 0.02, "chance alone"
        torch.testing.assert_close(kept[~is_joined], edits[~is_joined])
        _, all_joined = average_along_flow(edits, originals, lambda *_: (still, still), 2, 1.0)
        assert bool(all_joined.all())
