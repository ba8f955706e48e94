"""The command that writes the training clips."""

import torch

from custom.fourd.scripts.render_clips import main
from custom.fourd.scripts.world_clips import load_clips


def test_clips_are_written_once_and_alike_from_one_seed(tmp_path, capsys):
    sizes = ["--single", "1", "--pair", "1"]
    assert main(["--work", str(tmp_path / "a"), *sizes]) == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["clips_1_0.pt", "clips_2_0.pt"], "no half-written file is left"
    lone, pair = (load_clips(tmp_path / "a" / name) for name in files)
    assert lone.layers.shape == (1, 16, 2, 1, 64, 64) and pair.layers.shape == (1, 16, 2, 2, 64, 64)

    stamp = (tmp_path / "a" / files[0]).stat().st_mtime_ns
    assert main(["--work", str(tmp_path / "a"), "--single", "9", "--pair", "9"]) == 0
    assert capsys.readouterr().out.count("exists; kept") == 2
    assert (tmp_path / "a" / files[0]).stat().st_mtime_ns == stamp

    assert main(["--work", str(tmp_path / "b"), "--shard", "1", *sizes]) == 0
    other = load_clips(tmp_path / "b" / "clips_1_1.pt")
    assert not torch.equal(other.cameras, lone.cameras)
