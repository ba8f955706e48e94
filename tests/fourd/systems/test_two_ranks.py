"""Two gloo ranks train like one process with the joint batch, as torchrun would start them."""

import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from tests.fixtures.launched import ROOT, need_embedded_model
from tests.fixtures.rank_runs import records, train
from tests.fixtures.video_folders import write_joint_frames_folder

# What evaluation does is other tests' matter. In a file, since each override is merged anew.
SHORT = {
    "data": {"multi_view": {"width": 8, "height": 8}},
    "system": {
        # A sample at the threshold is dropped or kept by a rounding error.
        "renderer": {"prune_alpha_threshold": False},
        # With the published 1e-15 a rounding error decides the sign of a whole update.
        "optimizer": {"args": {"eps": 1e-4}},
    },
    "trainer": {"accelerator": "cpu", "limit_val_batches": 0, "limit_test_batches": 0},
}
LOCAL = ["data.multi_view.batch_size=4", "data.single_view.batch_size=1"]
JOINT = ["data.multi_view.batch_size=8", "data.single_view.batch_size=2"]


def compare(folder, n_steps):
    """Check the laws that hold for every training by two ranks; return the record of the joint."""
    ranks, (joint,) = records(folder, "ranks"), records(folder, "joint")
    assert [rank["strategy"] for rank in ranks] == ["DDPStrategy"] * 2
    assert len(joint["steps"]) == n_steps
    for rank in ranks:
        assert rank["steps"] == joint["steps"]
        for mine, its in zip(rank["frame_times"], joint["frame_times"], strict=True):
            assert (mine is None) == (its is None)
            assert mine is None or set(mine.tolist()) == set(its.tolist())
    for step in range(n_steps):
        both = torch.cat([rank["c2w"][step] for rank in ranks])
        assert torch.equal(both, joint["c2w"][step])
        assert not torch.equal(ranks[0]["c2w"][step], ranks[1]["c2w"][step])
    for name, weight in joint["weights"][-1].items():
        first, second = (rank["weights"][-1][name] for rank in ranks)
        assert torch.equal(first, second), name
        moved = (weight - joint["weights"][0][name]).norm()
        # Sums over two halves of a batch round otherwise than one sum over all of it; Adam divides
        # both by their size, so that 1e-5 of an update is what they differ by.
        assert (first - weight).norm() <= 2e-4 * moved, (name, float(moved))
    return joint


def files(folder, name):
    """What a job wrote, without our records and without what depends on the time it took."""
    found = [path.relative_to(folder / name) for path in (folder / name).rglob("*")]
    timed = ("record-", "events.", "epoch=")
    return sorted(str(path) for path in found if not path.name.startswith(timed))


def stage(folder, number, steps, changes=None):
    """Write the config of a short training; return the arguments that choose it."""
    delta = OmegaConf.merge(SHORT, {"trainer": {"max_steps": steps}}, changes or {})
    config = {
        "include": [f"custom/configs/fourdfy_stage_{number}.yaml"],
        "name": "short",
        "profiles": {"test": delta},
    }
    OmegaConf.save(config, folder / f"stage_{number}.yaml")
    return ["--config", str(folder / f"stage_{number}.yaml"), "profile=test"]


def moving_scene(folder):
    """Steps of all three kinds, with a tiny video prior."""
    model = {"pretrained_model_name_or_path": str(write_joint_frames_folder(folder / "video"))}
    return {
        "seed": 16,
        "data": {"prob_multi_view": 0.5, "single_view": {"prob_single_view_video": 0.8}},
        "system": {"guidance_video": model, "prompt_processor_video": model},
    }


def test_stages_1_and_3(tmp_path):
    """One after the other rather than in tests of their own, which would import all this twice."""
    need_embedded_model()
    first = stage(tmp_path, 1, 2)
    third = stage(tmp_path, 3, 4, moving_scene(tmp_path))
    jobs = {
        f"{name}/{kind}": (ranks, [*arguments, *batch])
        for name, arguments in (("first", first), ("third", third))
        for kind, ranks, batch in (("ranks", 2, LOCAL), ("joint", 1, JOINT))
    }
    train(jobs, tmp_path)
    joint = compare(tmp_path / "first", 2)
    assert {kind for _, kind in joint["steps"]} == {"multi_view"}
    joint = compare(tmp_path / "third", 4)
    # Clips, view groups and VSD by turns; the motion stays as it is while images train.
    assert [kind for _, kind in joint["steps"]] == ["video", "multi_view", "video", "single_view"]
    for record in (joint, *records(tmp_path / "third", "ranks")):
        moving = [torch.cat([w.flatten() for name, w in weights.items() if "encoding_time" in name])
                  for weights in record["weights"]]  # fmt: skip
        same = [torch.equal(*pair) for pair in zip(moving, moving[1:])]
        assert same == [False, True, False, True]
    for name in ("first", "third"):  # rank 1 wrote nothing of its own
        assert files(tmp_path / name, "ranks") == files(tmp_path / name, "joint")


@pytest.mark.slow
def test_the_command_trains_and_shows_the_scene(tmp_path):
    """As the README writes it, two stages in a chain, with all that follows a training."""
    need_embedded_model()
    video = write_joint_frames_folder(tmp_path / "video")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", "launch.py", "--config",
               "custom/configs/fourdfy_stage_1.yaml", "custom/configs/fourdfy_stage_3.yaml",
               "--train", "trainer.accelerator=cpu", "profile=test", "tag=run",
               f"2:system.guidance_video.pretrained_model_name_or_path={video}",
               f"2:system.prompt_processor_video.pretrained_model_name_or_path={video}",
               f"exp_root_dir={tmp_path}"]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stderr.count("step 2/2") == 2  # one rank speaks, once in each stage
    for stage in ("fourdfy_stage_1", "fourdfy_stage_3"):
        folder = tmp_path / stage / "run"
        assert (folder / "ckpts" / "last.ckpt").is_file()
        assert (folder / "save" / "metrics.json").is_file()
        assert list((folder / "save").glob("it2-test*.mp4"))
    assert [path.name for path in (tmp_path / "fourdfy_stage_1").iterdir()] == ["run"]
