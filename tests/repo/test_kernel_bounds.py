"""What `tests/benchmarks/kernel_bounds.py` makes of several runs."""

import pytest


@pytest.fixture
def bench(load):
    return load("kernel_bounds")


def reports(forward=1.2, twin=14.0, step=2.0):
    """One run's reports; other points, levels and back ends have figures that must not count."""
    rows = [
        {
            "grid": grid, "pass": name, "backend": backend, "log2_points": log2, "levels": levels,
            "x_floor": forward if counts else 99.0, "twin_over_it": twin if counts else 0.1,
        }
        for grid in ("3D", "4D", "3D + 4D")
        for name in ("forward", "backward t", "backward x+t")
        for backend in ("torch", "cpu")
        for log2, levels in ((17, 16), (14, 8), (14, 16))
        for counts in [backend == "cpu" and (log2, levels) == (17, 16)]
    ]  # fmt: skip
    return {"rows": rows}, {"ratio": step}


def test_every_bound_reads_its_own_figure(bench):
    bounds = bench.all_bounds()
    values = [bound.of(*reports()) for bound in bounds]
    assert values == [1.2, 14.0] * 6 + [2.0]
    assert [bound.limit for bound in bounds] == [1.5, 10.0] * 3 + [1.9, 10.0] * 3 + [2.5]
    assert len({bound.what for bound in bounds}) == 13


def test_the_median_is_held_to_the_bound(bench):
    bounds = bench.all_bounds()
    runs = [
        [bound.of(*reports(forward=forward, twin=twin)) for bound in bounds]
        for forward, twin in ((1.0, 9.0), (1.45, 9.5), (5.0, 30.0))
    ]
    table = bench.as_table(bounds, runs)
    forward, twin = (next(line for line in table if name in line) for name in
                     ("| 3D forward over its floor", "| eager twin over 3D forward"))  # fmt: skip
    assert "| <= 1.5 | 1.45 | yes | 1.00 | 1.45 | 5.00 |" in forward
    assert "| >= 10 | 9.50 | **no** | 9.00 | 9.50 | 30.00 |" in twin


def test_a_report_without_the_published_size_is_no_verdict(bench):
    grid, step = reports()
    grid["rows"] = [row for row in grid["rows"] if row["levels"] != 16]
    with pytest.raises(ValueError):
        bench.all_bounds()[0].of(grid, step)
