"""The command that writes the image model's training cells."""

import torch

from custom.fourd.scripts.render_pairs import main
from custom.fourd.scripts.world_pairs import load_pair_groups


def test_cells_are_written_once_and_alike_from_one_seed(tmp_path, capsys):
    sizes = ["--single", "1", "--pair", "1"]
    assert main(["--work", str(tmp_path / "a"), *sizes]) == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["pairs_1_0.pt", "pairs_2_0.pt"], "no half-written file is left"
    lone, pair = (load_pair_groups(tmp_path / "a" / name) for name in files)
    assert lone.layers.shape == (1, 4, 4, 2, 1, 64, 64)
    assert pair.layers.shape == (1, 4, 4, 2, 2, 64, 64)

    assert main(["--work", str(tmp_path / "a"), "--single", "9", "--pair", "9"]) == 0
    assert capsys.readouterr().out.count("exists; kept") == 2

    assert main(["--work", str(tmp_path / "b"), "--shard", "1", *sizes]) == 0
    other = load_pair_groups(tmp_path / "b" / "pairs_1_1.pt")
    assert not torch.equal(other.frame_times, lone.frame_times)
