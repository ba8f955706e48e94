"""The data module: batches against truth, resuming, ranks, bounds of memory, scoring, refusals."""

import json
import math

import pytest
import threestudio
import torch
from threestudio.systems.base import BaseSystem
from threestudio.utils.rng import set_experiment_seed

import custom.fourd  # noqa: F401 - registers the names
from custom.fourd.data.fourd_pair_datamodule import FourdPairDataModule
from custom.fourd.data.grid_cache import write_cache
from custom.fourd.data.grid_cells import GridCells, write_grid
from custom.fourd.data.pair_sampling import KINDS
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.render import render
from tests.fixtures.launched import launch
from tests.fixtures.video_files import grey_frames, write_h264

SCENES = ["a red cube spinning", "a blue sphere orbiting next to a green cone"]
SMALL = {"scenes": SCENES, "height": 12, "width": 12, "n_times": 8, "n_azimuths": 8}


def module(stage="fit", **keys):
    made = FourdPairDataModule({**SMALL, **keys})
    made.setup(stage)
    return made


def batches(dataset, *steps):
    return [dataset.collate({"step": step}) for step in steps]


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.fixture(autouse=True)
def seed():
    yield
    set_experiment_seed(0)


def truth(batch, row, side):
    """The exact renderer's picture of a row, from what the batch says of it alone."""
    camera, time = ("a", "i") if side == "cond" else ("b", "j")
    place = slice(row, row + 1)
    images = render(
        parse_caption(batch["caption"][row]), batch[f"camera_{camera}"]["c2w"][place],
        batch[f"camera_{camera}"]["fovy"][place], 12, 12, batch[f"time_{time}"][place],
        batch["background"][row],
    )  # fmt: skip
    return images.rgb[0], images.alpha[0]


@pytest.mark.parametrize("background", ["random", (1.0, 1.0, 1.0)])
def test_pairs_of_the_world_are_the_exact_renderer_s(background):
    (batch,) = batches(module(background=background, colour_jitter=0.0).train_dataset, 5)
    assert set(batch["scene_id"]) == set(SCENES)
    for row in range(8):
        for side in ("cond", "target"):
            rgb, alpha = truth(batch, row, side)
            # Colour and alpha are rounded to 8 bits each.
            assert (batch[f"{side}_rgb"][row] - rgb).abs().max() <= 1 / 255 + 1e-6
            assert (batch[f"{side}_alpha"][row] - alpha).abs().max() <= 0.5 / 255 + 1e-6


def test_training_sees_even_frames_and_three_quarters_of_the_azimuths():
    dataset = module(batch_size=64).train_dataset
    batch = dataset.collate({"step": 0})
    for key in ("index_i", "index_j"):
        assert set(batch[key].tolist()) == {0, 2, 4, 6}
    azimuths = {*batch["camera_a"]["azimuth"].tolist(), *batch["camera_b"]["azimuth"].tolist()}
    assert azimuths == {0, 45, 135, 180, 225, 315}
    kinds = [KINDS[kind] for kind in batch["pair_kind"].tolist()]
    assert {kind: kinds.count(kind) for kind in KINDS[:3]} == {"time": 22, "view": 23, "both": 16}


def test_a_step_is_a_pure_function_of_the_seed():
    one, other = module().train_dataset, module(cache_mib=0.0).train_dataset
    for step in (7, 3, 7):  # in any order, remembered or rendered anew
        assert equal(one.collate({"step": step}), other.collate({"step": step}))
    first = one.collate({"step": 3})
    set_experiment_seed(1)
    assert not equal(first, one.collate({"step": 3}))


def test_ranks_and_accumulated_batches_divide_the_step():
    whole = module(background="random").train_dataset.collate({"step": 4})
    part = module(background="random", batch_size=2).train_dataset
    rows = []
    for batch_in_step in range(2):
        for rank in range(2):
            part.rank, part.world_size, part.batches_per_step = rank, 2, 2
            rows.append(part.collate({"step": 4, "batch_in_step": batch_in_step}))
    for key in ("cond_rgb", "target_rgb", "background", "delta_view", "pair_kind"):
        assert torch.equal(torch.cat([row[key] for row in rows]), whole[key]), key
    assert sum([row["scene_id"] for row in rows], []) == whole["scene_id"]


def test_a_stream_goes_on_at_the_trainer_s_step():
    dataset = module().train_dataset
    dataset.start_step, dataset.batches_per_step = 5, 2
    places = iter(dataset)
    assert [next(places) for _ in range(3)] == [
        {"step": 5, "batch_in_step": 0}, {"step": 5, "batch_in_step": 1},
        {"step": 6, "batch_in_step": 0},
    ]  # fmt: skip


def test_memory_stays_within_its_bound_over_many_steps():
    cell = 12 * 12 * 4
    dataset = module(cache_mib=5 * cell / 2**20, batch_size=4).train_dataset
    for step in range(12):
        dataset.collate({"step": step})
        assert dataset.memory.nbytes == len(dataset.memory) * cell <= 5 * cell
    assert len(dataset.memory) == 5


@pytest.mark.parametrize("size, count", [(1, 12), (5, 3)])
def test_validation_scores_unseen_pairs_of_three_protocols(size, count):
    made = module("validate", eval_batch_size=size)
    found = list(made.val_dataloader())
    assert len(found) == count
    kinds = torch.cat([batch["pair_kind"] for batch in found]).tolist()
    assert kinds == [0, 0, 1, 1, 2, 2] * 2  # scene after scene, protocol after protocol
    assert torch.cat([batch["index"] for batch in found]).tolist() == list(range(12))
    for batch in found:
        for row in range(len(batch["index"])):
            check_scored(batch, row)


def check_scored(batch, row):
    kind, moved = KINDS[batch["pair_kind"][row]], batch["delta_view"][row]
    i, j = int(batch["index_i"][row]), int(batch["index_j"][row])
    seen_from, asked_from = (batch[f"camera_{k}"]["azimuth"][row].item() for k in "ab")
    assert i % 2 == 0 and seen_from not in (90, 270)
    if kind in ("time", "both"):
        assert j % 2 == 1 and abs(batch["delta_time"][row]) >= 0.25
    else:
        assert i == j and batch["delta_time"][row] == 0
    if kind in ("view", "both"):
        assert asked_from in (90, 270) and abs(moved[1]) >= math.pi / 4 - 1e-6
    else:
        assert asked_from == seen_from and moved.abs().max() == 0
    rgb, _ = truth(batch, row, "target")
    assert (batch["target_rgb"][row] - rgb).abs().max() <= 1 / 255 + 1e-6
    assert batch["background"][row].tolist() == [1, 1, 1]


def test_scored_pairs_are_white_and_plain_where_training_is_not():
    made = module("validate", background="random", colour_jitter=0.3)
    for batch in list(made.val_dataloader())[:2]:
        check_scored(batch, 0)


def test_the_test_scores_more_and_export_walks_over_the_same():
    made = module("test", n_test_pairs=0)
    assert len(made.test_dataset) > 100 and len(made.predict_dataloader()) == len(made.test_dataset)
    with pytest.raises(IndexError, match="pair -1 of"):
        made.test_dataset[-1]


def test_frames_of_one_video_are_pairs_for_a_codec(tmp_path):
    path = write_h264(tmp_path / "clip.mp4", grey_frames(9, 12, 12), [0.1 * k for k in range(9)])
    made = module(
        scenes=[str(path)], mix={"time": 1.0}, train_every_time=1, colour_jitter=0.0,
        n_val_pairs=0, batch_size=72,
    )  # fmt: skip
    batch = made.train_dataset.collate({"step": 0})
    pairs = set(zip(batch["index_i"].tolist(), batch["index_j"].tolist(), strict=True))
    assert len(pairs) == 72  # every ordered pair of 9 frames, once
    assert batch["delta_view"].abs().max() == 0 and bool((batch["cond_alpha"] == 1).all())
    expected = (batch["index_j"] - batch["index_i"]) / 8
    assert torch.allclose(batch["delta_time"], expected, atol=2e-3)
    # The left half of frame k is grey 10 (k + 1).
    left = batch["target_rgb"][:, :, :4].mean(dim=(1, 2, 3)) * 255
    assert torch.allclose(left, 10.0 * (batch["index_j"] + 1), atol=2.0)
    assert len(made.val_dataset) == 0
    with pytest.raises(
        ValueError, match="no cell of the scenes is unseen .* train_every_time is 1"
    ):
        made.setup("test")


@pytest.fixture
def grid(tmp_path):
    source = module(scenes=SCENES[:1], height=16, width=16).sources[0]
    write_grid(tmp_path / "grid", source, {"kind": "world"})
    return tmp_path / "grid"


def test_a_grid_gives_the_pairs_of_what_it_was_rendered_from(grid):
    keys = {"height": 16, "width": 16, "background": "random"}
    (live,) = batches(module(scenes=SCENES[:1], **keys).train_dataset, 2)
    (read,) = batches(module(scenes=[str(grid)], **keys).train_dataset, 2)
    assert equal(live, read)


class Means:
    """An encoder whose rows are mean colours."""

    identity = {"model": "means", "part": "vae", "output": "mode", "fingerprint": "0" * 64}

    def encode(self, rgb):
        return rgb.mean(dim=(1, 2))


def test_cached_latents_are_those_of_the_target(grid, monkeypatch):
    from custom.fourd.data import fourd_pair_datamodule

    monkeypatch.setattr(fourd_pair_datamodule, "latents_identity", lambda *_: Means.identity)
    keys = {"scenes": [str(grid)], "height": 16, "width": 16, "latents": "means"}
    with pytest.raises(ValueError, match="data.colour_jitter is 0.04 .* expected colour_jitter 0"):
        module(**keys)
    with pytest.raises(ValueError, match="nothing cached of means"):
        module(**keys, colour_jitter=0.0)
    write_cache(GridCells(grid, 16, 16), Means(), (1, 1, 1))
    (batch,) = batches(module(**keys, colour_jitter=0.0).train_dataset, 0)
    means = batch["target_rgb"].mean(dim=(1, 2))
    assert torch.allclose(batch["target_latents"], means, atol=2e-3)
    assert "cond_features" not in batch
    with pytest.raises(ValueError, match="the scene 'a red cube spinning-2' is none; render it"):
        module(**{**keys, "scenes": [str(grid), SCENES[0]]}, colour_jitter=0.0)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"scenes": []}, "data.scenes is empty"),
        ({"batch_size": 0}, "data.batch_size has the value 0; expected an integer of at least 1"),
        ({"mix": {"times": 1}}, "data.mix names 'times'; expected weights of time, view, both"),
        ({"mix": {"time": 0.0}}, "expected at least one weight above 0"),
        ({"mix": {"time": -1.0}}, r"data.mix.time has the value -1.0"),
        ({"hold_out_azimuth_every": 1}, "data.hold_out_azimuth_every is 1; expected 0, or 2"),
        ({"single_image_share": 2.0}, "data.single_image_share has the value 2.0"),
        ({"colour_jitter": 0.7}, "data.colour_jitter has the value 0.7"),
        ({"background": "blue"}, "data.background is 'blue'; expected three numbers"),
        ({"background": [0, 0, 2]}, "data.background has the value 2"),
        ({"fit": "squash"}, "data.fit is 'squash'; expected one of crop, pad"),
        ({"elevations_deg": [100]}, "data.elevations_deg has the value 100"),
        ({"cond_features_kind": "faces"}, "data.cond_features_kind is 'faces'"),
        ({"min_angle_deg": 200.0}, "data.min_angle_deg has the value 200.0"),
        ({"cache_mib": -1.0}, "data.cache_mib has the value -1.0"),
    ],
)
def test_values_that_cannot_work_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        FourdPairDataModule({**SMALL, **keys})


def test_an_unknown_key_is_named():
    with pytest.raises(TypeError, match="azimuth"):
        FourdPairDataModule({**SMALL, "n_azimuth": 4})


class PairProbeSystem(BaseSystem):
    """A system that knows nothing of scenes: one affine map from the shown to the asked colour."""

    def configure(self):
        self.map = torch.nn.Linear(3, 3)
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = (self.map(batch["cond_rgb"]) - batch["target_rgb"]).square().mean()
        self.seen.append([batch["step"], batch["index_i"].tolist(), float(loss.detach())])
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        return self.map(batch["cond_rgb"])

    def on_validation_epoch_end(self):
        pass

    def test_step(self, batch, batch_idx):
        self.seen.append([int(batch["pair_kind"][0]), batch["index"].tolist()])

    def on_test_epoch_end(self):
        self.save_json("seen.json", self.seen)


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    threestudio.register("pair-probe-system")(PairProbeSystem)
    path = tmp_path_factory.mktemp("probe") / "probe.yaml"
    config = {
        "name": "probe", "tag": "", "exp_root_dir": "outputs", "seed": 0,
        "data_type": "fourd-pair-datamodule", "data": {**SMALL, "n_test_pairs": 1},
        "system_type": "pair-probe-system",
        "system": {"optimizer": {"name": "Adam", "args": {"lr": 0.01}}},
        "trainer": {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 0},
        "checkpoint": {"every_n_train_steps": 2}, "profiles": {"test": {}},
    }  # fmt: skip
    path.write_text(json.dumps(config))
    return str(path)


def seen(run):
    assert run.status == 0, run.errors
    return json.loads((run.folder / "save" / "seen.json").read_text())


def test_any_system_trains_on_it_through_the_launcher_and_resumes_alike(probe, tmp_path):
    whole = seen(launch("--train", tmp_path / "a", config=probe))
    steps = [row for row in whole if len(row) == 3]
    assert [row[0] for row in steps] == [0, 1, 2, 3]
    # One pair of each protocol for each of two scenes.
    assert [row[0] for row in whole if len(row) == 2] == [0, 1, 2, 0, 1, 2]
    half = launch("--train", tmp_path / "b", "trainer.max_steps=2", config=probe)
    seen(half)
    rest = launch("--train", tmp_path / "c", f"resume={half.checkpoint}", config=probe)
    assert [row for row in seen(rest) if len(row) == 3] == steps[2:]
