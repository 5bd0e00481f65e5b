"""Passes over the graphs of regions: canonical, serialize, propagate, carry_sizes and specialize."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import get_overridable_functions

from esper_fx import ops
from esper_fx._torch import storage_id
from esper_fx.passes import serialize
from esper_fx.passes.canonical import canonical, digest, qualified_name
from esper_fx.passes.carry_sizes import carry_sizes
from esper_fx.passes.metas import TensorMeta
from esper_fx.passes.propagate import SEED, is_seed, propagate
from esper_fx.passes.record import BodyGraph, record
from esper_fx.passes.specialize import specialize
from tests.support.examples import examples

OPERATORS = (torch.add, torch.sub, torch.mul, operator.add, ops.seed_output)
CONSTANTS = (
    *(0, 1, 1.0, True, False, None, -1, 0.0, -0.0, 1e-300, float("inf"), "x", "1", 1j),
    *((), (1,), (1, 2), [1, 2], (1, (2,)), ((1,), 2), {"a": 1}, {"b": 1}, {"a": 1.0}),
    *(torch.float32, torch.float64, "torch.float32", torch.device("cpu"), torch.strided, torch.channels_last),
    *(slice(1, 2, None), slice(1, None, 2), Ellipsis, torch.relu, torch.tanh),
)
TENSORS = (
    torch.zeros(2),
    torch.ones(2),
    torch.zeros(3),
    torch.zeros(2, 1),
    torch.zeros(2, dtype=torch.float64),
    torch.zeros(2, dtype=torch.int32),
    torch.zeros(2, 2)[:, 0],  # another stride
    torch.tensor(0.0),
    torch.tensor([], dtype=torch.bool),
    torch.tensor([1.0, -0.0]),
    torch.tensor([1.0, 0.0]),
)


@dataclass(frozen=True)
class Step:
    """One operation: which, of which earlier values, with a constant and a keyword argument, beside a tensor constant."""

    operator: int
    sources: tuple[int, int]
    constant: int
    keyword: tuple[str, int]
    tensor: int
    method: bool


def build(steps: tuple[Step, ...], names: tuple[str, ...] = ()) -> tuple[fx.Graph, nn.Module]:
    """The graph of these steps and the owner of its constants; ``names`` name its nodes. It is never run."""
    graph, root = fx.Graph(), nn.Module()
    values = [graph.placeholder("x"), graph.placeholder("y")]
    for number, step in enumerate(steps):
        setattr(root, f"{'_'.join(names)}constant{number}", TENSORS[step.tensor])
        tensor = graph.get_attr(f"{'_'.join(names)}constant{number}")
        sources = [values[index % len(values)] for index in step.sources]
        args = (*sources, CONSTANTS[step.constant], tensor)
        kwargs = {step.keyword[0]: CONSTANTS[step.keyword[1]]}
        if step.method:
            values.append(graph.call_method(qualified_name(OPERATORS[step.operator]), args, kwargs))
        else:
            values.append(graph.call_function(OPERATORS[step.operator], args, kwargs))
    graph.output((values[-1],))
    for node, name in zip(graph.nodes, names, strict=False):
        node.name = name
    return graph, root


def text(steps: tuple[Step, ...], names: tuple[str, ...] = ()) -> str:
    return canonical(*build(steps, names))


steps_of = st.lists(
    st.builds(
        Step,
        operator=st.integers(0, len(OPERATORS) - 1),
        sources=st.tuples(st.integers(0, 5), st.integers(0, 5)),
        constant=st.integers(0, len(CONSTANTS) - 1),
        keyword=st.tuples(st.sampled_from(["alpha", "dim"]), st.integers(0, len(CONSTANTS) - 1)),
        tensor=st.integers(0, len(TENSORS) - 1),
        method=st.booleans(),
    ),
    min_size=1,
    max_size=5,
).map(tuple)


# canonical


@examples(50)
@given(steps_of, st.lists(st.text("abcdef", min_size=3, max_size=6), min_size=2, max_size=8, unique=True))
def test_renaming_nodes_and_constants_keeps_the_text(steps: tuple[Step, ...], names: list[str]) -> None:
    renamed, owner = build(steps, tuple(names))
    assert [n.name for n in renamed.nodes] != [n.name for n in build(steps)[0].nodes]
    assert canonical(renamed, owner) == text(steps)


@given(steps_of, st.data())
def test_changing_one_operator_edge_constant_keyword_or_tensor_changes_the_text(
    steps: tuple[Step, ...], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(steps) - 1))
    field = data.draw(st.sampled_from(["operator", "sources", "constant", "keyword", "tensor", "method"]))
    other = data.draw(steps_of)[0]
    step, available = steps[index], index + 2
    assume(getattr(step, field) != getattr(other, field))
    if field == "sources":  # numbers that name the same values are no change
        assume([s % available for s in step.sources] != [s % available for s in other.sources])
    changed = replace(step, **{field: getattr(other, field)})
    assert text((*steps[:index], changed, *steps[index + 1 :])) != text(steps)


@pytest.mark.parametrize("values", [CONSTANTS, TENSORS], ids=["constants", "tensors"])
def test_no_two_constants_read_alike(values: tuple[Any, ...]) -> None:
    field = "constant" if values is CONSTANTS else "tensor"
    step = Step(0, (0, 1), 0, ("alpha", 0), 0, False)
    texts = [text((replace(step, **{field: index}),)) for index in range(len(values))]
    assert len(set(texts)) == len(values)


@examples(50)
@given(steps_of)
def test_leaving_out_a_step_an_output_or_an_input_changes_the_text(steps: tuple[Step, ...]) -> None:
    assert text(steps[:-1] or steps * 2) != text(steps)
    longer, owner = build(steps)
    output, first = next(iter(reversed(longer.nodes))), next(iter(longer.nodes))
    output.args = ((*output.args[0], first),)
    assert canonical(longer, owner) != text(steps)
    assert canonical(longer, owner, skip=lambda n: n.op == "placeholder") != canonical(longer, owner)


def test_a_nested_graph_counts_by_its_content_and_not_by_its_name() -> None:
    def nesting(name: str, inner: fx.GraphModule) -> str:
        root, graph = nn.Module(), fx.Graph()
        root.add_module(name, inner)
        graph.output((graph.get_attr(name),))
        return canonical(graph, root)

    def inner(function: Any, name: str) -> fx.GraphModule:
        graph = fx.Graph()
        graph.output(graph.call_function(function, (graph.placeholder(name),)))
        return fx.GraphModule(nn.Module(), graph)

    assert nesting("one", inner(torch.sin, "x")) == nesting("two", inner(torch.sin, "y"))
    assert nesting("one", inner(torch.sin, "x")) != nesting("one", inner(torch.cos, "x"))


def test_what_cannot_be_described_is_refused() -> None:
    graph = fx.Graph()
    node = graph.call_module("layer", (graph.placeholder("x"),))
    graph.output(node)
    with pytest.raises(TypeError, match="node layer calls module 'layer': a region graph has no modules"):
        canonical(graph)
    with pytest.raises(TypeError, match="cannot describe a graph argument of type object"):
        from esper_fx.passes.canonical import _describe

        _describe(object(), {})


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (ops.seed_input, "esper_fx.ops.seed.seed_input"),
        (torch.ops.aten.add.Tensor, "torch.ops.aten.add.Tensor"),
        (torch.ops.esper.seed, "torch.ops.esper.seed"),
        (operator.getitem, "_operator.getitem"),
        (F.relu, "torch.nn.functional.relu"),
        (F.max_pool2d, "torch.nn.functional.max_pool2d"),
    ],
)
def test_functions_have_names_that_every_process_gives_them(function: Any, name: str) -> None:
    assert qualified_name(function) == name


def _functions_of_torch() -> list[Any]:
    """Every function that PyTorch lets a recorder see, each once; methods and properties are recorded in other ways."""
    modules = (torch, F, torch.linalg, torch.fft, torch.special)
    functions = [f for owner, found in get_overridable_functions().items() if owner in modules for f in found]
    functions += [torch._C._set_grad_enabled, torch._C._nn.linear, operator.getitem, operator.iadd, operator.add]
    return list({id(f): f for f in functions}.values())


def test_no_two_functions_of_torch_have_one_name() -> None:
    described: dict[str, list[Any]] = {}
    for function in _functions_of_torch():
        described.setdefault(qualified_name(function), []).append(function)
    assert len(described) > 500
    assert {name: functions for name, functions in described.items() if len(functions) > 1} == {}
    assert not any("0x" in name for name in described)


def test_a_digest_is_the_sha256_of_the_text() -> None:
    assert digest("a") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"


# serialize


class Everything(nn.Module):
    """Every kind of node: functions, methods, properties, tuples, slices, keyword arguments, changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = (x @ self.weight.T).chunk(2, dim=-1)
        joined = torch.cat([a, b.neg()], dim=-1)[..., 0:4:1]
        with torch.no_grad():
            self.seen.add_(joined.sum(0))
        return F.leaky_relu(joined, negative_slope=0.2).mul(x.shape[0]).clone().add_(1.0)


VECTOR = TensorMeta((3, 4), (4, 1), torch.float32, torch.device("cpu"), True)


def _everything() -> tuple[Everything, BodyGraph]:
    module = Everything()
    return module, record(module, VECTOR, training=True)


def test_a_graph_that_was_sent_computes_what_eager_does() -> None:
    module, body = _everything()
    back = serialize.loads(serialize.dumps(fx.GraphModule(nn.Module(), body.graph)))
    assert canonical(back.graph, back) == canonical(body.graph)
    assert [n.name for n in back.graph.nodes] == [n.name for n in body.graph.nodes]
    x, weight = torch.randn(3, 4, requires_grad=True), module.weight.detach().clone().requires_grad_()
    seen = torch.zeros(4)
    x_eager = x.detach().clone().requires_grad_()
    actual, expected = back(x, weight, seen), module(x_eager)
    assert torch.equal(actual, expected)
    assert torch.equal(seen, module.seen)
    actual.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, x_eager.grad)  # type: ignore[arg-type]
    assert torch.equal(weight.grad, module.weight.grad)  # type: ignore[arg-type]


def test_a_function_with_a_gradient_of_its_own_keeps_it_when_it_is_sent() -> None:
    graph = fx.Graph()
    x, alpha, gate = (graph.placeholder(name) for name in ("x", "alpha", "gate"))
    graph.output((graph.call_function(ops.seed_input, (x, alpha, gate)),))
    back = serialize.loads(serialize.dumps(fx.GraphModule(nn.Module(), graph)))
    assert [n.target for n in back.graph.nodes if n.op == "call_function"] == [ops.seed_input]
    value = torch.ones(3, requires_grad=True)
    (result,) = back(value, torch.tensor(1.0), torch.tensor(0.25))
    result.sum().backward()
    assert torch.equal(result, torch.ones(3))
    assert torch.equal(value.grad, torch.full((3,), 0.25))  # type: ignore[arg-type]


def test_constants_and_nested_graphs_are_sent_along_and_nested_functions_stay_whole() -> None:
    inner_graph = fx.Graph()
    inner_x = inner_graph.placeholder("x")
    inner_graph.output(inner_graph.call_function(ops.seed_input, (inner_x, inner_x, inner_x)))
    root = nn.Module()
    root.register_buffer("offset", torch.tensor([1.0, 2.0]))
    root.add_module("inner", fx.GraphModule(nn.Module(), inner_graph))
    graph = fx.Graph()
    x = graph.placeholder("x")
    same = graph.call_function(_apply, (graph.get_attr("inner"), x))
    graph.output((graph.call_function(torch.add, (same, graph.get_attr("offset")), {"alpha": 2}),))
    back = serialize.loads(serialize.dumps(fx.GraphModule(root, graph)))
    assert [n.target for n in back.inner.graph.nodes if n.op == "call_function"] == [ops.seed_input]  # type: ignore[union-attr]
    assert torch.equal(back(torch.ones(2))[0], torch.tensor([3.0, 5.0]))


def _apply(function: Any, x: Tensor) -> Tensor:
    result: Tensor = function(x)
    return result


@pytest.mark.parametrize("function", [F.max_pool2d, F.max_pool1d, F.adaptive_max_pool2d, torch.relu, torch.Tensor.add])
def test_functions_of_every_kind_can_be_sent(function: Any) -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"), 2)))
    back = serialize.loads(serialize.dumps(fx.GraphModule(nn.Module(), graph)))
    assert [n.target for n in back.graph.nodes if n.op == "call_function"] == [function]


@examples(30)
@given(steps_of)
def test_whatever_graph_there_is_comes_back_equal(steps: tuple[Step, ...]) -> None:
    def printable(index: int) -> int:  # torch.fx cannot print code with a function as an argument
        return 0 if callable(CONSTANTS[index]) else index

    steps = tuple(
        replace(s, constant=printable(s.constant), keyword=(s.keyword[0], printable(s.keyword[1])), method=False)
        for s in steps
    )
    graph, owner = build(steps)
    module = fx.GraphModule(owner, graph)
    back = serialize.loads(serialize.dumps(module))
    assert canonical(back.graph, back) == canonical(module.graph, module) == text(steps)


# propagate and carry_sizes


def _annotated(module: nn.Module, *shapes: tuple[int, ...]) -> tuple[fx.GraphModule, Any]:
    traced = fx.symbolic_trace(module)
    with FakeTensorMode():
        effects = propagate(traced, [torch.empty(shape, requires_grad=True) for shape in shapes])
    return traced, effects


def test_propagate_gives_every_node_its_value() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.transpose(0, 1).chunk(2, dim=0)
            return y[1].double() * y[0].size(1)

    traced, effects = _annotated(Net(), (3, 4))
    values = {n.name: n.meta["example_value"] for n in traced.graph.nodes}
    assert (values["transpose"].shape, values["transpose"].stride()) == ((4, 3), (1, 4))
    assert isinstance(values["chunk"], tuple)
    assert values["size"] == 3
    assert (values["mul"].shape, values["mul"].dtype, values["mul"].requires_grad) == ((2, 3), torch.float64, True)
    assert storage_id(values["transpose"]) == storage_id(values["x"]) != storage_id(values["mul"])
    assert effects.mutations == {}


def test_propagate_notes_what_is_changed_in_place_also_through_a_view() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            a = x * 2
            b = y * 2
            a[0].add_(1)
            torch.add(a, b, out=None)
            F.relu(b, inplace=True)
            return a + b

    traced, effects = _annotated(Net(), (3, 4), (3, 4))
    values = {n.name: n.meta["example_value"] for n in traced.graph.nodes}
    assert {n.name: changed for n, changed in effects.mutations.items()} == {
        "add_": {storage_id(values["mul"])},
        "relu": {storage_id(values["mul_1"])},
    }


def test_sizes_become_numbers_and_the_graph_computes_the_same() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows, columns = x.size(0), x.shape[1]
            y = x.reshape(rows * columns)[: rows * 2 - 1]
            return y.reshape(1, rows * 2 - 1) * columns + x.size()[0] + x.new_ones(x.size()).sum()

    traced, _ = _annotated(Net(), (3, 4))
    x = torch.randn(3, 4)
    expected = Net()(x)
    assert carry_sizes(traced.graph)
    traced.graph.lint()
    traced.recompile()
    assert torch.equal(traced(x), expected)
    targets = [n.target for n in traced.graph.nodes if n.op not in ("placeholder", "output")]
    assert targets == [
        "reshape",
        operator.getitem,
        "reshape",
        operator.mul,
        operator.add,
        "new_ones",
        "sum",
        operator.add,
    ]
    (ones,) = [n for n in traced.graph.nodes if n.target == "new_ones"]
    assert type(ones.args[1]) is tuple
    assert not carry_sizes(traced.graph)


def test_a_number_that_is_an_input_stays_an_input_that_nothing_reads() -> None:
    graph = fx.Graph()
    size, x = graph.placeholder("size"), graph.placeholder("x")
    doubled = graph.call_function(operator.mul, (size, 2))
    graph.output((graph.call_method("reshape", (x, doubled)), size))
    module = fx.GraphModule(nn.Module(), graph)
    with FakeTensorMode():
        propagate(module, [3, torch.empty(2, 3)])
    assert carry_sizes(module.graph)
    module.recompile()
    assert [n.op for n in module.graph.nodes] == ["placeholder", "placeholder", "call_method", "output"]
    assert not size.users
    result = module(3, torch.arange(6.0).reshape(2, 3))
    assert torch.equal(result[0], torch.arange(6.0))
    assert result[1] == 3


# specialize


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.down(x)))


def _template() -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    one = graph.call_function(SEED, (x, x, x, 0, 0, True))
    scaled = graph.call_function(torch.mul, (one, 2.0))
    two = graph.call_function(SEED.default, (scaled, x, x, 0, 0, True))
    graph.output((graph.call_function(torch.sin, (two,)), one))
    return graph


def test_dormant_seeds_vanish() -> None:
    template = _template()
    before = str(template)
    assert sum(is_seed(n) for n in template.nodes) == 2
    graph = specialize(template, [None, None])
    assert not any(is_seed(n) for n in graph.nodes)
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [torch.mul, torch.sin]
    x = torch.randn(2, 4)
    sin, same = fx.GraphModule(nn.Module(), graph)(x)
    assert torch.equal(sin, torch.sin(x * 2.0))
    assert same is x
    assert str(template) == before


@pytest.mark.parametrize("live", [(True, False), (False, True), (True, True)])
@given(alpha=st.sampled_from([0.0, 0.5, 1.0, -2.0]), gate=st.sampled_from([0.0, 0.25, 1.0]))
def test_live_seeds_compute_what_seed_forward_does(live: tuple[bool, bool], alpha: float, gate: float) -> None:
    meta = TensorMeta((2, 4), (4, 1), torch.float64, torch.device("cpu"), True)
    bodies = [Body().double() if on else None for on in live]
    recorded = [None if body is None else record(body, meta, training=True) for body in bodies]
    module = fx.GraphModule(nn.Module(), specialize(_template(), recorded))
    a, g = torch.tensor(alpha), torch.tensor(gate)
    tensors = [
        [] if body is None else [a, g, *(p.detach().clone().requires_grad_() for p in body.parameters())]
        for body in bodies
    ]
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    x_eager = x.detach().clone().requires_grad_()
    sin, one = module(x, *tensors[0], *tensors[1])
    first = x_eager if bodies[0] is None else ops.seed_forward(x_eager, bodies[0], a, g)
    second = first * 2.0 if bodies[1] is None else ops.seed_forward(first * 2.0, bodies[1], a, g)
    assert torch.equal(sin, torch.sin(second))
    assert torch.equal(one, first)
    (sin.sum() + one.square().sum()).backward()
    (torch.sin(second).sum() + first.square().sum()).backward()
    torch.testing.assert_close(x.grad, x_eager.grad, rtol=1e-12, atol=1e-12)
    for body, mine in zip(bodies, tensors, strict=True):
        for parameter, twin in zip([] if body is None else body.parameters(), mine[2:], strict=True):
            torch.testing.assert_close(twin.grad, parameter.grad, rtol=1e-12, atol=1e-12)


def test_a_silent_body_that_is_not_finite_leaves_no_trace() -> None:
    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x).sqrt() / 0.0

    body = record(Bad(), TensorMeta((2, 4), (4, 1), torch.float32, torch.device("cpu"), True), training=True)
    module = fx.GraphModule(nn.Module(), specialize(_template(), [body, None]))
    x = torch.randn(2, 4, requires_grad=True)
    sin, one = module(x, torch.tensor(0.0), torch.tensor(1.0))
    assert torch.equal(one, x)
    assert torch.equal(sin, torch.sin(x * 2.0))
    one.sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 4))  # type: ignore[arg-type]


def test_the_inputs_of_a_variant_are_the_templates_and_then_each_live_seeds() -> None:
    body = record(Body(), TensorMeta((2, 4), (4, 1), torch.float32, torch.device("cpu"), True), training=True)
    names = [n.name for n in specialize(_template(), [None, body]).nodes if n.op == "placeholder"]
    assert names == ["x", *(f"seed1_{name}" for name in ("alpha", "gate", *(n.replace(".", "_") for n in body.names)))]
    assert body.names == ("down.weight", "down.bias", "up.weight", "up.bias")
