"""Speed and memory of the sparse path, side by side with what it must beat.

    from minimoe.bench import bench, table
    print(table(bench(tokens=1024)))

bench.py says what is timed and in which order, contenders.py against what, routes.py with which
ranks, clock.py how; errors.py what must hold before, tables.py how it reads.
"""

from .bench import bench, suggested
from .clock import Clock, Contenders, keep_freed_memory, rounds, spread
from .contenders import (
    LIVE,
    DenseMasked,
    GroupedMoE,
    agreement,
    beside,
    layer_bytes,
    many_adapters,
    mora_layers,
    passes_over_scores,
    reference,
    small_layers,
    toy_backbone,
    up_bytes,
    up_projections,
)
from .errors import errors
from .routes import POOL, ROUTINGS, make_routes, record
from .tables import first_routing, from_json, page, read, table

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
    "errors",
    "first_routing",
    "from_json",
    "keep_freed_memory",
    "layer_bytes",
    "make_routes",
    "many_adapters",
    "mora_layers",
    "page",
    "passes_over_scores",
    "read",
    "record",
    "reference",
    "rounds",
    "small_layers",
    "spread",
    "suggested",
    "table",
    "toy_backbone",
    "up_bytes",
    "up_projections",
]
