"""Speed and memory of the sparse path, side by side with what it must beat.

    from minimoe.bench import bench, table
    print(table(bench(tokens=1024)))

bench.py says what is timed, clock.py how, tables.py how it reads.
"""

from .bench import (
    LIVE,
    POOL,
    ROUTINGS,
    DenseMasked,
    GroupedMoE,
    agreement,
    bench,
    beside,
    layer_bytes,
    make_routes,
    many_adapters,
    mora_layers,
    record,
    up_bytes,
    up_projections,
)
from .clock import Clock, Contenders, keep_freed_memory, rounds, spread
from .tables import from_json, page, read, table

__all__ = [
    "LIVE",
    "POOL",
    "ROUTINGS",
    "Clock",
    "Contenders",
    "DenseMasked",
    "GroupedMoE",
    "agreement",
    "bench",
    "beside",
    "from_json",
    "keep_freed_memory",
    "layer_bytes",
    "make_routes",
    "many_adapters",
    "mora_layers",
    "page",
    "read",
    "record",
    "rounds",
    "spread",
    "table",
    "up_bytes",
    "up_projections",
]
