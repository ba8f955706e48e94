"""The trainer's arguments where several processes share a training."""

import pytest
from threestudio.launcher.ranks import STRATEGY, share_among_ranks

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}
SHARED = {"strategy": STRATEGY, "use_distributed_sampler": False}


def test_one_process_is_left_alone():
    for options in ({}, {"devices": 1, "strategy": "ddp"}, {"devices": [3]}, {"devices": "3,"}):
        assert share_among_ranks(options, {}) == options
    assert share_among_ranks({}, {**TORCHRUN, "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}) == {}


def test_torchruns_processes_become_devices_and_nodes():
    given = {"accelerator": "cpu"}
    assert share_among_ranks(given, TORCHRUN) == {**given, "devices": 3, "num_nodes": 2, **SHARED}
    assert given == {"accelerator": "cpu"}


def test_what_is_given_stays():
    given = {"devices": 2, "num_nodes": 3, "strategy": "fsdp", "use_distributed_sampler": True}
    assert share_among_ranks(given, TORCHRUN) == given


@pytest.mark.parametrize("devices", [2, "2", -1, "-1", "auto", [0, 1], "0,1"])
def test_devices_of_lightnings_own_processes(devices):
    found = share_among_ranks({"devices": devices, "strategy": "ddp"}, {}, n_gpus=2)
    assert found == {"devices": devices, **SHARED}
    assert share_among_ranks({}, {}, n_gpus=2) == SHARED


def test_another_scheduler_counts_its_processes_itself():
    assert share_among_ranks({"devices": 4}, {"WORLD_SIZE": "8"}) == {"devices": 4, **SHARED}
