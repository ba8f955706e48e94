"""Speed of the hash grid's back ends, beside the floor that the memory system sets.

    python tests/benchmarks/hash_grid.py [--points N] [--repeats R] [--cpu-time] [--write]

All candidates run interleaved in one process; the table gives medians, with the best in brackets.
Compare the ratios, which survive a busy machine, rather than the milliseconds. Where even they do
not, ``--cpu-time`` on one thread counts the time that the process itself was running. ``--write``
stores the report under tests/benchmarks/results/.
"""

import argparse
import ctypes
import datetime
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from threestudio.kernels import GridLayout, cpu_backend, hash_grid_encode, native_build
from threestudio.kernels.torch_backend import corner_indices

HERE = Path(__file__).parent
FLOOR_SOURCE = HERE / "hash_grid_floor.cpp"

PAPER = {"n_levels": 16, "log2_hashmap_size": 19, "base_resolution": 16}
PAPER["per_level_scale"] = 1.447269237440378
SMALL = {"n_levels": 8, "log2_hashmap_size": 15, "base_resolution": 8, "per_level_scale": 1.5}


def floor_probes(x: torch.Tensor, layout: GridLayout) -> dict[str, Callable[[], None]]:
    """Bare loops over the addresses that the kernel visits for ``x``."""
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

    def probe(function: Callable) -> Callable[[], None]:
        def run() -> None:
            function(
                index.data_ptr(), starts.data_ptr(), table.data_ptr(),
                n_levels, index.shape[1], n_threads,
            )  # fmt: skip

        return run

    return {"gather": probe(library.gather), "read-add-write": probe(library.read_add_write)}


def grid_cases(x: torch.Tensor, layout: GridLayout, backend: str) -> dict[str, Callable[[], None]]:
    """Forward, and backward to the table and to both, of one back end."""
    params = torch.randn(layout.n_params, generator=torch.Generator().manual_seed(0))
    params.requires_grad_()
    points = x.clone().requires_grad_()
    grad = torch.randn(len(x), layout.n_output_dims, generator=torch.Generator().manual_seed(1))
    features = hash_grid_encode(x, params, layout, backend)
    features_of_points = hash_grid_encode(points, params, layout, backend)

    def forward() -> None:
        with torch.no_grad():
            hash_grid_encode(x, params, layout, backend)

    def backward_table() -> None:
        torch.autograd.grad(features, params, grad, retain_graph=True)

    def backward_both() -> None:
        torch.autograd.grad(features_of_points, (points, params), grad, retain_graph=True)

    return {"forward": forward, "backward t": backward_table, "backward x+t": backward_both}


def measure(
    cases: dict[str, Callable[[], None]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Milliseconds of each case, run in turn."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for run in range(repeats + 1):
        for name, case in cases.items():
            begin = clock()
            case()
            if run:  # the first round warms caches and allocators
                samples[name].append((clock() - begin) * 1e3)
    return samples


def report(
    title: str, layout: GridLayout, n_points: int, repeats: int, clock: Callable[[], float]
) -> list[str]:
    x = torch.rand(n_points, layout.n_input_dims, generator=torch.Generator().manual_seed(2))
    cases = {f"floor {name}": run for name, run in floor_probes(x, layout).items()}
    for backend in ("cpu", "torch"):
        cases |= {f"{backend} {name}": run for name, run in grid_cases(x, layout, backend).items()}
    samples = measure(cases, repeats, clock)
    times = {name: statistics.median(ms) for name, ms in samples.items()}
    best = {name: min(ms) for name, ms in samples.items()}
    gather, update = times["floor gather"], times["floor read-add-write"]
    floors = {"forward": gather, "backward t": update, "backward x+t": gather + update}
    lines = [
        f"## {title}, N = {n_points}",
        "",
        f"Floor: gather {gather:.2f} ms, read-add-write {update:.2f} ms.",
        "",
        "| pass | cpu, ms | x floor | torch twin, ms | twin / cpu |",
        "|---|---|---|---|---|",
    ]
    for name, floor in floors.items():
        cpu, twin = times[f"cpu {name}"], times[f"torch {name}"]
        lines.append(
            f"| {name} | {cpu:.2f} ({best[f'cpu {name}']:.2f}) | {cpu / floor:.2f} | "
            f"{twin:.1f} ({best[f'torch {name}']:.1f}) | {twin / cpu:.1f} |"
        )
    return [*lines, ""]


def overhead(repeats: int = 200) -> str:
    """Time of one call over few points, which is nearly all overhead."""
    layout = GridLayout.from_config(3, SMALL)
    x = torch.rand(16, 3, generator=torch.Generator().manual_seed(3))
    cases = grid_cases(x, layout, "cpu")
    samples = measure(cases, repeats, time.perf_counter)
    times = {name: statistics.median(ms) for name, ms in samples.items()}
    shown = ", ".join(f"{name} {ms * 1e3:.0f} us" for name, ms in times.items())
    return f"One call of the cpu back end over 16 points, 8 levels, 3D: {shown}."


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment() -> list[str]:
    compiler = native_build.find_compiler()
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return [
        f"# Hash grid back ends, {datetime.date.today().isoformat()}",
        "",
        f"- hardware: {processor()}, {os.cpu_count()} cores; threads: {torch.get_num_threads()}",
        f"- Python {platform.python_version()}, torch {torch.__version__}, {' '.join(compiler)}",
        f"- load average before the run (1, 5, 15 minutes): {load}",
        f"- command: `python tests/benchmarks/hash_grid.py {' '.join(sys.argv[1:])}`",
        "- times are medians (best in brackets); x+t = gradient to positions and table; the floor",
        "  of x+t is the sum of the two loops",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=2**15, help="points of the paper's grids")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="count process time, not wall time")
    parser.add_argument("--write", action="store_true", help="store the report under results/")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    lines = environment()
    cases = (
        ("4D, 16 levels x 2, 2^19 entries", 4, PAPER, arguments.points),
        ("3D, 16 levels x 2, 2^19 entries", 3, PAPER, arguments.points),
        ("4D, 8 levels x 2, 2^15 entries (embedded profile)", 4, SMALL, 12_000),
        ("3D, 8 levels x 2, 2^15 entries (embedded profile)", 3, SMALL, 12_000),
    )
    for title, dims, config, n_points in cases:
        layout = GridLayout.from_config(dims, config)
        if not cpu_backend.is_available(layout):
            raise SystemExit(f"No compiled back end: {cpu_backend.unavailable_reason(layout)}")
        lines += report(title, layout, n_points, arguments.repeats, clock)
    lines.append(overhead())
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write:
        slug = re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")
        name = f"hash_grid_{slug}-{os.cpu_count()}core_{datetime.date.today().isoformat()}.md"
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
