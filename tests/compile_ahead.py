"""Compile the Triton kernels for an H100 (sm_90), which needs no GPU; print what each one uses.

A program of its own, run by test_kernels.py: in the interpreter that the other tests run in there
is nothing to compile.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minimoe import kernels


def usage(kernel, types, folder, warps=4, **sizes):
    """Registers, and bytes of local memory (spills), of one kernel as ptxas placed them.

    Pointers and widths (R, O) are multiples of 16, as the JIT sees that they are in a model: then
    it reads 16 bytes at once, and that is other code."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in sizes else types.get(n, "i32") for n in names}
    places = {n: (names.index(n),) for n in names}
    even = {places[n]: [["tt.divisibility", 16]] for n in names if n in types or n in ("R", "O")}
    source = ASTSource(kernel, signature, {places[n]: v for n, v in sizes.items()}, even)
    target, options = GPUTarget("cuda", 90, 32), {"num_warps": warps}
    cubin = Path(folder) / "kernel.cubin"
    cubin.write_bytes(triton.compile(source, target=target, options=options).asm["cubin"])
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.check_output([dump, "--dump-resource-usage", cubin], text=True)
    return {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}


if __name__ == "__main__":
    folder, columns = sys.argv[1], int(sys.argv[2])
    found = {}
    for name in ("fp32", "bf16", "fp16", "fp64"):
        wide = tl.float64 if name == "fp64" else tl.float32
        sizes = {"WIDE": wide, "ROWS": kernels.ROWS, "COLUMNS": columns or kernels.COLUMNS}
        bag = dict.fromkeys(("weights", "source", "out"), f"*{name}")
        bag |= dict.fromkeys(("rows", "starts", "ends"), "*i64")
        dots = dict.fromkeys(("g", "source", "out"), f"*{name}") | {"idx": "*i64"}
        found[f"bag {name}"] = usage(kernels.bag_kernel, bag, folder, **sizes)
        found[f"dots {name}"] = usage(kernels.dots_kernel, dots, folder, **sizes)
        if name == "fp64" or columns:
            continue
        row = {"z": f"*{name}", "top": f"*{name}", "idx": "*i32", "sumsq": "*fp32"}
        for R, G in ((512, 8), (4096, 16), (kernels.LONGEST, 32)):
            sizes = {"HALF": name != "fp32", "COLUMNS": R, "G": G, "K": 16}
            which = f"row {name}, R {R}"
            found[which] = usage(kernels.row_kernel, row, folder, kernels.warps_of(R), **sizes)
    print(json.dumps(found))
