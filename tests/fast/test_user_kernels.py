"""Triton kernels of the user's own: known by what they compute, found again by the processes that compile."""

from __future__ import annotations

from typing import Any

import pytest
from torch import fx, nn

from esper_fx._torch import kernel_side_table
from esper_fx.passes import serialize
from esper_fx.passes.canonical import canonical
from esper_fx.passes.user_kernels import kernel_call

pytest.importorskip("triton")

from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation

from tests.support import triton_kernels


def _graph(kernel: Any, **constants: Any) -> fx.Graph:
    table = kernel_side_table()
    graph = fx.Graph()
    x = graph.placeholder("x")
    arguments = {
        "kernel_idx": table.add_kernel(kernel),
        "constant_args_idx": table.add_constant_args(constants),
        "grid": [(1, 1, 1)],
        "tma_descriptor_metadata": {},
        "kwargs": {"x_ptr": x, "factor": 2.0},
    }
    graph.call_function(triton_kernel_wrapper_mutation, (), arguments)
    graph.output((x,))
    return graph


def test_kernels_count_and_their_numbers_do_not() -> None:
    first = canonical(_graph(triton_kernels.scale, BLOCK=16))
    assert canonical(_graph(triton_kernels.scale, BLOCK=16)) == first
    others = [
        canonical(_graph(triton_kernels.shift, BLOCK=16)),
        canonical(_graph(triton_kernels.scale, BLOCK=32)),
        canonical(_graph(triton_kernels.tuned)),
    ]
    assert len({first, *others}) == 4


def test_what_an_autotuner_may_choose_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    first = canonical(_graph(triton_kernels.tuned))
    monkeypatch.setattr(triton_kernels.tuned, "configs", triton_kernels.tuned.configs[:1])
    assert canonical(_graph(triton_kernels.tuned)) != first


@pytest.mark.parametrize("name", ["scale", "tuned"])
def test_a_kernel_is_found_where_its_number_means_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = getattr(triton_kernels, name)
    data = serialize.dumps(fx.GraphModule(nn.Module(), _graph(kernel, BLOCK=16)))
    table = kernel_side_table()
    monkeypatch.setattr(table, "id_to_kernel", {0: triton_kernels.shift})
    monkeypatch.setattr(table, "kernel_to_id", {triton_kernels.shift: 0})
    monkeypatch.setattr(table, "constant_args", {})
    _, node, _ = serialize.loads(data).graph.nodes
    call = kernel_call(node)
    assert call is not None
    assert call.kernel is kernel
    assert call.constants == {"BLOCK": 16}


def test_a_kernel_that_other_processes_cannot_find_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fx.GraphModule(nn.Module(), _graph(triton_kernels.scale, BLOCK=16))
    monkeypatch.delattr(triton_kernels, "scale")
    with pytest.raises(TypeError, match=r"Triton kernel tests\.support\.triton_kernels\.scale cannot be found"):
        serialize.dumps(module)
