"""Where a run's batches stand: after a stop, with accumulation, on several processes."""

from itertools import islice
from types import SimpleNamespace

from custom.fourd.data.batch_places import BatchPlaces


def trainer(step=0, accumulated=1, rank=0, world_size=1):
    return SimpleNamespace(
        global_step=step,
        accumulate_grad_batches=accumulated,
        global_rank=rank,
        world_size=world_size,
    )


def first(places, count):
    return [(place["step"], place["batch_in_step"]) for place in islice(places, count)]


def test_a_run_begins_at_step_0_and_has_no_end():
    places = BatchPlaces()
    assert first(places, 3) == first(places, 3) == [(0, 0), (1, 0), (2, 0)]
    places.attach_trainer(None)
    assert first(places, 1) == [(0, 0)] and places.n_shards == 1


def test_it_goes_on_where_the_trainer_stands():
    places = BatchPlaces()
    places.attach_trainer(trainer(step=7, accumulated=2))
    assert first(places, 3) == [(7, 0), (7, 1), (8, 0)]


def test_every_batch_of_a_step_has_a_shard_of_its_own():
    shards = []
    for rank in range(3):
        places = BatchPlaces()
        places.attach_trainer(trainer(accumulated=2, rank=rank, world_size=3))
        assert places.n_shards == 6
        shards += [places.shard(place) for place in islice(places, 2)]
    assert sorted(shards) == list(range(6))
