"""The account of stage 3's memory: the bound, the counting, and what each quantity does to it."""

import pytest
from omegaconf import OmegaConf

from custom.fourd.scripts import memory_account
from custom.fourd.scripts.memory_account import (
    GB,
    STAGE_3,
    account,
    compose,
    format_account,
    gradient_samples,
    peak_bytes,
)

LARGEST_GB = 22


@pytest.fixture(scope="module")
def cfg():
    return compose(STAGE_3, "low_vram")


@pytest.fixture(scope="module")
def phases(cfg):
    return account(cfg)


def size(rows, module, words):
    (found,) = [row for row in rows if row.module == module and words in row.what]
    return found.size


def test_low_vram_fits_a_card_of_24_gb(phases):
    for name, rows in phases.items():
        assert 10 * GB < peak_bytes(rows) < LARGEST_GB * GB, name


def test_the_models_have_their_published_sizes(phases):
    for rows in phases.values():
        assert size(rows, "mvdream", "U-Net") == pytest.approx(2 * 867.57e6, rel=1e-5)
        assert size(rows, "zeroscope", "U-Net") == pytest.approx(2 * 1411e6, rel=1e-3)
        assert size(rows, "zeroscope", "autoencoder") == pytest.approx(2 * 83.65e6, rel=1e-3)
        grids, networks, background = 12_599_920 + 15_474_688, 2 * 32 * 64 + 64 + 3 * 64, 448
        assert size(rows, "scene", "numbers") == 16 * (grids + networks + background)


def test_the_table_adds_up(phases):
    table = format_account(phases)
    for name, rows in phases.items():
        assert f"| {name} |" in table and f"**{peak_bytes(rows) / GB:.2f}**" in table
        listed = sum(row.size for row in rows)
        assert peak_bytes(rows) == pytest.approx(1.1 * listed + 0.8 * GB)
    assert {row.basis for rows in phases.values() for row in rows} == {"derived", "measured"}


def test_the_budget_bounds_the_samples_with_a_gradient(cfg):
    cfg = cfg.copy()
    budget = cfg.system.renderer.base_renderer
    assert gradient_samples(cfg.system, 16, True, 1e9) == 16 * budget.train_max_nums
    assert gradient_samples(cfg.system, 1, False, 1e9) == budget.train_max_nums_static
    assert gradient_samples(cfg.system, 16, True, 1000.0) == 1000
    budget.train_max_nums = 0
    assert gradient_samples(cfg.system, 16, True, 1e9) == 1e9


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("system.guidance_type_video", "wan-guidance", "zeroscope-guidance, not 'wan-guidance'"),
        ("data.single_view.prob_single_view_video", 0.5, r"prob_single_view_video 1\.0"),
    ],
)
def test_vsd_and_other_video_priors_are_refused(cfg, key, value, message):
    other = cfg.copy()
    OmegaConf.update(other, key, value)
    with pytest.raises(ValueError, match=message):
        account(other)


def test_the_command_prints_the_table(monkeypatch, capsys, phases):
    monkeypatch.setattr(memory_account, "account", lambda cfg, grid: phases)
    memory_account.main(["data.single_view.num_frames=8"])
    assert capsys.readouterr().out.strip() == format_account(phases).strip()


def test_a_sample_costs_what_is_kept_of_it(cfg):
    """Of each corner of both grids at all levels an index and a weight, and the networks' own."""
    scene = cfg.system.copy()
    scene.geometry.pos_encoding_config.log2_hashmap_size = 10  # tables are no cost of a sample
    _, _, renderer = memory_account.build_scene(scene)
    with_gradient, any_sample = memory_account.sample_bytes(renderer, edge=4)
    corners = 16 * (2**3 + 2**4) * (8 + 4)
    features, hidden = 32 * 4, 64 * 4
    assert corners + features + 2 * hidden <= with_gradient < corners + 2 * features + 3 * hidden
    # Colour, density, position, direction, interval, ray and weight, in the output and the graph.
    assert 60 < any_sample < 300
