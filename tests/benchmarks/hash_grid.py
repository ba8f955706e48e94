"""Speed of the hash grid's back ends, beside what the memory system allows.

    python tests/benchmarks/hash_grid.py [--device cpu|cuda] [--log2-points 14 17] [--write]

3D, 4D, and 4D-fy's sum of both, at the published size (16 levels x 2 features, 2^19 entries) and at
the embedded profile's. Every back end that this machine has is run in one process, so the ratios
survive a busy machine; times are medians, the best in brackets. On the CPU the floor is bare loops
over the very addresses that a kernel visits, in turn with it: the ratio to the floor is the median
over the rounds. The twin, which fills gigabytes, has rounds of its own. On any device the ceiling
is the rate of a plain copy. Useful bytes count the table entries alone: read once forward, read and
written once in the gradient to the table. `--cpu-time` counts the time that the process itself was
running, for one thread on a busy CPU. `--write` stores the report under tests/benchmarks/results/,
`--json` stores it where `kernel_bounds.py` wants it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from threestudio.kernels import GridLayout, native_build
from threestudio.kernels.hash_grid import (
    available_backends,
    hash_grid_encode,
    hash_grid_encode_sum,
)
from threestudio.kernels.torch_backend import corner_indices

sys.path.insert(0, str(Path(__file__).parent))

from circumstances import as_lines, describe_circumstances, result_path  # noqa: E402

FLOOR_SOURCE = Path(__file__).parent / "hash_grid_floor.cpp"
PAPER = {"n_levels": 16, "log2_hashmap_size": 19, "base_resolution": 16}
PAPER["per_level_scale"] = 1.447269237440378
EMBEDDED = {"n_levels": 8, "log2_hashmap_size": 15, "base_resolution": 8, "per_level_scale": 1.42}
EMBEDDED_LOG2_POINTS = 14
GRIDS = {"3D": (3,), "4D": (4,), "3D + 4D": (3, 4)}
PASSES = ("forward", "backward t", "backward x+t")
MOST_CORNER_BYTES = 2**31
"""The twin keeps every corner's value for its backward pass; beyond this it is left out."""

Case = Callable[[], None]


@dataclass(frozen=True)
class Bench:
    """Where and how long things are measured."""

    device: torch.device
    repeats: int
    uses_cpu_time: bool

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.uses_cpu_time else time.perf_counter()

    def measure(self, cases: dict[str, Case]) -> dict[str, list[float]]:
        """Milliseconds of each case, run in turn; the first round warms caches and allocators."""
        samples: dict[str, list[float]] = {name: [] for name in cases}
        for run in range(self.repeats + 1):
            for name, case in cases.items():
                begin = self.now()
                case()
                if run:
                    samples[name].append((self.now() - begin) * 1e3)
        return samples

    def copy_rate(self) -> float:
        """Bytes a second that a plain copy reads and writes, of 64 MiB (1 GiB on a GPU)."""
        count = 2**28 if self.device.type == "cuda" else 2**24
        source = torch.zeros(count, device=self.device)
        target = torch.empty_like(source)
        best = min(self.measure({"copy": lambda: target.copy_(source)})["copy"])
        return 2 * 4 * count / (best * 1e-3)


def floor_probes(x: torch.Tensor, layout: GridLayout) -> dict[str, Case]:
    """Bare loops over the addresses that the CPU kernel visits for ``x``."""
    library = ctypes.CDLL(str(native_build.build(FLOOR_SOURCE, {})))
    n_levels, n_threads = layout.n_levels, torch.get_num_threads()
    indices = []
    for level in range(n_levels):
        cell = (x * layout.scales[level] + 0.5).floor().long()
        indices.append(corner_indices(cell, layout, level).to(torch.int32).flatten())
    index = torch.stack(indices)
    starts = torch.tensor(layout.offsets[:-1])
    table = torch.zeros(layout.n_params)
    pointer = ctypes.c_void_p
    shared = [pointer] * 3 + [ctypes.c_int32, ctypes.c_int64, ctypes.c_int32]
    library.gather.argtypes = library.read_add_write.argtypes = shared
    library.gather.restype = ctypes.c_float

    def probe(function: Callable) -> Case:
        def run() -> None:
            function(
                index.data_ptr(), starts.data_ptr(), table.data_ptr(),
                n_levels, index.shape[1], n_threads,
            )  # fmt: skip

        return run

    return {"gather": probe(library.gather), "read-add-write": probe(library.read_add_write)}


def grid_cases(x: torch.Tensor, layouts: list[GridLayout], backend: str) -> dict[str, Case]:
    """Forward, and backward to the tables and to everything, of one back end."""
    generator = torch.Generator().manual_seed(0)
    tables = [
        torch.randn(layout.n_params, generator=generator).to(x.device).requires_grad_()
        for layout in layouts
    ]
    points = x.clone().requires_grad_()
    grad = torch.randn((len(x), layouts[0].n_output_dims), generator=generator).to(x.device)

    def encode(at: torch.Tensor) -> torch.Tensor:
        if len(layouts) == 2:
            return hash_grid_encode_sum(at, *tables, *layouts, backend)
        return hash_grid_encode(at, tables[0], layouts[0], backend)

    features, features_of_points = encode(x), encode(points)

    def forward() -> None:
        with torch.no_grad():
            encode(x)

    def backward_tables() -> None:
        torch.autograd.grad(features, tables, grad, retain_graph=True)

    def backward_all() -> None:
        torch.autograd.grad(features_of_points, (points, *tables), grad, retain_graph=True)

    return dict(zip(PASSES, (forward, backward_tables, backward_all), strict=True))


def entry_bytes(layouts: list[GridLayout], n_points: int) -> int:
    """Bytes of the table entries that the corners of all points name."""
    return sum(
        n_points * layout.n_levels * 2**layout.n_input_dims * layout.n_features_per_level * 4
        for layout in layouts
    )


def rows_of(grid: str, config: dict, n_points: int, bench: Bench, rate: float) -> list[dict]:
    """One row for each pass and back end."""
    layouts = [GridLayout.from_config(dims, config) for dims in GRIDS[grid]]
    generator = torch.Generator().manual_seed(2)
    x = torch.rand((n_points, max(GRIDS[grid])), generator=generator).to(bench.device)
    touched = entry_bytes(layouts, n_points)
    backends = available_backends(layouts[-1], bench.device, torch.float32)
    if touched > MOST_CORNER_BYTES:
        backends.remove("torch")
    cases = {}
    if bench.device.type == "cpu":
        probes = [floor_probes(x[:, : layout.n_input_dims], layout) for layout in layouts]
        for name in probes[0]:
            cases["floor", name] = lambda name=name: [probe[name]() for probe in probes]
    for backend in backends:
        for name, case in grid_cases(x, layouts, backend).items():
            cases[backend, name] = case
    twin = {name: cases.pop(name) for name in list(cases) if name[0] == "torch"}
    samples = {**bench.measure(cases), **bench.measure(twin)}
    median = {name: statistics.median(ms) for name, ms in samples.items()}
    floors = {}
    if bench.device.type == "cpu":
        gather, update = samples["floor", "gather"], samples["floor", "read-add-write"]
        both = [sum(pair) for pair in zip(gather, update, strict=True)]
        floors = dict(zip(PASSES, (gather, update, both), strict=True))
    traffic = dict(zip(PASSES, (touched, 2 * touched, 3 * touched), strict=True))
    return [
        {
            "grid": grid,
            "log2_points": n_points.bit_length() - 1,
            "levels": config["n_levels"],
            "pass": name,
            "backend": backend,
            "ms": median[backend, name],
            "best_ms": min(samples[backend, name]),
            "x_floor": _median_ratio(samples[backend, name], floors[name]) if floors else None,
            "useful_share_of_copy_rate": traffic[name] / (median[backend, name] * 1e-3) / rate,
            "twin_over_it": _ratio(median.get(("torch", name)), median[backend, name]),
        }
        for name in PASSES
        for backend in backends
    ]


def _median_ratio(own: list[float], floor: list[float]) -> float:
    """Of the rounds' ratios: a machine that slows down for a round slows both."""
    return statistics.median(ms / least for ms, least in zip(own, floor, strict=True))


def _ratio(other: float | None, own: float) -> float | None:
    return None if other is None else other / own


def as_table(rows: list[dict]) -> list[str]:
    """The rows as a Markdown table."""
    lines = [
        "| grid | N | levels | pass | back end | ms (best) | x floor | of copy rate | twin / it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        floor, twin = (
            "" if v is None else f"{v:.2f}" for v in (row["x_floor"], row["twin_over_it"])
        )
        lines.append(
            f"| {row['grid']} | 2^{row['log2_points']} | {row['levels']} | {row['pass']} | "
            f"{row['backend']} | {row['ms']:.2f} ({row['best_ms']:.2f}) | {floor} | "
            f"{row['useful_share_of_copy_rate']:.2f} | {twin} |"
        )
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu")
    default = [14, 16, 18, 20, 22] if has_gpu else [14, 17]
    parser.add_argument("--log2-points", type=int, nargs="+", default=default)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="count process time, not wall time")
    parser.add_argument("--write", action="store_true", help="store the report under results/")
    parser.add_argument("--json", type=Path, help="also store its figures in this file")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    bench = Bench(torch.device(arguments.device), arguments.repeats, arguments.cpu_time)
    facts = describe_circumstances(threads=torch.get_num_threads())
    if bench.device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(bench.device)
    rate = bench.copy_rate()
    facts["copy_rate_gb_per_s"] = round(rate * 1e-9, 1)
    sizes = [(PAPER, 2**log2) for log2 in arguments.log2_points]
    sizes.append((EMBEDDED, 2**EMBEDDED_LOG2_POINTS))
    rows = []
    for config, n_points in sizes:
        for grid in GRIDS:
            rows += rows_of(grid, config, n_points, bench, rate)
            print("\n".join(as_table(rows[-1:])[2:]), file=sys.stderr, flush=True)
    text = "\n".join(["# Hash grid back ends", "", *as_lines(facts), "", *as_table(rows)]) + "\n"
    print(text)
    report = json.dumps({**facts, "rows": rows}, indent=1) + "\n"
    if arguments.json:
        arguments.json.write_text(report, encoding="utf-8")
    if arguments.write:
        name = f"hash_grid_{bench.device.type}"
        result_path(name, "md").write_text(text, encoding="utf-8")
        result_path(name, "json").write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
