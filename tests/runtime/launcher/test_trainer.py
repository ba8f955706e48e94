import json
import random
import signal
import socket

import pytest
import torch
from threestudio.launcher.trainer import run_stage
from threestudio.utils.checkpoint import find_newest_checkpoint, hash_path, load_checkpoint

EVERY_STEP = "checkpoint.every_n_train_steps=1"
KEEP_TWO = "checkpoint.save_top_k=0"


def final_state(folder, step=30):
    checkpoint = load_checkpoint(folder / "ckpts" / f"epoch=0-step={step}.ckpt")
    return checkpoint["state_dict"], checkpoint["optimizer_states"], checkpoint["lr_schedulers"]


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def reached(folder, step):
    return lambda: any(int(path.stem.split("=")[-1]) >= step
                       for path in (folder / "ckpts").glob("epoch=0-step=*.ckpt"))


def test_a_training_leaves_the_documented_folder(start, trial):
    run = start("train")
    assert run.wait() == 0, run.text
    folder = trial()
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
             if "code" not in path.parts and "tb_logs" not in path.parts}
    grids = {f"save/it{step}-{view}.png" for step in (7, 14, 21, 28) for view in (0, 1)}
    assert found == grids | {
        "cmd.txt", "configs/parsed.yaml", "csv_logs/version_0/metrics.csv",
        "ckpts/last.ckpt", "ckpts/last.ckpt.sha256", "ckpts/epoch=0-step=30.ckpt",
        "ckpts/epoch=0-step=30.ckpt.sha256", "save/it30-test/0.png", "save/it30-test/1.png",
        "save/it30-test.json",
    }
    assert list((folder / "tb_logs" / "version_0").glob("events*"))
    rows = (folder / "csv_logs/version_0/metrics.csv").read_text().splitlines()
    # One row per step for the losses, one for the learning rates.
    assert len(rows) == 61 and {"train/loss_fit", "lr-Adam/net"} <= set(rows[0].split(","))
    checkpoint = load_checkpoint(folder / "ckpts/last.ckpt")
    assert checkpoint["global_step"] == 30 and checkpoint["seed"] == 0
    assert checkpoint["config"]["system_type"] == "tiny-system"
    assert checkpoint["profile"] == "auto" and checkpoint["threestudio_version"]
    assert "step 30/30" in run.text and "loss" in run.text and "GB" in run.text
    for chatter in ("GPU available", "Tip:", "num_workers", "UserWarning"):
        assert chatter not in run.text


def test_same_seed_same_bits_other_seed_other_bits(start, trial):
    runs = [start("train", f"seed={seed}", name=name) for name, seed in
            (("a", 1), ("b", 1), ("c", 2))]
    assert [run.wait() for run in runs] == [0, 0, 0]
    a, b, c = (final_state(trial(name)) for name in "abc")
    assert equal(a, b) and not equal(a, c)


@pytest.mark.slow
def test_prefetching_in_a_worker_changes_nothing(start, trial):
    plain = start("train", name="plain")
    ahead = start("train", "data.n_workers=1", name="ahead")
    assert plain.wait() == 0 and ahead.wait() == 0, ahead.text
    assert equal(final_state(trial("plain")), final_state(trial("ahead")))


def test_two_gloo_ranks_write_once_and_agree_with_one(start, trial):
    """Both ranks see the same batches here, so the averaged gradient is that of one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    single = start("train", EVERY_STEP, name="single")
    options = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    ranks = [start("train", EVERY_STEP, *options, name="ranks", environment={
        **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    assert [run.wait() for run in (single, *ranks)] == [0, 0, 0], ranks[1].text
    assert equal(final_state(trial("single"))[0], final_state(trial("ranks"))[0])
    assert len(list((trial("ranks") / "csv_logs").iterdir())) == 1
    assert len(list((trial("ranks") / "ckpts").iterdir())) == len(
        list((trial("single") / "ckpts").iterdir()))


@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_kill_and_resume_is_the_same_run(start, trial, kind):
    """Our data, and data and a step that draw from the global generators."""
    options = ["system.sleep_sec=0.01"]
    if kind == "foreign":
        options += ["data.foreign=true", "system.net.noise=true"]
    whole = start("train", *options, name="whole")
    cut = start("train", *options, EVERY_STEP, KEEP_TWO, name="cut")
    draw = random.Random(kind)
    for _ in range(2):
        stop_at = draw.randint(3, 24)
        cut.wait_for(reached(trial("cut"), stop_at))
        cut.signal(signal.SIGKILL)
        cut.wait()
        cut = start("train", *options, EVERY_STEP, KEEP_TWO, "resume=auto", name="cut")
    assert whole.wait() == 0 and cut.wait() == 0, cut.text
    assert "resuming from" in cut.text
    assert equal(final_state(trial("whole")), final_state(trial("cut")))
    assert not list(trial("cut").rglob(".*.tmp")) and not (trial("cut") / ".lock").exists()


def test_a_cut_where_a_validation_is_due_is_the_same_run(start, trial):
    """The resumed run makes the validation's iterator at another moment than a whole run does."""
    options = ["data.foreign=true", "system.sleep_sec=0.01"]
    whole = start("train", *options, name="whole")
    cut = start("train", *options, EVERY_STEP, KEEP_TWO, name="cut")
    cut.wait_for(reached(trial("cut"), 14))
    cut.signal(signal.SIGKILL)
    cut.wait()
    cut = start("train", *options, EVERY_STEP, KEEP_TWO, "resume=auto", name="cut")
    assert whole.wait() == 0 and cut.wait() == 0, cut.text
    assert equal(final_state(trial("whole")), final_state(trial("cut")))


@pytest.mark.slow
def test_twenty_random_cuts_are_the_same_run(start, trial):
    options = ["data.foreign=true", "system.net.noise=true", "system.sleep_sec=0.01",
               "trainer.max_steps=200"]
    whole = start("train", *options, name="whole")
    cut = start("train", *options, EVERY_STEP, KEEP_TWO, name="cut")
    draw = random.Random(0)
    for stop_at in sorted(draw.randint(2, 195) for _ in range(20)):
        cut.wait_for(reached(trial("cut"), stop_at))
        cut.signal(signal.SIGKILL)
        cut.wait()
        cut = start("train", *options, EVERY_STEP, KEEP_TWO, "resume=auto", name="cut")
    assert whole.wait() == 0 and cut.wait() == 0, cut.text
    assert equal(final_state(trial("whole"), 200), final_state(trial("cut"), 200))


def test_sigterm_finishes_the_step_saves_and_exits_143(start, trial):
    run = start("train", "trainer.max_steps=100000", "system.sleep_sec=0.02",
                "trainer.val_check_interval=1000000")
    run.wait_for(lambda: "at step 3." in run.text)
    run.signal(signal.SIGTERM)
    assert run.wait() == 143, run.text
    assert "Terminated: finishing the step, then saving." in run.text
    step = load_checkpoint(find_newest_checkpoint(trial()))["global_step"]
    assert step >= 4 and f"at step {step - 1}." in run.text
    assert f"at step {step}." not in run.text
    assert not (trial() / "save").exists() and "DONE" not in run.text


def test_sigterm_before_the_first_step_exits_143_at_once(start, trial):
    run = start("train", "system.sleep_before_sec=20")
    run.wait_for(lambda: "building" in run.text)
    run.signal(signal.SIGTERM)
    assert run.wait() == 143
    assert not (trial() / "ckpts").exists()


def test_a_limit_of_time_ends_with_everything_saved(start, trial):
    run = start("train", "trainer.max_steps=100000", "system.sleep_sec=0.05",
                "trainer.max_time=00:00:00:01", "trainer.val_check_interval=1000000")
    assert run.wait() == 0, run.text
    step = load_checkpoint(find_newest_checkpoint(trial()))["global_step"]
    assert f"at step {step - 1}." in run.text and f"at step {step}." not in run.text


def test_ctrl_c_once_saves_renders_and_exits_130(start, trial):
    run = start("train", "trainer.max_steps=100000", "system.sleep_sec=0.01",
                "trainer.val_check_interval=1000000", EVERY_STEP, KEEP_TWO)
    run.wait_for(reached(trial(), 2))
    run.signal(signal.SIGINT)
    assert run.wait() == 130, run.text
    assert "Interrupted: finishing the step" in run.text
    step = load_checkpoint(find_newest_checkpoint(trial()))["global_step"]
    assert json.loads((trial() / f"save/it{step}-test.json").read_text()) == {"views": 2}


def test_ctrl_c_twice_quits_at_once(start, trial):
    run = start("train", "trainer.max_steps=100000", "system.sleep_sec=20")
    run.wait_for(lambda: "at step 0." in run.text)
    run.signal(signal.SIGINT)
    run.wait_for(lambda: "Press Ctrl-C again" in run.text)
    run.signal(signal.SIGINT)
    assert run.wait() == 130
    assert "Interrupted twice: quitting now." in run.text
    assert not (trial() / "save").exists()


def test_stop_during_validation_saves_and_resumes_alike(start, trial):
    options = ["data.n_views=12", "system.sleep_sec=0.02", KEEP_TWO]
    whole = start("train", *options, name="whole")
    cut = start("train", *options, name="cut")
    cut.wait_for(lambda: (trial("cut") / "save" / "it7-3.png").exists())
    cut.signal(signal.SIGTERM)
    assert cut.wait() == 143, cut.text
    assert load_checkpoint(find_newest_checkpoint(trial("cut")))["global_step"] == 7
    cut = start("train", *options, "resume=auto", name="cut")
    assert whole.wait() == 0 and cut.wait() == 0, cut.text
    assert equal(final_state(trial("whole")), final_state(trial("cut")))


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_non_finite_numbers_stop_before_the_update(start, trial, place):
    run = start("train", "system.nan_step=5", f"system.nan_in={place}", EVERY_STEP, KEEP_TWO)
    assert run.wait() == 1
    assert "not finite at step 5; the update was not made" in run.text
    assert "train/loss_fit=" in run.text
    checkpoint = load_checkpoint(find_newest_checkpoint(trial()))
    assert checkpoint["global_step"] == 5
    assert all(v.isfinite().all() for v in checkpoint["state_dict"].values())


def test_skipping_leaves_the_update_out(start, trial):
    run = start("train", "system.nan_step=5", "trainer.non_finite_policy=skip")
    assert run.wait() == 0, run.text
    assert "update left out (1 of at most 10)" in run.text
    state, _, _ = final_state(trial())
    assert all(v.isfinite().all() for v in state.values())


def test_evaluation_needs_weights_and_takes_their_step(start, trial):
    train = start("train", "trainer.max_steps=9")
    assert train.wait() == 0, train.text
    weights = trial() / "ckpts" / "last.ckpt"
    by_resume = start("test", f"resume={weights}", name="by_resume")
    by_weights = start("test", f"system.weights={weights}", name="by_weights")
    validated = start("validate", f"resume={weights.parent}", name="validated")
    assert by_resume.wait() == by_weights.wait() == validated.wait() == 0, by_resume.text
    assert (trial("by_resume") / "save/it9-test/1.png").exists()
    assert (trial("by_weights") / "save/it9-test/1.png").exists()
    assert (trial("validated") / "save/it9-1.png").exists()
    assert not (trial("by_resume") / "ckpts").exists()
    assert not (trial("by_resume") / "tb_logs").exists()


def test_weights_start_a_new_run_at_step_zero(start, trial):
    assert start("train", "trainer.max_steps=4").wait() == 0
    weights = trial() / "ckpts" / "last.ckpt"
    run = start("train", f"system.weights={weights}", name="next")
    assert run.wait() == 0, run.text
    assert final_state(trial("next"))[0]["net.seen"] == 4 + 30


def test_resume_from_files_that_cannot_be(start, trial, tiny, tmp_path):
    assert start("train", "trainer.max_steps=4").wait() == 0
    last = trial() / "ckpts" / "last.ckpt"
    cut_off = tmp_path / "cut.ckpt"
    cut_off.write_bytes(last.read_bytes()[:-100])
    weights_only = tmp_path / "weights.ckpt"
    torch.save({"state_dict": load_checkpoint(last)["state_dict"]}, weights_only)

    def refused(sentence, mode, *overrides, kind=ValueError):
        with pytest.raises(kind, match=sentence):
            run_stage(tiny.make_config(tmp_path / "b", overrides), mode)

    refused("cut.ckpt is truncated or damaged", "train", f"resume={cut_off}")
    refused("holds weights but no optimizer", "train", f"resume={weights_only}")
    refused("does not fit this system: .*shape", "train", f"resume={last}", "system.net.width=8")
    refused("resume=no.ckpt does not exist", "train", "resume=no.ckpt", kind=FileNotFoundError)
    refused("no checkpoint in", "test", "resume=auto", kind=FileNotFoundError)
    for mode in ("test", "validate", "export"):
        refused(f"--{mode} needs trained weights; give resume=", mode)
    refused("mode is 'fit'; expected one of train, validate", "fit")


def test_resume_auto_with_nothing_says_so_and_starts(start, trial):
    run = start("train", "resume=auto", "trainer.max_steps=2")
    assert run.wait() == 0 and "Starting at step 0" in run.text


def test_resume_auto_uses_the_one_before_a_damaged_newest(start, trial):
    assert start("train", "trainer.max_steps=6", EVERY_STEP).wait() == 0
    newest = trial() / "ckpts" / "epoch=0-step=6.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert hash_path(newest).exists()
    run = start("train", "trainer.max_steps=8", "resume=auto")
    assert run.wait() == 0, run.text
    assert "epoch=0-step=5.ckpt instead of last.ckpt, epoch=0-step=6.ckpt" in run.text


def test_second_training_in_one_folder_is_refused(start, trial):
    first = start("train", "trainer.max_steps=100000", "system.sleep_sec=0.01", EVERY_STEP,
                  KEEP_TWO)
    first.wait_for(reached(trial(), 1))
    second = start("train")
    assert second.wait() == 1
    assert f"is in use: process {first.process.pid} on " in second.text
    first.signal(signal.SIGKILL)
    first.wait()
    third = start("train", "trainer.max_steps=3")
    assert third.wait() == 0, third.text


def test_unwritable_output_folder_is_refused_before_anything_is_built(tiny, tmp_path):
    cfg = tiny.make_config(tmp_path, ["data_type=does-not-exist"])
    (tmp_path / "file").write_text("a file where the folder should be")
    cfg.trial_dir = str(tmp_path / "file" / "run")
    with pytest.raises(OSError, match=r"cannot write to the output folder .*file/run"):
        run_stage(cfg, "train")


def test_saving_that_fails_to_the_end_fails_the_run(start, trial):
    folder = trial()
    folder.mkdir(parents=True)
    (folder / "ckpts").write_text("a file where the folder should be")
    run = start("train", "trainer.max_steps=5")
    assert run.wait() == 1
    assert "cannot write checkpoint" in run.text and "It will be tried again" in run.text


def test_pictures_that_cannot_be_written_do_not_stop_a_training(start, trial):
    folder = trial()
    folder.mkdir(parents=True)
    (folder / "save").write_text("a file where the folder should be")
    run = start("train", "trainer.max_steps=8")
    assert run.wait() == 1
    assert run.text.count("training goes on without it") == 1
    assert load_checkpoint(folder / "ckpts/last.ckpt")["global_step"] == 8
