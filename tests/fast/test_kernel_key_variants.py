"""The address of a variant's kernel: everything that compilation reads changes it, names do not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, fx, nn

from esper_fx.cache import KernelKey
from esper_fx.cache.key import explain_miss
from esper_fx.engine.build import Ambient
from esper_fx.engine.region import Template, shared_template
from esper_fx.passes.metas import TensorMeta
from esper_fx.passes.record import BodyGraph, record
from tests.support.programs import SEED

CPU = torch.device("cpu")
META = TensorMeta((2, 4), (4, 1), torch.float32, CPU, True)


def graph_of(
    function: Any = torch.sin, *, constant: Any = 2.0, names: Sequence[str] = ("x", "y"), swap: bool = False
) -> fx.Graph:
    """seed(function(x * constant + y)) over two inputs."""
    graph = fx.Graph()
    x, y = (graph.placeholder(name) for name in names)
    product = graph.create_node("call_function", torch.mul, ((y if swap else x), constant), name=names[0] + "_product")
    value = graph.call_function(function, (graph.call_function(torch.add, (product, y)),))
    graph.output((graph.call_function(SEED, (value, value, value, 0, 0, True)),))
    return graph


class Body(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def body(width: int = 4, meta: TensorMeta = META, *, training: bool = True) -> BodyGraph:
    return record(Body(width).to(meta.dtype), meta, training=training)


def key(
    graph: fx.Graph | None = None,
    metas: Sequence[TensorMeta] = (META, META),
    bodies: Sequence[BodyGraph | None] = (None,),
    ambient: Ambient | None = None,
) -> KernelKey:
    ambient = ambient or Ambient.current()
    template = Template(graph or graph_of(), nn.Module(), metas, ambient)
    return template.variant([meta.requires_grad for meta in metas], bodies).key


def differing(one: KernelKey, other: KernelKey) -> list[str]:
    assert (one == other) == (one.digest == other.digest)
    return [] if one == other else explain_miss(one, other)


def test_names_do_not_count() -> None:
    assert differing(key(), key(graph_of(names=("input", "other")))) == []
    assert key() == key()


def test_the_values_of_a_body_do_not_count() -> None:
    assert differing(key(bodies=[body()]), key(bodies=[body()])) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda: graph_of(torch.cos),
        lambda: graph_of(constant=2),
        lambda: graph_of(constant=True),
        lambda: graph_of(constant=2.0000000000000004),
        lambda: graph_of(swap=True),
    ],
    ids=["operator", "type of a constant", "truth", "last bit of a constant", "edge"],
)
def test_the_graph_counts(change: Callable[[], fx.Graph]) -> None:
    assert differing(key(), key(change())) == ["graph"]


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (1, 4)},
        {"stride": (1, 2)},
        {"dtype": torch.float64},
        {"device": torch.device("meta")},
        {"requires_grad": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("position", [0, 1])
def test_every_fact_about_every_input_counts(changes: dict[str, Any], position: int) -> None:
    changed = replace(META, **changes)
    both = [changed, changed] if "device" in changes else [META, META]
    both[position] = changed
    assert differing(key(), key(metas=both)) == ["inputs"]


@pytest.mark.parametrize("other", [None, 3], ids=["dormant", "another width"])
def test_the_body_counts(other: int | None) -> None:
    bodies = [None if other is None else body(other)]
    assert "inputs" in differing(key(bodies=[body()]), key(bodies=bodies))


def test_the_mode_that_a_body_was_recorded_in_counts() -> None:
    def dropout(training: bool) -> BodyGraph:
        return record(nn.Dropout(0.5), META, training=training)

    assert differing(key(bodies=[dropout(True)]), key(bodies=[dropout(False)])) == ["graph"]


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if before != "medium" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not before, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(
    ("state", "part"),
    [
        (torch.no_grad, "ambient"),
        (torch.inference_mode, "ambient"),
        (lambda: torch.autocast("cpu", torch.bfloat16), "ambient"),
        (_threads, "ambient"),
        (_precision, "ambient"),
        (_deterministic, "ambient"),
        (lambda: inductor_config.patch(epilogue_fusion=not inductor_config.epilogue_fusion), "inductor"),
        (lambda: inductor_config.patch({"cpp.simdlen": 256}), "inductor"),
    ],
    ids=["no_grad", "inference", "autocast", "threads", "precision", "deterministic", "option", "nested option"],
)
def test_the_state_that_compilation_reads_counts(state: Callable[[], Any], part: str) -> None:
    before = key()
    with state():
        inside = key()
    assert part in differing(before, inside)
    assert {"graph", "inputs", "source"}.isdisjoint(differing(before, inside))
    assert key() == before


def test_the_dtype_of_autocast_counts_and_switched_off_autocast_does_not() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        one = key()
    with torch.autocast("cpu", torch.float16):
        other = key()
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        off = key()
    assert differing(one, other) == ["ambient"]
    assert off == key()


def test_the_number_of_compile_threads_does_not_count() -> None:
    with inductor_config.patch(compile_threads=7):
        inside = key()
    assert inside == key()


def test_the_constants_that_a_graph_reads_count() -> None:
    def with_constant(value: Tensor) -> KernelKey:
        graph, owner = fx.Graph(), nn.Module()
        owner.register_buffer("constant", value)
        graph.output((graph.call_function(torch.add, (graph.placeholder("x"), graph.get_attr("constant"))),))
        return Template(graph, owner, [META], Ambient.current()).variant([True], []).key

    base = with_constant(torch.ones(4))
    assert with_constant(torch.ones(4)) == base
    assert differing(base, with_constant(torch.tensor([1.0, 1.0, 1.0, 1.0000001]))) == ["graph"]
    assert differing(base, with_constant(torch.ones(4, dtype=torch.float64))) == ["graph"]


def test_a_variant_is_made_once_for_equal_bodies_and_flags() -> None:
    template = Template(graph_of(), nn.Module(), [META, META], Ambient.current())
    one, equal = body(), body()
    assert template.known_variant([True, True], [one]) is None
    made = template.variant([True, True], [one])
    assert template.variant([True, True], [equal]) is made
    assert template.known_variant([True, True], [equal]) is made
    assert template.variant([False, True], [one]) is not made
    assert template.variant([True, True], [None]) is not made


def test_a_variant_knows_which_of_its_outputs_need_gradients() -> None:
    template = Template(graph_of(), nn.Module(), [META, META], Ambient.current())
    frozen = record(Body().requires_grad_(False), META, training=True)
    assert template.variant([False, False], [None]).output_grads == (False,)
    assert template.variant([True, False], [None]).output_grads == (True,)
    assert template.variant([False, False], [body()]).output_grads == (True,)
    assert template.variant([False, False], [frozen]).output_grads == (False,)
    with torch.no_grad():
        without = Template(graph_of(), nn.Module(), [META, META], Ambient.current())
    assert without.variant([True, True], [body()]).output_grads == (False,)


def test_equal_regions_share_a_template_and_others_do_not() -> None:
    ambient = Ambient.current()
    one = shared_template(graph_of(), nn.Module(), [META, META], ambient)
    assert shared_template(graph_of(names=("a", "b")), nn.Module(), [META, META], Ambient.current()) is one
    # Whether an input needs a gradient tells variants of one template apart.
    assert shared_template(graph_of(), nn.Module(), [META, replace(META, requires_grad=False)], ambient) is one
    assert shared_template(graph_of(torch.cos), nn.Module(), [META, META], ambient) is not one
    assert shared_template(graph_of(), nn.Module(), [META, replace(META, dtype=torch.float64)], ambient) is not one
    with torch.no_grad():
        assert shared_template(graph_of(), nn.Module(), [META, META], Ambient.current()) is not one
