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


def usage(kernel, types, folder, **sizes):
    """Registers, and bytes of local memory (spills), of one kernel as ptxas placed them."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in sizes else types.get(n, "i32") for n in names}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in sizes.items()})
    cubin = Path(folder) / "kernel.cubin"
    cubin.write_bytes(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"])
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
    print(json.dumps(found))
