"""The small networks of a field on the CPU: blocked PyTorch against its alternatives.

    python tests/benchmarks/small_mlp.py [--repeats 7] [--compile] [--write]

Density and colour head of the published field (32 features, 64 neurons) and of the embedded
profile's (16 features, 32 neurons). `blocked` is what training runs; `plain` is the same layers
over all points at once; `fused` is small_mlp.cpp beside this file, called through ctypes;
`--compile` adds torch.compile of the plain layers, which takes minutes to build. All run in turn in
one process on one thread, in process time, so the ratios survive a busy machine. `--write` stores
the report under tests/benchmarks/results/.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from threestudio.kernels import native_build
from threestudio.models.mlp import _BlockedMLPs, _plain_mlp
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from circumstances import as_lines, describe_circumstances, result_path  # noqa: E402

SOURCE = Path(__file__).with_suffix(".cpp")
CASES = ((2**16, 32, 64, 1), (2**16, 32, 64, 3), (2**15, 16, 32, 1), (2**15, 16, 32, 3))
"""Points, features, neurons, outputs."""
TOLERANCE = 1e-5
"""Relative to the largest entry; sums of 2^16 terms in another order."""

Case = Callable[[], object]


class Problem:
    """One network with data; every way to evaluate it gives the same numbers."""

    def __init__(self, n: int, n_in: int, n_hidden: int, n_out: int) -> None:
        draws = torch.Generator().manual_seed(0)
        self.sizes = (n_in, n_hidden, n_out)
        self.x = torch.randn((n, n_in), generator=draws).requires_grad_()
        self.weights = [
            (torch.randn(shape, generator=draws) * 0.2).requires_grad_()
            for shape in ((n_hidden, n_in), (n_out, n_hidden))
        ]
        self.grad = torch.randn((n, n_out), generator=draws)

    def torch_cases(self, evaluate: Callable) -> tuple[Case, Case]:
        """Return forward and backward of a function of (x, *weights)."""
        out = evaluate(self.x, *self.weights)
        wanted = [self.x, *self.weights]

        def forward() -> Tensor:
            with torch.no_grad():
                return evaluate(self.x, *self.weights)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, wanted, self.grad, retain_graph=True)

        return forward, backward

    def fused_cases(self) -> tuple[Case, Case]:
        """Return forward and backward of the C++ file."""
        library = ctypes.CDLL(str(native_build.build(SOURCE, {})))
        sizes = (ctypes.c_int64(len(self.x)), *map(ctypes.c_int32, self.sizes))

        def call(name: str, *tensors: Tensor) -> None:
            pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
            getattr(library, name)(*pointers, *sizes)

        def forward() -> Tensor:
            out = torch.empty_like(self.grad)
            call("mlp_forward", self.x, *self.weights, out)
            return out

        def backward() -> list[Tensor]:
            gradients = [torch.empty_like(each) for each in (self.x, *self.weights)]
            call("mlp_backward", self.x, *self.weights, self.grad, *gradients)
            return gradients

        return forward, backward


def check(ways: dict[str, tuple[Case, Case]]) -> None:
    """Raise ValueError where a way disagrees with the plain layers."""
    forward, backward = ways["plain"]
    expected = [forward(), *backward()]
    for name, (forward, backward) in ways.items():
        for one, other in zip(expected, [forward(), *backward()], strict=True):
            error = float((one - other).abs().max() / one.abs().max())
            if not error <= TOLERANCE:
                raise ValueError(f"{name} is off by {error:.1e}; expected at most {TOLERANCE:g}.")


def measure(case: tuple[int, int, int, int], repeats: int, compiles: bool) -> list[dict]:
    """Return one row per way: median milliseconds, and the blocked way over it."""
    problem = Problem(*case)

    def plain(x: Tensor, *weights: Tensor) -> Tensor:
        return _plain_mlp(x, weights)

    def blocked(x: Tensor, *weights: Tensor) -> Tensor:
        return _BlockedMLPs.apply(x, (len(weights),), *weights)[0]

    ways = {
        "blocked": problem.torch_cases(blocked),
        "plain": problem.torch_cases(plain),
        "fused": problem.fused_cases(),
    }
    if compiles:
        ways["torch.compile"] = problem.torch_cases(torch.compile(plain, dynamic=False))
    check(ways)
    samples: dict[tuple[str, int], list[float]] = {}
    for _ in range(repeats):
        for name, passes in ways.items():
            for index, run in enumerate(passes):
                began = time.process_time()
                run()
                samples.setdefault((name, index), []).append((time.process_time() - began) * 1e3)
    ms = {key: statistics.median(values) for key, values in samples.items()}
    return [
        {
            "case": "{} x {}-{}-{}".format(*case),
            "way": name,
            "forward_ms": ms[name, 0],
            "backward_ms": ms[name, 1],
            "blocked_over_it": sum(ms["blocked", i] for i in (0, 1))
            / sum(ms[name, i] for i in (0, 1)),
        }
        for name in ways
    ]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also torch.compile")
    parser.add_argument("--write", action="store_true", help="store the report under results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = describe_circumstances(threads=1)
    rows = [row for case in CASES for row in measure(case, arguments.repeats, arguments.compile)]
    lines = ["# Small networks on the CPU", "", *as_lines(facts), ""]
    lines += [
        "| points x widths | way | forward, ms | backward, ms | blocked / it |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['case']} | {row['way']} | {row['forward_ms']:.2f} | {row['backward_ms']:.2f} "
            f"| {row['blocked_over_it']:.2f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write:
        result_path("small_mlp", "md").write_text(text, encoding="utf-8")
        report = json.dumps({**facts, "rows": rows}, indent=1)
        result_path("small_mlp", "json").write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
