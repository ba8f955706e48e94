import pytest
import torch
from threestudio.models.prompt_processors.view_directions import (
    direction_indices,
    shift_azimuth_deg,
    view_directions,
)


def names(elevation, azimuth, **thresholds):
    given = {"front_threshold": 45, "back_threshold": 45, "overhead_threshold": 60, **thresholds}
    directions = view_directions(**given)
    distances = torch.ones_like(azimuth)
    indices = direction_indices(directions, elevation, azimuth, distances)
    return [directions[index].name for index in indices]


def test_order_of_the_contract():
    assert [d.name for d in view_directions(45, 45, 60)] == ["side", "front", "back", "overhead"]


@pytest.mark.parametrize(
    "azimuth, expected", [(0, 0), (180, -180), (-180, -180), (190, -170), (-200, 160), (720, 0)]
)
def test_azimuths_wrap_to_half_open_turns(azimuth, expected):
    assert shift_azimuth_deg(torch.tensor(float(azimuth))).item() == expected


def test_directions_around_the_object():
    azimuth = torch.tensor([0.0, 44.9, 45.0, 90.0, 135.0, 135.1, 180.0, -136.0, -90.0, 359.0])
    assert names(torch.zeros(10), azimuth) == [
        "front",
        "front",
        "side",
        "side",
        "side",
        "back",
        "back",
        "back",
        "side",
        "front",
    ]


def test_overhead_wins_over_all_and_thresholds_are_used():
    assert names(torch.tensor([60.0, 61.0]), torch.zeros(2)) == ["front", "overhead"]
    # 4D-fy's thresholds for VSD: 30 and 30.
    azimuth = torch.tensor([31.0, 149.0])
    assert names(torch.zeros(2), azimuth, front_threshold=30, back_threshold=30) == ["side", "side"]


def test_words_of_the_directions():
    suffix = [d.prompt("a cube") for d in view_directions(45, 45, 60)]
    assert suffix == [
        "a cube, side view",
        "a cube, front view",
        "a cube, back view",
        "a cube, overhead view",
    ]
    prefix = [d.prompt("a cube") for d in view_directions(45, 45, 60, name_view_first=True)]
    assert prefix == [
        "side view of a cube",
        "front view of a cube",
        "backside view of a cube",
        "overhead view of a cube",
    ]
    assert {d.negative_prompt("ugly") for d in view_directions(45, 45, 60)} == {"ugly"}
