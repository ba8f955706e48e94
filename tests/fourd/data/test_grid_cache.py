"""Rows beside a grid: what the model makes of each cell, and never another version's."""

import json

import numpy as np
import pytest
import torch

import custom.fourd  # noqa: F401 - registers the classes
from custom.fourd.data.frame_encoders import LatentEncoder, VisionEncoder
from custom.fourd.data.grid_cache import cache_path, cache_record, open_cache, write_cache
from custom.fourd.data.grid_cells import GridCells, write_grid
from custom.fourd.data.pair_cells import orbit_cameras, scene_times
from custom.fourd.data.world_cells import WorldCells
from tests.fixtures.frame_encoders import write_encoders

WHITE, BLACK = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [str(write_encoders(root / str(seed), seed)) for seed in (0, 1)]


@pytest.fixture
def grid(tmp_path):
    cameras = orbit_cameras([15.0], [0.0, 90.0, 180.0], 3.0, 40.0)
    source = WorldCells("a red cube", "cube", scene_times(2, False), cameras, 16, 16)
    write_grid(tmp_path / "grid", source, {"kind": "world"})
    return GridCells(tmp_path / "grid", 16, 16)


def test_rows_are_what_the_model_makes_of_each_cell(grid, models):
    encoder = LatentEncoder(models[0])
    done = []
    write_cache(grid, encoder, (0.0, 0.5, 1.0), lambda *counts: done.append(counts))
    rows = open_cache(grid, encoder.identity, (0.0, 0.5, 1.0))
    assert isinstance(rows, np.memmap) and rows.shape == (2, 3, 4, 8, 8)
    cell = grid.read_cell(1, 2).float() / 255
    image = cell[..., :3] + (1 - cell[..., 3:]) * torch.tensor([0.0, 0.5, 1.0])
    expected = encoder.encode(image[None])[0]
    # 16 bits keep 11 binary digits.
    assert np.allclose(rows[1, 2], expected, rtol=1e-3, atol=1e-4) and done == [(1, 2), (2, 2)]


def test_what_is_there_is_not_made_again(grid, models):
    path = write_cache(grid, LatentEncoder(models[0]), WHITE)
    before = path.stat().st_mtime_ns

    class Idle:
        identity = LatentEncoder(models[0]).identity

    assert write_cache(grid, Idle(), WHITE) == path and path.stat().st_mtime_ns == before


def test_rows_of_other_weights_are_refused(grid, models):
    write_cache(grid, LatentEncoder(models[0]), WHITE)
    other = LatentEncoder(models[1])
    with pytest.raises(
        ValueError, match=r"does not fit .* \(vae\): its weights were \w{12} and are \w{12}"
    ):
        open_cache(grid, other.identity, WHITE)
    # Both may lie there: each is found by its own weights.
    write_cache(grid, other, WHITE)
    assert not np.array_equal(*(open_cache(grid, LatentEncoder(m).identity, WHITE) for m in models))


def test_a_changed_model_makes_its_rows_stale(grid, tmp_path, models):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(models[0], tmp_path / "mine")
    encoder = LatentEncoder(str(tmp_path / "mine"))
    write_cache(grid, encoder, WHITE)
    path = tmp_path / "mine" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["encoder.conv_in.bias"] += 1
    save_file(weights, path)
    with pytest.raises(
        ValueError, match="its weights were .* Run render_grid on it with --latents"
    ):
        open_cache(grid, LatentEncoder(str(tmp_path / "mine")).identity, WHITE)


def test_rows_over_another_background_are_refused(grid, models):
    encoder = LatentEncoder(models[0])
    write_cache(grid, encoder, WHITE)
    with pytest.raises(ValueError, match=r"its background was \[1.0, 1.0, 1.0\] and is \[0.0"):
        open_cache(grid, encoder.identity, BLACK)


def test_rows_of_other_frames_are_refused(grid, models):
    encoder = LatentEncoder(models[0])
    write_cache(grid, encoder, WHITE)
    grid.record["frames_sha256"] = "another"
    with pytest.raises(ValueError, match="it is of other frames"):
        open_cache(grid, encoder.identity, WHITE)


def test_features_of_one_kind_are_not_the_other_s(grid, models):
    write_cache(grid, VisionEncoder(models[0], "plus"), WHITE)
    base = VisionEncoder(models[0], "base")
    with pytest.raises(ValueError, match="its features were plus and are base"):
        open_cache(grid, base.identity, WHITE)
    write_cache(grid, base, WHITE)
    assert open_cache(grid, base.identity, WHITE).shape == (2, 3, 12)


def test_nothing_cached_says_how_to_make_it(grid, models):
    with pytest.raises(
        ValueError, match=r"nothing cached of .*\(image_encoder\). Run .* --features"
    ):
        open_cache(grid, VisionEncoder(models[0]).identity, WHITE)


def test_a_record_says_what_was_encoded(grid, models):
    path = write_cache(grid, LatentEncoder(models[0]), WHITE)
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["encoder"]["part"] == "vae" and record["background"] == [1, 1, 1]
    assert record["frames"] == grid.record["frames_sha256"]
    assert path == cache_path(grid, cache_record(grid, LatentEncoder(models[0]).identity, WHITE))


def test_values_that_16_bits_cannot_hold_are_refused(grid):
    class Broken:
        identity = {"model": "broken", "part": "vae", "output": "mode", "fingerprint": "x"}

        def encode(self, rgb):
            return torch.full((len(rgb), 2), float("nan"))

    with pytest.raises(ValueError, match="broken gives values that are not finite or too large"):
        write_cache(grid, Broken(), WHITE)
    assert list(grid.folder.glob("*cache-*")) == []
