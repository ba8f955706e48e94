import subprocess
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from threestudio.launcher.progress import RunProgress
from threestudio.utils.callbacks import (
    CodeSnapshotCallback,
    ConfigSnapshotCallback,
    CustomProgressBar,
    ProgressCallback,
    VersionedCallback,
)

TRAINER = SimpleNamespace(is_global_zero=True, global_step=30, max_steps=120)


def test_versions(tmp_path):
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_7").mkdir()
    (tmp_path / "version_x").mkdir()
    assert VersionedCallback(str(tmp_path)).savedir == str(tmp_path / "version_8")
    assert VersionedCallback(str(tmp_path), 3).savedir == str(tmp_path / "version_3")
    assert VersionedCallback(str(tmp_path), "best").savedir == str(tmp_path / "best")
    assert VersionedCallback(str(tmp_path), use_version=False).savedir == str(tmp_path)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    folder = tmp_path / "repository"
    (folder / "a").mkdir(parents=True)
    (folder / "load").mkdir()
    for name, content in {"a/tracked.py": "1", "untracked .py": "2", "ignored.log": "3",
                          ".gitignore": "*.log", "load/data.txt": "4", "gone.py": "5",
                          "big.bin": "x" * (1 << 20) + "x"}.items():
        (folder / name).write_text(content)
    monkeypatch.chdir(folder)
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", "add", "a", "load", "gone.py", ".gitignore"], check=True)
    (folder / "gone.py").unlink()
    return folder


def test_code_snapshot_holds_the_sources_only(repository, tmp_path):
    CodeSnapshotCallback(str(tmp_path / "code"), use_version=False).on_fit_start(TRAINER, None)
    copied = {str(path.relative_to(tmp_path / "code")) for path in (tmp_path / "code").rglob("*")
              if path.is_file()}
    assert copied == {"a/tracked.py", "untracked .py", ".gitignore"}


def test_without_git_there_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    CodeSnapshotCallback(str(tmp_path / "code")).on_fit_start(TRAINER, None)
    assert "no code snapshot" in caplog.text and not (tmp_path / "code").exists()


def test_config_snapshot(tmp_path):
    source = tmp_path / "config.yaml"
    source.write_text("a: 1  # as written\n")
    config = OmegaConf.create({"a": 1, "b": "${a}"})
    callback = ConfigSnapshotCallback(source, config, str(tmp_path / "configs"), use_version=False)
    callback.setup(TRAINER, None, "fit")
    assert (tmp_path / "configs" / "raw.yaml").read_text() == source.read_text()
    assert OmegaConf.load(tmp_path / "configs" / "parsed.yaml")["a"] == 1
    callback = ConfigSnapshotCallback(None, config, str(tmp_path / "other"), use_version=False)
    callback.setup(TRAINER, None, "fit")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["parsed.yaml"]


def test_other_ranks_write_nothing(tmp_path):
    other = SimpleNamespace(is_global_zero=False)
    ConfigSnapshotCallback(None, {}, str(tmp_path / "configs")).setup(other, None, "fit")
    CodeSnapshotCallback(str(tmp_path / "code")).on_fit_start(other, None)
    assert list(tmp_path.iterdir()) == []


def test_progress_file_is_one_line(tmp_path):
    callback = ProgressCallback(str(tmp_path / "progress"))
    seen = []
    for hook, args in (("on_train_start", ()), ("on_train_batch_end", (None, None, 0)),
                       ("on_validation_start", ()), ("on_test_start", ()),
                       ("on_predict_start", ())):
        getattr(callback, hook)(TRAINER, None, *args)
        seen.append((tmp_path / "progress").read_text())
    assert seen == ["Initializing", "Generated 25%", "Rendering validation image",
                    "Rendering video", "Exporting mesh assets"]
    assert len(list(tmp_path.iterdir())) == 1


def test_upstreams_bar_is_ours():
    bar = CustomProgressBar(refresh_rate=1)
    assert isinstance(bar, RunProgress) and bar.refresh_rate == 1
