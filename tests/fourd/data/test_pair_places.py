"""Times and cameras of pairs without their images."""

import pytest
import torch

from custom.fourd.data.fourd_pair_datamodule import FourdPairDataModule
from custom.fourd.data.pair_places import drawn_places, pair_places
from custom.fourd.data.pair_sampling import PairChoice


@pytest.fixture(scope="module")
def data():
    made = FourdPairDataModule(
        {"scenes": ["a red cube sliding", "a pink cone growing"], "n_times": 8, "n_azimuths": 8,
         "height": 16, "width": 16}
    )  # fmt: skip
    made.setup("fit")
    return made


def test_places_by_hand(data):
    choice = PairChoice.of_rows([(0, 0, 1, 4, 2, 2), (1, 1, 3, 3, 0, 7)])
    found = pair_places(data.sources, choice)
    assert found["time_i"].tolist() == [0.125, 0.375]
    assert found["time_j"].tolist() == [0.5, 0.375]
    assert found["camera_a"]["azimuth"].tolist() == [90.0, 0.0]
    assert found["camera_b"]["azimuth"].tolist() == [90.0, 315.0]
    assert found["camera_b"]["c2w"].shape == (2, 4, 4)


def test_places_are_those_of_a_batch(data):
    batch = data.train_dataset.collate({"step": 4})
    rows = zip(batch["scene_index"], batch["pair_kind"], batch["index_i"], batch["index_j"],
               batch["index_a"], batch["index_b"], strict=True)  # fmt: skip
    choice = PairChoice.of_rows([[int(value) for value in row] for row in rows])
    found = pair_places(data.sources, choice)
    for key in ("time_i", "time_j"):
        assert torch.equal(found[key], batch[key])
    for key in ("camera_a", "camera_b"):
        assert all(torch.equal(found[key][name], batch[key][name]) for name in batch[key])


def test_drawn_places_are_of_training_cells(data):
    found = drawn_places(data.train_dataset, 64)
    assert len(found["time_i"]) == 64
    assert set((found["time_j"] * 8).tolist()) <= {0, 2, 4, 6}
    assert {90.0, 270.0}.isdisjoint(found["camera_b"]["azimuth"].tolist())
