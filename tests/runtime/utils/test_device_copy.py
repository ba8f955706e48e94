"""Copies that nobody waits for."""

import torch
from threestudio.utils.device_copy import LateReading, upload

from tests.fixtures.device_waits import WatchForWaits


def test_what_is_there_already_is_given_back():
    value = torch.arange(3.0)
    assert upload(value, torch.device("cpu")) is value
    assert upload(value, torch.device("cpu"), torch.float32) is value
    assert upload(value, torch.device("cpu"), torch.float64).tolist() == [0.0, 1.0, 2.0]


def test_a_copy_to_another_device_is_asynchronous():
    with WatchForWaits() as watch:
        moved = upload(torch.arange(3), torch.device("meta"), torch.float16)
    assert moved.is_meta and moved.dtype == torch.float16
    assert watch.waits == [] and watch.copies == ["aten._to_copy.default"]
    with WatchForWaits() as watch:
        torch.arange(3).to("meta")
    assert watch.waits == ["aten._to_copy.default"]


def test_a_late_reading_is_a_copy_that_is_read_without_an_operation():
    count = torch.tensor([[3, 4]])
    late = LateReading(count)
    count.zero_()
    with WatchForWaits() as watch:
        assert late.has_arrived and late.value == [[3, 4]]
    assert watch.waits == []
    assert LateReading(torch.tensor(7)).value == 7
