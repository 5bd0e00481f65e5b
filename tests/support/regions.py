"""Compiling a graph the way the engine compiles a region."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx, nn

from esper_fx import _torch, ops
from esper_fx.engine.annotate import annotate
from esper_fx.ops.low_rank import hidden_launches
from esper_fx.passes.metas import TensorMeta


def compiled_region(module: nn.Module, inputs: Sequence[Tensor]) -> bytes:
    """A module of plain operations, traced and compiled for these inputs, as it is kept in the store."""
    region = fx.symbolic_trace(module)
    for node in region.graph.nodes:
        node.type = None  # annotations are no part of a region
    region.recompile()
    annotate(region, tuple(TensorMeta.of(value) for value in inputs))
    cacheable = dict.fromkeys(ops.GRAPH_FUNCTIONS, ops.source_digest())
    return _torch.compile_graph(region, list(inputs), cacheable, hidden=hidden_launches(region.graph))[1]
