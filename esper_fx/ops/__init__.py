"""The esper:: operators: schemas, fakes, references in ATen, autograd. ``seed`` is here, the fused ones in a file each.

A fused operator's file is imported when it is first needed; the Triton kernels behind it are in ``esper_fx.kernels``.
"""

from __future__ import annotations

from esper_fx.ops.digest import source_digest
from esper_fx.ops.seed import (
    SeedHost,
    hosts,
    reads_source,
    seed_forward,
    seed_input,
    seed_output,
)

#: Functions of ours that appear in the graphs of regions, by qualified name.
GRAPH_FUNCTIONS = (
    "esper_fx.ops.seed.seed_input",
    "esper_fx.ops.seed.seed_output",
    "esper_fx.ops.probe.site_values",
    "esper_fx.ops.probe.site_gradient",
    "esper_fx.ops.probe.site_sensor",
)

__all__ = [
    "GRAPH_FUNCTIONS",
    "SeedHost",
    "hosts",
    "reads_source",
    "seed_forward",
    "seed_input",
    "seed_output",
    "source_digest",
]
