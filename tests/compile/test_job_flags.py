"""A job is compiled under the flags of the process that asks for it, not under those of the worker."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, fx

from esper_fx import _torch, flags
from esper_fx.engine.build import Ambient, make_payload, run_job
from esper_fx.passes.metas import TensorMeta

pytestmark = pytest.mark.compile


def _compiled_elsewhere(graph: fx.Graph, inputs: Sequence[Tensor], ambient: Ambient, **worker: str) -> Tensor:
    """The result of a region that a process with other flags has compiled."""
    module = fx.GraphModule(torch.nn.Module(), graph)
    payload = make_payload(module, tuple(TensorMeta.of(value) for value in inputs), ambient, None)
    with flags.applied({**flags.current(), **worker}):
        artifact = run_job(payload)
    (result,) = _torch.load_graph(artifact)(*inputs)
    assert isinstance(result, Tensor)
    return result


def test_the_default_dtype() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    tenths = graph.call_method("cumsum", (graph.call_function(torch.full, ((8,), 0.1)), 0))
    graph.output((graph.call_function(torch.mul, (x, tenths)),))
    value = torch.rand(8, dtype=torch.float64)
    with flags.applied({**flags.current(), "dtype": "float64"}):
        result = _compiled_elsewhere(graph, [value], Ambient.current(), dtype="float32")
    wanted = value * torch.full((8,), 0.1, dtype=torch.float64).cumsum(0)
    torch.testing.assert_close(result, wanted, rtol=1e-14, atol=0)


def test_determinism() -> None:
    graph = fx.Graph()
    names = ("x", "places", "values")
    x, places, values = (graph.placeholder(name) for name in names)
    graph.output((graph.call_function(torch.index_put, (x, (places,), values), {"accumulate": True}),))
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.zeros(4),
        torch.randint(4, (100_000,), generator=generator),
        torch.randn(100_000, generator=generator),
    )
    with flags.applied({**flags.current(), "deterministic": "yes"}):
        results = [_compiled_elsewhere(graph, inputs, Ambient.current(), deterministic="no") for _ in range(3)]
    assert all(torch.equal(result, results[0]) for result in results)
