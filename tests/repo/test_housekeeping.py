"""What a reader of the repository meets: licence, change log, README, configs, the CI script."""

import os
import re
import shlex
import subprocess

import pytest
from omegaconf import OmegaConf

# Written in parts, so that this file does not hold what it looks for.
LOCAL_ROOTS = "|".join(("root", "home", "work", "opt", "Users"))
LOCAL_PATH = re.compile("(?<![\\w.~$}])/(?:" + LOCAL_ROOTS + ")/\\w")
TEXT = {".py", ".yaml", ".yml", ".json", ".md", ".txt", ".toml", ".cpp", ".h", ".sh", ".cfg", ""}
LARGEST_FILE_BYTES = 10 * 2**20
ASSETS_LIMIT_BYTES = 60 * 2**20


def local_paths(text: str) -> list[str]:
    return LOCAL_PATH.findall(text)


def test_nothing_committed_holds_a_path_of_a_machine(tracked_files, root):
    found = []
    for path in tracked_files:
        if path.suffix not in TEXT:
            continue
        for number, line in enumerate((root / path).read_text("utf-8").splitlines(), 1):
            if local_paths(line):
                found.append(f"{path}:{number}: {line.strip()[:100]}")
    assert found == []


@pytest.mark.parametrize(
    "text, hit", [("x = '/ro" + "ot/a'", 1), ("/ho" + "me/me/run", 1), ("~/.cache", 0), ("a/b", 0)]
)
def test_a_local_path_is_seen(text, hit):
    assert len(local_paths(text)) == hit


def test_no_committed_file_is_too_large(tracked_files, root):
    sizes = {path: (root / path).stat().st_size for path in tracked_files}
    assert [str(path) for path, size in sizes.items() if size > LARGEST_FILE_BYTES] == []
    assets = sum(size for path, size in sizes.items() if "assets" in path.parts)
    assert assets <= ASSETS_LIMIT_BYTES


FOREIGN_CHECKPOINTS = {"tests/fixtures/upstream/omegaconf_2_3_optimizer.ckpt"}
"""Written by versions that cannot be installed beside ours; a few kilobytes."""


def test_no_leftover_is_committed(tracked_files):
    debris = re.compile(r"(__pycache__|\.egg-info|\.ipynb|\.(pyc|swp|orig|rej|ckpt|log)$)")
    found = {str(path) for path in tracked_files if debris.search(str(path))}
    assert found == FOREIGN_CHECKPOINTS


def test_the_licence_is_apache_2(root):
    text = (root / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text and len(text) > 10_000


def test_the_change_log_keeps_its_form(root):
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "https://keepachangelog.com/" in text
    releases = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", text, re.MULTILINE)
    assert releases and releases[0][0].startswith(("Unreleased", "0."))
    kinds = set(re.findall(r"^### (\w+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def code_blocks(readme: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)


def launch_lines(readme: str) -> list[str]:
    """Every launch command of the README's code blocks, with continued lines joined."""
    text = "\n".join(code_blocks(readme)).replace("\\\n", " ")
    parts = [part for line in text.splitlines() for part in line.split("&&")]
    return [part.strip() for part in parts if "launch.py" in part]


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text(encoding="utf-8")


def test_every_launch_command_of_the_readme_is_one(readme, root, monkeypatch):
    from threestudio.launcher.arguments import parse_arguments

    monkeypatch.chdir(root)
    lines = launch_lines(readme)
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line, comments=True)
        words = words[words.index("launch.py") + 1 :]
        if "--help" in words:
            continue
        arguments = parse_arguments(words)
        for path in arguments.configs:
            assert path.is_file() or "outputs" in path.parts, f"{line}: there is no {path}"


def test_every_key_that_the_readme_overrides_exists(readme, root, monkeypatch):
    """Commands without weights are planned by the launcher itself, which refuses an unknown key."""
    from threestudio.launcher.arguments import parse_arguments
    from threestudio.launcher.extensions import load_extensions
    from threestudio.launcher.stages import read_sources
    from threestudio.launcher.validate import accepts_key

    monkeypatch.chdir(root)
    load_extensions(root / "custom")
    for line in launch_lines(readme):
        words = shlex.split(line, comments=True)
        words = words[words.index("launch.py") + 1 :]
        if "--help" in words:
            continue
        arguments = parse_arguments(words)
        if not all(path.is_file() for path in arguments.configs):
            continue
        for source in read_sources(arguments, root):
            for override in source.overrides:
                assert accepts_key(source.file_cfg, override.key), f"{line}: {override.key}"


def test_every_file_that_the_readme_links_exists(readme, root):
    links = re.findall(r"\]\(([^)#]+)\)", readme)
    assert links
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (root / link).exists()] == []


def test_the_readme_names_the_pins(readme, root):
    requirements = (root / "requirements.txt").read_text(encoding="utf-8")
    (torch_pin,) = re.findall(r"^torch==(\S+)$", requirements, re.MULTILINE)
    assert torch_pin in readme and "3.11" in readme


def test_profiles_of_the_readme_are_those_of_the_config(readme, root):
    config = OmegaConf.load(root / "custom/configs/fourdfy_stage_1.yaml")
    table = re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE)
    assert [name for name in table if name in config.profiles] == list(config.profiles)


def test_the_ci_script_runs_the_commands_of_the_readme(readme, root):
    path = root / ".ci" / "run"
    script = path.read_text(encoding="utf-8")
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    (command,) = [line for block in code_blocks(readme) for line in block.splitlines()
                  if "python -m pytest" in line and "tests/requirements.txt" in line]  # fmt: skip
    install, test = (part.strip() for part in command.split("&&"))
    joined = " ".join(script.replace("\\\n", " ").split())
    for word in install.removeprefix("pip install").split():
        assert word in joined
    assert test in joined and "HF_HUB_OFFLINE=1" in joined


def test_every_config_is_readable_and_names_itself(root):
    paths = sorted((root / "custom" / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        config = OmegaConf.load(path)
        assert config.name == path.stem
        assert path.read_text(encoding="utf-8").startswith("#"), f"{path} does not say what it is"
