"""Edits of tiny scenes end to end, by an edit model of random weights; nothing looks good here."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from threestudio.utils.checkpoint import load_checkpoint

from custom.fourd.editing.buffer import JOURNAL, EditBuffer
from custom.fourd.world.capture import path_capture
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.writers import write_dycheck, write_dynerf, write_video
from tests.fixtures.edit_folders import write_patch_edit_folder
from tests.fixtures.killed_runs import run as run_jobs
from tests.fixtures.launched import ROOT, launch

TRAIN, EDIT = "custom/configs/instruct4d_train.yaml", "custom/configs/instruct4d_edit.yaml"
SIZE = 16
SCENE = parse_caption("a red cube sliding")
# Half of the edits before training, one at each of the later steps.
PACE = ["system.edit.min_edit_fraction=0.3", "system.edit.turn_interval_steps=1",
        "system.edit.post_edit_steps=2", "trainer.max_steps=6"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_patch_edit_folder(tmp_path_factory.mktemp("model"))


def fit(folder, dataroot, *overrides):
    run = launch("--train", folder, f"data.dataroot={dataroot}", *overrides, config=TRAIN)
    assert run.status == 0, run.errors
    return run.checkpoint


def keys(model, dataroot, weights=None):
    start = [] if weights is None else [f"system.weights={weights}"]
    parts = [f"system.{part}.pretrained_model_name_or_path={model}"
             for part in ("guidance", "prompt_processor")]  # fmt: skip
    return [f"data.dataroot={dataroot}", *start, *parts]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Four cameras, four times: a field that has been trained for two steps."""
    folder = tmp_path_factory.mktemp("dynerf")
    write_dynerf(folder / "world", SCENE, 4, 4, SIZE)
    return folder / "world", fit(folder / "out", folder / "world")


@pytest.fixture(scope="module")
def edited(fitted, model, tmp_path_factory):
    run = launch("--train", tmp_path_factory.mktemp("edit"), *keys(model, *fitted), *PACE,
                 config=EDIT)  # fmt: skip
    assert run.status == 0, run.errors
    return run


def entries(run):
    first, *lines = (run.folder / "edits" / JOURNAL).read_text().splitlines()
    return json.loads(first), [json.loads(line) for line in lines]


def planned(run):
    text = (run.folder / "save" / "edits" / "plan.txt").read_text()
    return [line.partition(":")[0] for line in text.splitlines()]


def test_every_item_of_the_printed_plan_is_done_and_shown(edited):
    identity, done = entries(edited)
    assert identity["instruction"] == "make it blue"
    assert [entry["item"] for entry in done] == planned(edited)
    assert done[-1]["step"] > 0, "some edits came while it trained"
    pictures = sorted((edited.folder / "save" / "edits").glob("*.png"))
    assert len(pictures) == len(done)
    with Image.open(pictures[2]) as picture:
        # Windows of three frames; before, start, after, mask.
        assert picture.size == (3 * SIZE, 4 * SIZE)


def test_training_goes_on_after_the_last_edit(edited):
    _, done = entries(edited)
    steps = load_checkpoint(edited.checkpoint)["global_step"]
    assert steps >= max(6, done[-1]["step"] + 2)
    assert "edit 1/8" in edited.errors and "key round of cameras 1,2,3" in edited.errors


def test_figures_stand_beside_those_of_the_truth(edited):
    metrics = json.loads((edited.folder / "save" / "metrics.json").read_text())
    assert metrics["answer"] == "a blue cube sliding" and metrics["views"] == 4
    assert metrics["edited_share"] == 1.0 and metrics["edits"] == 8
    # What not to edit at all would get: red where blue is right.
    assert 8 < metrics["psnr_unedited"] < 20
    for name in ("temporal_error", "view_error"):
        ratio = metrics[name] / metrics[f"{name}_truth"]
        assert metrics[f"{name}_ratio"] == pytest.approx(ratio)
    assert metrics["psnr_to_edits"] > 5
    assert "depth" not in " ".join(metrics), "that of the data is not of the edited scene"


def test_training_takes_its_colours_from_the_edits(edited, fitted):
    """By hand, from what the run left: the loss is that against the buffer, not the originals."""
    from threestudio.utils.rng import set_experiment_seed

    from custom.fourd.data.open_scene import open_scene
    from custom.fourd.data.ray_batches import RaySampler, SamplingOptions

    scene = open_scene(fitted[0])
    buffer = EditBuffer(scene, edited.folder / "edits", entries(edited)[0] | {})
    set_experiment_seed(20211202)
    sampler = RaySampler(scene, SamplingOptions(n_rays=64, motion_share=0.1))
    batch = sampler.batch(0, 0)
    for entry in entries(edited)[1]:
        if entry["step"] == 0:
            buffer.show(entry["item"], 0)
    colours = buffer.colors(batch["index"], batch["pixels"])
    assert not torch.allclose(colours, batch["rgb"], atol=0.05)
    assert 0 not in batch["index"].tolist(), "held-out frames are never trained on"
    assert not bool(buffer.version[scene.held_out].any()), "nor edited"


def test_a_run_that_is_killed_twice_ends_with_the_same_bits(edited, fitted, model, tmp_path):
    """Once while training waits for edits, once between two training steps; acceptance check 8."""
    argv = ["--config", str(ROOT / EDIT), "--train", f"exp_root_dir={tmp_path}", "tag=run",
            "use_timestamp=false", "profile=test", "checkpoint.every_n_train_steps=1",
            *keys(model, *fitted), *PACE]  # fmt: skip
    resumed = [*argv, "resume=auto"]
    run_jobs([{"argv": argv, "die_after": 1}, {"argv": resumed, "die_after": 5},
              {"argv": resumed, "die_after": None}], tmp_path)  # fmt: skip
    folder = tmp_path / "instruct4d_edit" / "run"
    ours = (folder / "edits" / JOURNAL).read_text().splitlines()[1:]
    whole = (edited.folder / "edits" / JOURNAL).read_text().splitlines()[1:]
    assert ours == whole, "the same items with the same hashes, each once"
    one, other = (load_checkpoint(path) for path in (folder / "ckpts/last.ckpt", edited.checkpoint))
    assert one["global_step"] == other["global_step"]
    weights, expected = one["state_dict"], other["state_dict"]
    assert set(weights) == set(expected)
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []


def test_a_test_of_the_checkpoint_gives_the_same_figures(edited, fitted, tmp_path):
    """Without an edit model: none is loaded, and none is there."""
    run = launch("--test", tmp_path, f"data.dataroot={fitted[0]}", f"resume={edited.checkpoint}",
                 config=EDIT)  # fmt: skip
    assert run.status == 0, run.errors
    (path,) = tmp_path.rglob("metrics.json")
    ours = json.loads(path.read_text())
    theirs = json.loads((edited.folder / "save" / "metrics.json").read_text())
    for name in ("psnr", "ssim", "temporal_error", "view_error", "psnr_unedited"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_an_edit_needs_a_fitted_field(fitted, model, tmp_path):
    run = launch("--train", tmp_path, *keys(model, fitted[0]), config=EDIT)
    assert run.status != 0 and "system.weights is empty; expected a field" in run.errors


def test_a_resumed_run_refuses_another_instruction(edited, fitted, model, tmp_path):
    run = launch("--train", tmp_path, *keys(model, fitted[0]), f"resume={edited.checkpoint}",
                 "system.prompt_processor.instruction=make it red", "trainer.max_steps=20",
                 config=EDIT)  # fmt: skip
    assert run.status != 0 and "instruction: 'make it blue', now 'make it red'" in run.errors


def test_edits_that_are_gone_are_missed_before_anything_is_trained(edited, fitted, model, tmp_path):
    moved = tmp_path / "elsewhere" / "last.ckpt"
    moved.parent.mkdir()
    moved.write_bytes(edited.checkpoint.read_bytes())
    run = launch("--train", tmp_path / "out", *keys(model, fitted[0]), f"resume={moved}", *PACE,
                 "trainer.max_steps=20", config=EDIT)  # fmt: skip
    assert run.status != 0 and "edits does not exist; the checkpoint" in run.errors


@pytest.mark.slow
def test_two_processes_share_the_cameras_and_fill_one_buffer(edited, fitted, model, tmp_path):
    argv = ["--config", str(ROOT / EDIT), "--train", f"exp_root_dir={tmp_path}", "tag=run",
            "use_timestamp=false", "profile=test", "trainer.accelerator=cpu",
            *keys(model, *fitted), *PACE]  # fmt: skip
    run_jobs([{"argv": argv, "ranks": 2}], tmp_path)
    journal = tmp_path / "instruct4d_edit" / "run" / "edits" / JOURNAL
    ours = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert {e["item"]: e["sha256"] for e in ours} == {
        e["item"]: e["sha256"] for e in entries(edited)[1]
    }
    assert len(ours) == len(entries(edited)[1]), "one process writes"


@pytest.mark.slow
def test_the_field_learns_the_edited_frames(fitted, model, tmp_path):
    run = launch("--train", tmp_path, *keys(model, *fitted), "system.edit.min_edit_fraction=1.0",
                 "trainer.max_steps=60", "data.batch_size=256", "system.scheduler.args.gamma=1.0",
                 config=EDIT)  # fmt: skip
    assert run.status == 0, run.errors
    (path,) = run.folder.glob("csv_logs/**/metrics.csv")
    names, *rows = (line.split(",") for line in path.read_text().splitlines())
    column = names.index("train/loss_rgb")
    losses = [float(row[column]) for row in rows if row[column]]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.slow
def test_one_command_fits_and_edits(fitted, model, tmp_path):
    overrides = [override if override.startswith("data.") else f"2:{override}"
                 for override in keys(model, fitted[0])]  # fmt: skip
    run = launch("--train", tmp_path, *overrides,
                 '2:system.prompt_processor.instruction="make it green"',
                 config=(TRAIN, EDIT))  # fmt: skip
    assert run.status == 0, run.errors
    metrics = json.loads((run.folder / "save" / "metrics.json").read_text())
    assert metrics["answer"] == "a green cube sliding"


@pytest.mark.slow
def test_the_papers_order_edits_again_from_renders(fitted, model, tmp_path):
    run = launch("--train", tmp_path, *keys(model, *fitted), "system.edit.order=paper",
                 "system.edit.passes=2", "trainer.max_steps=8", "system.edit.key_cameras=2",
                 config=EDIT)  # fmt: skip
    assert run.status == 0, run.errors
    _, done = entries(run)
    assert [entry["item"] for entry in done] == planned(run)
    lines = (run.folder / "save" / "edits" / "plan.txt").read_text().splitlines()
    # Those painted after the key round start from what it has just carried over to them.
    later = [line for line in lines if line.startswith("round1/") and "/rest" not in line]
    assert [line for line in lines if "from renders" in line] == later and len(later) == 7
    # Depth at all times: other cameras are painted from key cameras at each.
    assert len(list((run.folder / "edits" / "depth").glob("*.npy"))) == 12


@pytest.mark.slow
def test_a_thread_edits_while_it_trains(edited, fitted, model, tmp_path):
    run = launch("--train", tmp_path, *keys(model, *fitted), *PACE, "trainer.max_steps=1",
                 "system.edit.executor=threaded", config=EDIT)  # fmt: skip
    assert run.status == 0, run.errors
    hashes = [{e["item"]: e["sha256"] for e in entries(r)[1]} for r in (run, edited)]
    assert hashes[0] == hashes[1], "both executors, one buffer"
    steps, last = load_checkpoint(run.checkpoint)["global_step"], entries(run)[1][-1]["step"]
    assert steps >= last + 2, "training was extended until the last edit was learnt"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mp4", "dycheck"])
def test_a_single_view_is_edited_in_passes(kind, model, tmp_path):
    if kind == "mp4":
        dataroot, data = tmp_path / "film.mp4", "video-file-datamodule"
        write_video(dataroot, path_capture(SCENE, 6, SIZE))
    else:
        dataroot, data = tmp_path / "sequence", "dycheck-datamodule"
        write_dycheck(dataroot, SCENE, 6, SIZE, n_val=1)
    weights = fit(tmp_path / "fit", dataroot, f"data_type={data}")
    run = launch("--train", tmp_path / "edit", *keys(model, dataroot, weights),
                 f"data_type={data}", "system.edit.order=single_view", "system.edit.passes=2",
                 "trainer.max_steps=6", config=EDIT)  # fmt: skip
    assert run.status == 0, run.errors
    _, done = entries(run)
    assert [entry["item"] for entry in done] == planned(run)
    written = [row for entry in done for row in entry["rows"]]
    assert sorted(written) == sorted([0, *range(1, 6), *range(1, 6)]), "both passes are written"
    metrics = json.loads((run.folder / "save" / "metrics.json").read_text())
    assert metrics["order"] == "single_view" and metrics["edited_share"] == 1.0
    assert metrics["answer"] == "a blue cube sliding" and metrics["temporal_error_truth"] > 0


@pytest.mark.slow
def test_data_of_no_known_world_is_measured_by_itself(fitted, model, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(fitted[0], folder)
    (folder / "world.json").unlink()
    run = launch("--train", tmp_path / "out", *keys(model, folder, fitted[1]), config=EDIT)
    assert run.status == 0, run.errors
    metrics = json.loads((run.folder / "save" / "metrics.json").read_text())
    assert "psnr" not in metrics and metrics["psnr_to_unedited"] > 5
    assert metrics["temporal_error_original"] > 0
    assert Path(run.folder / "edits" / JOURNAL).is_file()
