"""Compile the hash grid's Triton kernels for GPUs that are not here, and count what they use.

    pip install triton
    python tests/benchmarks/triton_offline.py [--json] [--write]

For every kernel, grid and architecture: registers and spilled bytes (by ptxas), 8-byte loads and
reductions (in the PTX) of one thread, seconds to compile. No driver and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

KERNELS = ("forward_kernel", "table_gradient_kernel", "point_gradient_kernel")
GRIDS = {
    "3D": {"N_AXES": 3, "D": 3, "STATIC": True, "DYNAMIC": False},
    "4D": {"N_AXES": 4, "D": 3, "STATIC": False, "DYNAMIC": True},
    "3D + 4D": {"N_AXES": 4, "D": 3, "STATIC": True, "DYNAMIC": True},
}
ARCHITECTURES = (80, 90)
COUNTS = ("n", "n_levels", "stride_n", "stride_f")


def compile_kernel(name: str, grid: str, architecture: int) -> dict[str, Any]:
    """One row of the table; features per level 2, fp32 tables."""
    import triton
    from threestudio.kernels import triton_backend, triton_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(triton_kernels, name)
    constants = {**GRIDS[grid], "F": 2, "BLOCK": triton_backend.BLOCK}
    types = {"levels_ptr": "*i32"} | dict.fromkeys(COUNTS, "i32")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    # As at run time: memory from PyTorch's allocator is aligned.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if argument.endswith("_ptr")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ptx = triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["ptx"]
    return {
        "kernel": name,
        "grid": grid,
        "architecture": f"sm_{architecture}",
        **_resources(ptx, architecture),
        "loads_8_byte": len(re.findall(r"ld\.global\S*\.v2\.b32", ptx)),
        "reductions_packed": len(re.findall(r"red\.global\S*\.v2\.f32", ptx)),
        "reductions_scalar": len(re.findall(r"red\.global\S*add\.f32", ptx)),
        "seconds": round(time.monotonic() - started, 1),
    }


def _resources(ptx: str, architecture: int) -> dict[str, int]:
    """Registers a thread and spilled bytes, as the assembler tells them."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"\.target (\w+)", ptx)
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target[1]}"]
        run = subprocess.run(
            [*command, file.name, "-o", "/dev/null"], capture_output=True, text=True, check=True
        )
    told = run.stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", told)[1]),
        "spilled_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", told)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print rows as JSON, no table")
    parser.add_argument("--write", action="store_true", help="store the result under results/")
    args = parser.parse_args()
    rows = [
        compile_kernel(name, grid, architecture)
        for architecture in ARCHITECTURES
        for name in KERNELS
        for grid in GRIDS
    ]
    if args.json:
        print(json.dumps(rows))
        return
    columns = tuple(rows[0])
    table = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    table += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    print("\n".join(table))
    if args.write:
        import triton
        from circumstances import describe_circumstances, result_path

        facts = describe_circumstances(threads=1)
        facts["packages"]["triton"] = triton.__version__
        path = result_path("triton_offline", "json")
        path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
