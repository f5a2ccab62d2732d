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
    """Registers, and bytes of local memory (spills), of one kernel as ptxas placed them; I64 says
    whether any integer in it has 64 bits.

    Pointers and widths (R, O) are multiples of 16, as the JIT sees that they are in a model: then
    it reads 16 bytes at once, and that is other code."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in sizes else types.get(n, "i32") for n in names}
    places = {n: (names.index(n),) for n in names}
    even = {places[n]: [["tt.divisibility", 16]] for n in names if n in types or n in ("R", "O")}
    source = ASTSource(kernel, signature, {places[n]: v for n, v in sizes.items()}, even)
    target, options = GPUTarget("cuda", 90, 32), {"num_warps": warps}
    cubin = Path(folder) / "kernel.cubin"
    made = triton.compile(source, target=target, options=options).asm
    cubin.write_bytes(made["cubin"])
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.check_output([dump, "--dump-resource-usage", cubin], text=True)
    use = {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}
    return use | {"I64": "i64" in made["ttir"]}


def products(name, index, place, times):
    """(kernel, types, sizes) of the three products: numbers, indices and places of those types."""
    sizes = {"WIDE": tl.float64 if name == "fp64" else tl.float32, "PLACE": place}
    strip = sizes | {"COLUMNS": times * kernels.COLUMNS}
    numbers = dict.fromkeys(("v", "g", "weights", "source", "out"), f"*{name}")
    types = numbers | dict.fromkeys(("idx", "rows", "starts", "ends"), f"*{index}")
    yield kernels.spmm_kernel, types, strip | {"TOKENS": kernels.TOKENS}
    yield kernels.bag_kernel, types, strip | {"ROWS": kernels.ROWS}
    yield kernels.dots_kernel, types, sizes | {"STEP": times * kernels.STEP, "PAIRS": kernels.PAIRS}


if __name__ == "__main__":
    folder, times = sys.argv[1], int(sys.argv[2])  # so many times the columns that are shipped
    places = (("i32", tl.int32), ("i64", tl.int32), ("i64", tl.int64))
    found = {}
    for name in ("fp32", "bf16", "fp16", "fp64") if times == 1 else ("bf16",):
        for index, place in places if times == 1 else places[:1]:
            for kernel, types, sizes in products(name, index, place, times):
                which = f"{kernel.__name__}, {name}, idx {index}, places {place}"
                found[which] = usage(kernel, types, folder, **sizes)
        if name == "fp64" or times > 1:
            continue
        row = {"z": f"*{name}", "top": f"*{name}", "idx": "*i32", "sumsq": "*fp32"}
        for R, G in ((512, 8), (4096, 16), (kernels.LONGEST, 32)):
            sizes = {"HALF": name != "fp32", "COLUMNS": R, "G": G, "K": 16}
            which = f"row_kernel, {name}, R {R}"
            found[which] = usage(kernels.row_kernel, row, folder, kernels.warps_of(R), **sizes)
    print(json.dumps(found))
