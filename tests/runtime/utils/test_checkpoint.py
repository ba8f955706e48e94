import collections
import hashlib
import os
import pickle
import random
import resource
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from threestudio.utils import checkpoint as ck


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "last.ckpt"
    payload = {"state_dict": {"a": torch.arange(6.0)}, "global_step": 3, "epoch": 0}
    ck.save_checkpoint(path, payload)
    return path


def hash_of(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_round_trip_and_the_hash_beside_it(saved):
    loaded = ck.load_checkpoint(saved)
    assert torch.equal(loaded["state_dict"]["a"], torch.arange(6.0))
    assert loaded["global_step"] == 3
    assert ck.hash_path(saved).read_text().split() == [hash_of(saved)]
    assert names(saved.parent) == ["last.ckpt", "last.ckpt.sha256"]


def test_only_plain_values_are_stored(tmp_path):
    Pair = collections.namedtuple("Pair", "x y")
    ck.save_checkpoint(
        tmp_path / "a.ckpt",
        {
            "cfg": OmegaConf.create({"betas": [0.9, 0.99]}),
            "n": np.float32(2.5),
            "pair": Pair(1, 2),
            "path": Path("x/y"),
            "array": np.arange(3),
            "order": collections.OrderedDict(b=1, a=2),
            "dtype": torch.float16,
            "none": None,
            "param": torch.nn.Parameter(torch.ones(2)),
        },
    )
    loaded = ck.load_checkpoint(tmp_path / "a.ckpt")
    assert loaded["cfg"] == {"betas": [0.9, 0.99]} and type(loaded["cfg"]["betas"]) is list
    assert loaded["n"] == 2.5 and type(loaded["n"]) is float
    assert loaded["pair"] == (1, 2) and type(loaded["pair"]) is tuple
    assert loaded["path"] == "x/y" and loaded["dtype"] is torch.float16
    assert loaded["array"].tolist() == [0, 1, 2]
    assert list(loaded["order"]) == ["b", "a"]
    assert not loaded["param"].requires_grad


@pytest.mark.parametrize("bad", [object(), {1, 2}.__iter__(), lambda: 0])
def test_other_objects_are_refused_by_place(tmp_path, bad):
    with pytest.raises(TypeError, match=r"checkpoint entry callbacks\.x\[1\] is a "):
        ck.save_checkpoint(tmp_path / "a.ckpt", {"callbacks": {"x": [1, bad]}})
    with pytest.raises(TypeError, match=r"entry a has a key of type object"):
        ck.save_checkpoint(tmp_path / "a.ckpt", {"a": {object(): 1}})
    assert names(tmp_path) == []


def test_every_bit_flip_is_detected(saved):
    content = saved.read_bytes()
    draw = random.Random(0)
    for _ in range(300):
        position, bit = draw.randrange(len(content)), draw.randrange(8)
        changed = bytearray(content)
        changed[position] ^= 1 << bit
        saved.write_bytes(changed)
        with pytest.raises(ValueError, match=r"is damaged: its SHA-256"):
            ck.load_checkpoint(saved)


def test_every_truncation_is_detected_with_and_without_the_hash(saved):
    content = saved.read_bytes()
    for length in random.Random(1).sample(range(1, len(content)), 150):
        saved.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"is damaged"):
            ck.load_checkpoint(saved)
    ck.hash_path(saved).unlink()
    for length in random.Random(2).sample(range(1, len(content)), 150):
        saved.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"truncated|damaged|no checkpoint|refused"):
            ck.load_checkpoint(saved)


def test_flipped_tensor_bytes_are_detected_without_a_hash(saved):
    ck.hash_path(saved).unlink()
    content = saved.read_bytes()
    start = content.index(torch.arange(6.0).numpy().tobytes())
    for offset in range(24):
        changed = bytearray(content)
        changed[start + offset] ^= 4
        saved.write_bytes(changed)
        with pytest.raises(ValueError, match=r"the checksum of .* does not match"):
            ck.load_checkpoint(saved)


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"hello", b"PK\3\4" + b"\0" * 100])
def test_files_that_are_no_checkpoint(tmp_path, content):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is empty|truncated|damaged|no checkpoint|refused"):
        ck.load_checkpoint(path)


def test_missing_file_folder_and_other_content(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.ckpt does not exist"):
        ck.load_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"is a folder; expected a \.ckpt file"):
        ck.load_checkpoint(tmp_path)
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"holds a list; expected a dict"):
        ck.load_checkpoint(tmp_path / "list.ckpt")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "hashed"])
def test_code_is_refused_and_never_runs(tmp_path, kind):
    path, canary = tmp_path / "evil.ckpt", tmp_path / "canary"
    payload = {"state_dict": {"a": torch.ones(1)}, "x": Canary(canary)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "hashed":
        ck.hash_path(path).write_text(hash_of(path))
    with pytest.raises(ValueError, match=r"evil\.ckpt is (refused|truncated, damaged or no)"):
        ck.load_checkpoint(path)
    assert not canary.exists()


def test_what_is_refused_is_named(tmp_path):
    torch.save({"x": Canary("y")}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"holds something other than .* \(posix\.mkdir\)"):
        ck.load_checkpoint(tmp_path / "evil.ckpt")


def test_omegaconf_in_old_checkpoints_loads_as_plain(tmp_path):
    cfg = OmegaConf.create({"betas": [0.9, 0.99], "d": {"a": None, "s": "x", "b": True, "f": 1.5}})
    torch.save(
        {"optimizer_states": [{"param_groups": [{"betas": cfg.betas}]}], "cfg": cfg},
        tmp_path / "old.ckpt",
    )
    loaded = ck.load_checkpoint(tmp_path / "old.ckpt")
    assert loaded["optimizer_states"][0]["param_groups"][0]["betas"] == [0.9, 0.99]
    assert loaded["cfg"] == {"betas": [0.9, 0.99], "d": {"a": None, "s": "x", "b": True, "f": 1.5}}
    assert type(loaded["cfg"]["d"]) is dict


# Writing under faults


@pytest.mark.parametrize("n_renames", [0, 1, 2])
def test_a_replaced_file_is_recognised_at_every_moment(saved, monkeypatch, n_renames):
    """Stop before each rename: the file under the final name loads, old or new."""
    real_replace, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) > n_renames:
            raise KeyboardInterrupt
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        ck.save_checkpoint(saved, {"state_dict": {}, "global_step": 4})
    assert ck.load_checkpoint(saved)["global_step"] == (3 if n_renames < 2 else 4)
    assert names(saved.parent) == ["last.ckpt", "last.ckpt.sha256"]


def test_two_interruptions_in_a_row_leave_the_old_file_loadable(saved, monkeypatch):
    """Each time the new hash is listed beside the old one, and the file never replaced."""
    real_replace = os.replace

    def replace(source, target):
        if Path(target) == saved:
            raise KeyboardInterrupt
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for step in (4, 5):
        with pytest.raises(KeyboardInterrupt):
            ck.save_checkpoint(saved, {"state_dict": {}, "global_step": step})
    assert ck.load_checkpoint(saved)["global_step"] == 3


def test_replacing_a_file_without_hash_keeps_it_loadable(tmp_path, monkeypatch):
    path = tmp_path / "foreign.ckpt"
    torch.save({"global_step": 1}, path)
    real_replace = os.replace

    def replace(source, target):
        if Path(target) == path:
            raise KeyboardInterrupt
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        ck.save_checkpoint(path, {"global_step": 2})
    assert ck.load_checkpoint(path)["global_step"] == 1


def in_child(function):
    """Run ``function`` in a forked child (which needs no imports again); return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def test_full_disk_leaves_the_old_file_and_says_where(saved):
    before, report = saved.read_bytes(), saved.parent / "report.txt"
    big = {"state_dict": {"a": torch.ones(100_000)}}

    def fill():
        # A file size limit is the one real ENOSPC-like fault that needs no privileges.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            ck.save_checkpoint(saved, big)
        except OSError as error:
            report.write_text(str(error))

    os.waitpid(in_child(fill), 0)
    assert f"cannot write checkpoint {saved}: File too large" in report.read_text()
    assert "MiB free" in report.read_text()
    assert saved.read_bytes() == before
    assert names(saved.parent) == ["last.ckpt", "last.ckpt.sha256", "report.txt"]
    ck.load_checkpoint(saved)


def test_unwritable_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write checkpoint .*file/x\.ckpt"):
        ck.save_checkpoint(tmp_path / "file" / "x.ckpt", {})


@pytest.mark.parametrize("n_faults, succeeds", [(1, True), (2, False)])
def test_a_transient_fault_is_retried_once(tmp_path, monkeypatch, n_faults, succeeds):
    real_fsync, faults = os.fsync, [OSError(5, "Input/output error")] * n_faults

    def fsync(descriptor):
        if faults:
            raise faults.pop()
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "a.ckpt"
    if succeeds:
        ck.save_checkpoint(path, {"x": 1})
        assert ck.load_checkpoint(path) == {"x": 1}
    else:
        with pytest.raises(OSError, match="Input/output error"):
            ck.save_checkpoint(path, {"x": 1})
        assert names(tmp_path) == []


def test_the_content_is_on_disk_before_its_name(tmp_path, monkeypatch):
    events = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (events.append(("sync", os.readlink(f"/proc/self/fd/{fd}"))), real["fsync"](fd))[
            1
        ],
    )
    monkeypatch.setattr(
        os,
        "replace",
        lambda a, b: (events.append(("name", str(a), str(b))), real["replace"](a, b))[1],
    )
    path = tmp_path / "a.ckpt"
    ck.save_checkpoint(path, {"x": 1})
    named = next(
        i for i, event in enumerate(events) if event[0] == "name" and event[2] == str(path)
    )
    assert ("sync", events[named][1]) in events[:named]
    assert ("sync", str(tmp_path)) in events[named:]


def test_link_is_the_same_checkpoint(saved):
    target = saved.parent / "epoch=0-step=3.ckpt"
    ck.link_checkpoint(saved, target)
    assert os.path.samefile(saved, target)
    assert ck.load_checkpoint(target)["global_step"] == 3


def test_link_falls_back_to_a_copy(saved, monkeypatch):
    def no_links(source, target):
        raise OSError(1, "not permitted")

    monkeypatch.setattr(os, "link", no_links)
    target = saved.parent / "copy.ckpt"
    ck.link_checkpoint(saved, target)
    assert not os.path.samefile(saved, target)
    assert ck.load_checkpoint(target)["global_step"] == 3


def test_sweep_takes_leftovers_only(saved):
    folder = saved.parent
    (folder / ".last.ckpt.0123abcd.tmp").write_bytes(b"half")
    (folder / "epoch=0-step=9.ckpt.sha256").write_text("00")
    (folder / "notes.txt").write_text("mine")
    (folder / ".hidden").write_text("mine")
    swept = {path.name for path in ck.sweep_leftovers(folder)}
    assert swept == {".last.ckpt.0123abcd.tmp", "epoch=0-step=9.ckpt.sha256"}
    assert names(folder) == [".hidden", "last.ckpt", "last.ckpt.sha256", "notes.txt"]


def test_remove_takes_both_files_and_forgives_absence(saved):
    ck.remove_checkpoint(saved)
    ck.remove_checkpoint(saved)
    assert names(saved.parent) == []


# The newest readable


def write_steps(folder, steps, last=None):
    for step in steps:
        ck.save_checkpoint(folder / f"epoch=0-step={step}.ckpt", {"global_step": step})
    if last is not None:
        ck.link_checkpoint(folder / f"epoch=0-step={last}.ckpt", folder / "last.ckpt")


def test_newest_goes_by_step_not_by_name_or_time(tmp_path):
    write_steps(tmp_path, [100, 9, 20])
    os.utime(tmp_path / "epoch=0-step=9.ckpt", (2e9, 2e9))
    assert ck.find_newest_checkpoint(tmp_path).name == "epoch=0-step=100.ckpt"


def test_last_is_preferred_among_equals_and_found_below_ckpts(tmp_path):
    write_steps(tmp_path / "ckpts", [9, 20], last=20)
    assert ck.find_newest_checkpoint(tmp_path).name == "last.ckpt"


def test_a_stale_last_loses_to_a_newer_step(tmp_path):
    write_steps(tmp_path, [9], last=9)
    write_steps(tmp_path, [20])
    assert ck.find_newest_checkpoint(tmp_path).name == "epoch=0-step=20.ckpt"


def test_a_last_of_its_own_is_ranked_by_its_step(tmp_path):
    write_steps(tmp_path, [9])
    ck.save_checkpoint(tmp_path / "last.ckpt", {"global_step": 12})
    assert ck.find_newest_checkpoint(tmp_path).name == "last.ckpt"


def test_a_damaged_newest_is_passed_over_and_both_are_named(tmp_path, caplog):
    write_steps(tmp_path, [9, 20], last=20)
    content = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "epoch=0-step=20.ckpt").write_bytes(content[:-9])
    with caplog.at_level("WARNING", logger="pytorch_lightning"):
        assert ck.find_newest_checkpoint(tmp_path).name == "epoch=0-step=9.ckpt"
    assert "last.ckpt is damaged" in caplog.text
    assert "epoch=0-step=9.ckpt instead of last.ckpt, epoch=0-step=20.ckpt" in caplog.text


def test_nothing_to_find_and_nothing_readable(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*; expected last\.ckpt"):
        ck.find_newest_checkpoint(tmp_path)
    (tmp_path / "last.ckpt").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no readable checkpoint .* is empty"):
        ck.find_newest_checkpoint(tmp_path)


def test_step_of_name():
    assert ck.step_of_name("x/epoch=0-step=40.ckpt") == 40
    assert ck.step_of_name("epoch=2-step=40-v1.ckpt") == 40
    assert ck.step_of_name("last.ckpt") is None


def test_files_are_readable_by_upstream_tools(saved):
    assert zipfile.ZipFile(saved).testzip() is None
    assert torch.load(saved, weights_only=True)["global_step"] == 3


def test_sigkill_while_saving_never_leaves_a_bad_file(tmp_path):
    path, draw = tmp_path / "last.ckpt", random.Random(3)
    payload = {"state_dict": {"a": torch.ones(50_000)}}

    def save_forever():
        step = 0
        while True:
            step += 1
            ck.save_checkpoint(path, {"global_step": step, **payload})

    n_readable = 0
    for _ in range(12):
        pid = in_child(save_forever)
        time.sleep(draw.uniform(0.02, 0.15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if path.exists():
            n_readable += 1
            assert ck.load_checkpoint(path)["global_step"] >= 1
        ck.sweep_leftovers(tmp_path)
        assert names(tmp_path) in ([], ["last.ckpt", "last.ckpt.sha256"])
    assert n_readable > 0


def test_file_size_limit_is_untouched():
    """The full-disk test must not leak its limit into this process."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_while_a_file_is_replaced_both_hashes_are_listed(saved, monkeypatch):
    old, listed, real_replace = hash_of(saved), [], os.replace

    def replace(source, target):
        if Path(target) == saved:
            listed.extend(ck.hash_path(saved).read_text().split())
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    ck.save_checkpoint(saved, {"global_step": 4})
    assert listed == [hash_of(saved), old]
    assert ck.hash_path(saved).read_text().split() == [hash_of(saved)]
