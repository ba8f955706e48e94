"""The identity cell and turned signs, with generators whose answers are known."""

import pytest
import torch

from custom.fourd.systems.mapper_probes import (
    SignProbe,
    identity_figures,
    probe_batch,
    reversal_figures,
    time_probes,
    view_probes,
)
from tests.fixtures.mapper_scenes import scene_truth


@pytest.fixture(scope="module")
def truth():
    return scene_truth("a red cube sliding")


def test_probes_lie_on_both_sides_where_the_truth_differs(truth):
    for probe in time_probes(truth, [0, 2], 4):
        (i, camera), (after, b), (before, a) = probe.source, probe.forward, probe.backward
        assert camera == a == b and after - i == i - before >= 2
        features = truth.times(camera).features
        assert (features[after] - features[before]).norm() > 0.1
    assert len({probe.source for probe in time_probes(truth, [0], 3)}) > 1
    for probe in view_probes(truth, [0, 4], 2, least_deg=45.0):
        assert probe.source[0] == probe.forward[0] == probe.backward[0]
        assert (probe.forward[1] - probe.source[1]) % 4 == 1
        assert (probe.source[1] - probe.backward[1]) % 4 == 1
    assert view_probes(truth, [0], 2, least_deg=170.0) == []


def test_short_scenes_have_no_time_probe():
    assert time_probes(scene_truth(n_times=3), [0], 2) == []


def test_a_batch_asks_for_the_targets(truth):
    batch = probe_batch(truth, 3, [((1, 0), (5, 2)), ((1, 0), (1, 0))])
    assert batch["time_i"].tolist() == [0.125, 0.125]
    assert batch["time_j"].tolist() == [0.625, 0.125]
    assert batch["camera_b"]["azimuth"].tolist() == [180.0, 0.0]
    assert batch["scene_index"].tolist() == [3, 3]
    assert torch.equal(batch["cond_rgb"][1], batch["target_rgb"][1])


def test_an_exact_generator_reverses_and_a_copy_does_not(truth):
    probes = [time_probes(truth, [0, 2], 2)]
    exact = reversal_figures([truth], probes, lambda batch: batch["target_rgb"])
    assert exact["correlation"] == pytest.approx(1.0) and exact["share"] == 1.0
    assert exact["probes"] == 2
    copied = reversal_figures([truth], probes, lambda batch: batch["cond_rgb"])
    assert copied["correlation"] == copied["share"] == 0.0

    def against(batch):
        return torch.cat(batch["target_rgb"].chunk(2)[::-1])

    assert reversal_figures([truth], probes, against)["correlation"] == pytest.approx(-1.0)


def test_a_control_that_changes_nothing_has_no_figure(truth):
    still = SignProbe((1, 0), (2, 0), (2, 0))
    assert reversal_figures([truth], [[still]], lambda batch: batch["cond_rgb"]) is None
    assert reversal_figures([truth], [[]], lambda batch: batch["cond_rgb"]) is None


def test_identity_is_measured_against_the_source(truth):
    cells = [[(0, 0), (4, 2)]]
    found = identity_figures([truth], cells, lambda batch: batch["cond_rgb"] * 1.0)
    assert found == {"psnr": 100.0, "psnr_masked": 100.0, "cells": 2}
    off = identity_figures([truth], cells, lambda batch: batch["cond_rgb"] - 0.1)
    assert off["psnr"] == pytest.approx(20.0, abs=1e-3)
    assert identity_figures([truth], [[]], lambda batch: batch["cond_rgb"]) is None
