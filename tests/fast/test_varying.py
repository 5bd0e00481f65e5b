"""Sizes as expressions, what a program's inputs say of them, and whether what was compiled for some holds for others."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from esper_fx.engine import varying
from esper_fx.engine.executable import Executable
from esper_fx.engine.plan import Place
from esper_fx.engine.varying import FIXED, Guards, Varying, fake_inputs
from esper_fx.errors import BlueprintError
from esper_fx.passes.carry_sizes import SIZE, SizesError, carry_sizes
from esper_fx.passes.metas import Size, SizeMeta, Symbols, TensorMeta, evaluate
from esper_fx.passes.propagate import propagate
from esper_fx.passes.record import BodyGraph, record


def _meta(shape: tuple[Any, ...], names: dict[str, int]) -> TensorMeta:
    """What a contiguous tensor is whose shape is made of names."""
    symbols = Symbols(names)
    with symbols.mode:
        tensor = torch.empty([evaluate(s, symbols.given) if isinstance(s, str) else s for s in shape])
    return TensorMeta.of(tensor).renamed(symbols.names)


# Size and TensorMeta


def test_a_size_is_an_expression_and_an_example() -> None:
    meta = _meta(("2 * rows + 1", "rows // columns", 8), {"rows": 7, "columns": 3})
    assert [isinstance(dim, Size) for dim in meta.shape] == [True, True, False]
    assert meta.names == {"rows": 7, "columns": 3}
    assert meta.fixed().shape == (15, 2, 8)
    assert meta.fixed().stride == (16, 8, 1)
    assert meta.fixed({"rows": 9, "columns": 2}).shape == (19, 4, 8)
    assert meta.fixed({"rows": 9, "columns": 2}).stride == (32, 8, 1)


def test_what_is_fixed_has_plain_numbers() -> None:
    meta = TensorMeta.of(torch.zeros(2, 3))
    assert meta.shape == (2, 3)
    assert meta.names == {}
    assert meta.renamed({"rows": "n"}) == meta
    symbols = Symbols({"rows": 4})
    assert bool(symbols.given["rows"] == 4)  # PyTorch takes it for granted from here on
    assert Size.of(symbols.given["rows"]) == 4
    assert symbols.guards() == ("rows == 4",)


def test_tensors_with_other_names_differ_until_they_are_renamed_alike() -> None:
    a, b = _meta(("rows", 4), {"rows": 5}), _meta(("n0", 4), {"n0": 5})
    assert a != b
    assert a.renamed({"rows": "n0"}) == b
    assert a.describe() != b.describe()
    assert a.renamed({"rows": "n0"}).describe() == b.describe()


def test_names_are_exchanged_at_once() -> None:
    meta = _meta(("rows", "columns"), {"rows": 5, "columns": 3})
    swapped = meta.renamed({"rows": "columns", "columns": "rows"})
    assert swapped.fixed({"rows": 5, "columns": 3}).shape == (3, 5)
    assert swapped.names == {"columns": 5, "rows": 3}


def test_what_is_taken_for_granted_is_told_in_the_names_given() -> None:
    symbols = Symbols({"rows": 6, "columns": 4})
    rows, columns = symbols.given["rows"], symbols.given["columns"]
    assert rows >= 2  # known anyway
    assert symbols.guards() == ()
    assert rows % 2 == 0
    assert rows > columns
    guards = symbols.guards()
    for given, holds in (((6, 4), True), ((8, 3), True), ((7, 4), False), ((4, 4), False)):
        assert all(evaluate(text, {"rows": given[0], "columns": given[1]}) for text in guards) is holds


# carry_sizes


def test_sizes_are_computed_out_of_the_integer_inputs_at_the_beginning() -> None:
    graph = fx.Graph()
    rows, x = graph.placeholder("rows"), graph.placeholder("x")
    flat = graph.call_method("reshape", (x, -1))
    half = graph.call_function(_half, (graph.call_method("size", (flat, 0)),))
    part = graph.call_function(_first, (flat, half))
    graph.output((graph.call_function(torch.mul, (part, rows)), half))
    module = fx.GraphModule(nn.Module(), graph)
    symbols = Symbols({"rows": 6})
    with symbols.mode:
        propagate(module, [symbols.given["rows"], torch.empty(symbols.given["rows"], 4)])
    assert carry_sizes(graph)
    assert not carry_sizes(graph)
    graph.lint()
    module.recompile()
    sizes = [node for node in graph.nodes if SIZE in node.meta]
    assert list(graph.nodes)[2 : 2 + len(sizes)] == sizes
    assert all(user in sizes or user.op != "call_method" for node in sizes for user in node.users)
    assert sizes[-1].meta[SIZE].renamed(symbols.names).text == "2*rows"
    for number in (6, 3):
        values = torch.arange(4.0 * number).reshape(number, 4)
        result, size = module(number, values)
        assert size == 2 * number
        assert torch.equal(result, values.reshape(-1)[: 2 * number] * number)


def test_a_size_that_no_integer_input_tells_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_method("view", (x, graph.call_method("size", (x, 0)), 4)),))
    module = fx.GraphModule(nn.Module(), graph)
    symbols = Symbols({"rows": 6})
    with symbols.mode:
        propagate(module, [torch.empty(symbols.given["rows"], 4)])
    with pytest.raises(SizesError, match="does not follow from the program's integer inputs"):
        carry_sizes(graph)


def _half(size: int) -> int:
    return size // 2


def _first(x: Tensor, number: int) -> Tensor:
    return x[:number]


# fake_inputs


def _traced(example: int = 3) -> fx.GraphModule:
    """A program of a number of rows and an x of so many, as Dynamo hands it over."""
    graph = fx.Graph()
    rows, x = graph.placeholder("rows"), graph.placeholder("x")
    graph.output((x,))
    symbols = Symbols({"rows": example})
    with symbols.mode:
        rows.meta["example_value"] = symbols.given["rows"]
        x.meta["example_value"] = torch.empty(symbols.given["rows"], 4)
    return fx.GraphModule(nn.Module(), graph)


def test_inputs_have_the_sizes_that_dynamo_knows_and_are_as_they_come_otherwise() -> None:
    x = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    symbols, (rows, fake), places = fake_inputs(_traced(), [5, x], vary=True)
    assert places == {"size0": 0}
    assert rows is symbols.given["size0"]
    meta = TensorMeta.of(fake).renamed(symbols.names)
    assert (meta.shape, meta.stride) == (_meta(("size0", 4), {"size0": 5}).shape, (4, 1))
    assert (meta.dtype, meta.requires_grad) == (torch.float64, True)
    assert meta.fixed({"size0": 9}).shape == (9, 4)


def test_for_the_sizes_of_a_call_nothing_is_symbolic() -> None:
    symbols, inputs, places = fake_inputs(_traced(), [5, torch.zeros(5, 4)], vary=False)
    assert (symbols.given, places, inputs[0]) == ({}, {}, 5)
    assert TensorMeta.of(inputs[1]) == TensorMeta.of(torch.zeros(5, 4))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([1, torch.zeros(1, 4)], "an input is 1, which may be an exception"),
        ([2.5, torch.zeros(3, 4)], "an input is 2.5, and Dynamo has no name for it"),
        ([3, torch.zeros(4, 4)], r"shape \(4, 4\) is not what Dynamo says"),
        ([3, torch.zeros(4, 3).T], "is not what Dynamo says"),
    ],
    ids=["too small", "no integer", "another shape", "other strides"],
)
def test_inputs_of_which_too_little_is_known_are_refused(args: list[Any], message: str) -> None:
    with pytest.raises(SizesError, match=message):
        fake_inputs(_traced(), args, vary=True)


def test_a_tensor_with_sizes_that_no_integer_tells_is_refused() -> None:
    module = _traced()
    other = Symbols({"other": 3})
    with other.mode:
        next(n for n in module.graph.nodes if n.name == "x").meta["example_value"] = torch.empty(
            other.given["other"], 4
        )
    with pytest.raises(SizesError, match="sizes that no integer input tells"):
        fake_inputs(module, [3, torch.zeros(3, 4)], vary=True)


# Guards


def _plan(varying: Varying, *regions: Any) -> Any:
    return SimpleNamespace(varying=varying, regions=regions)


def test_what_the_program_its_kernels_and_its_bodies_take_for_granted_has_to_hold() -> None:
    plan = _plan(
        Varying({"size0": 1, "size1": 2}, ("size0 < 100",), ({"d0": "size1"}, {"d0": "size0"})),
        SimpleNamespace(sizes={"n0": 2}),
        SimpleNamespace(sizes={"n0": 1, "n1": 2}),
    )
    kernels = [SimpleNamespace(guards=("n0 % 2 == 0",)), SimpleNamespace(guards=("n0 != n1",))]
    bodies: list[Any] = [SimpleNamespace(guards=("d0 > 3",)), None]
    guards = Guards(plan, kernels, bodies)
    for sizes, holds in {
        (7, 8): True,
        (7, 9): False,  # the first kernel
        (8, 8): False,  # the second
        (7, 2): False,  # the body
        (100, 8): False,  # the program
        (1, 8): False,  # a size below 2
        (9, 4): True,
    }.items():
        for _ in range(2):
            assert guards.hold(["x", *sizes]) is holds


def test_what_cannot_be_computed_for_a_size_does_not_hold() -> None:
    plan = _plan(Varying({"size0": 0}, ("size0 // 4 != 0", "size0 % (size0 // 4) == 0")))
    assert [Guards(plan, [], []).hold([size]) for size in (8, 3, 9)] == [True, False, False]
    plan = _plan(Varying({"size0": 0}, ("size0 % (size0 // 4) == 0",)))
    assert [Guards(plan, [], []).hold([size]) for size in (8, 3, 9)] == [True, False, False]


@pytest.mark.parametrize("number", [0.5, 0.0, -0.0, float("inf")])
def test_a_number_in_a_tensor_has_to_be_the_same_to_the_bit(number: float) -> None:
    plan = _plan(Varying({"size0": 0}, numbers={1: number}))
    guards = Guards(plan, [], [])
    for other in (0.5, 0.0, -0.0, float("inf"), float("nan")):
        same = other == number and math.copysign(1, other) == math.copysign(1, number)
        assert guards.hold([4, torch.tensor(other, dtype=torch.float64)]) is same


def test_where_sizes_are_fixed_everything_holds() -> None:
    region = SimpleNamespace(sizes={"n0": 0})
    assert Guards(_plan(FIXED, region), [SimpleNamespace(guards=("n0 > 5",))], [None]).hold([1])


def test_a_bounded_number_of_sizes_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varying, "MAX_KNOWN", 5)
    guards = Guards(_plan(Varying({"size0": 0}, ("size0 > 10",))), [], [])
    for size in (*range(2, 40), *range(2, 40)):
        assert guards.hold([size]) is (size > 10)
        assert len(guards._known) <= 5


def test_what_a_kernel_returns_has_the_strides_that_are_expected_for_its_size() -> None:
    strides = _meta((4, "size0"), {"size0": 3}).stride
    region = SimpleNamespace(slots=(), inputs=(0, 1), outputs=(2,), frees=(), strides=(strides,), sizes={"n0": 0})
    plan: Any = SimpleNamespace(places=3, outputs=(Place(2),), regions=(region,), varying=Varying({"size0": 0}))
    executable = Executable(plan, [lambda size, x: (x * size,)], [], ())
    for size in (3, 5, 2):
        x = torch.randn(size, 4).T
        (result,) = executable([size, x])
        assert result.stride() == (size, 1)
        assert torch.equal(result, x * size)


# Bodies


class Mean(nn.Module):
    """Needs sizes: the mean over tokens, shown to each of them, over their number."""

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens = x.shape[0], x.shape[1]
        x = torch.cat([x[:, : tokens // 2], x[:, tokens // 2 :]], dim=1)
        mean = x.reshape(rows * tokens, -1).view(rows, tokens, x.shape[2]).sum(1, keepdim=True) / tokens
        return mean.expand(x.shape) * x.new_ones(x.size()) + torch.zeros(tokens, 1, device=x.device)


class Short(nn.Module):
    """Computes something else for more than four tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() if x.shape[1] <= 4 else x.cos()


def _runs(body: BodyGraph, module: nn.Module, shape: tuple[int, ...]) -> bool:
    x = torch.randn(shape)
    return torch.equal(fx.GraphModule(nn.Module(), body.graph)(x), module(x))


def test_a_body_that_reads_sizes_is_recorded_for_all_of_them() -> None:
    meta = _meta(("d0", "d1", 4), {"d0": 2, "d1": 3})
    body = record(Mean(), meta, training=True)
    for shape in ((2, 3, 4), (5, 6, 4), (3, 2, 4)):
        assert all(evaluate(text, {"d0": shape[0], "d1": shape[1]}) for text in body.guards)
        assert _runs(body, Mean(), shape)
    assert body.identity == record(Mean(), meta, training=True).identity
    assert body.identity != record(Mean(), meta.fixed(), training=True).identity


def test_sizes_that_are_products_are_read_whole() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.shape[0], 4) * x.shape[0]

    body = record(Scaled(), _meta(("d0 * d1", 4), {"d0": 2, "d1": 3}), training=True)
    assert all(_runs(body, Scaled(), (rows, 4)) for rows in (6, 8, 15))


def test_a_body_that_asks_how_large_something_is_says_what_it_was_told() -> None:
    bodies = [record(Short(), _meta(("d0", "d1", 4), {"d0": 2, "d1": tokens}), training=True) for tokens in (3, 9)]
    assert [[evaluate(text, {"d0": 2, "d1": n}) for text in body.guards] for body in bodies for n in (4, 5)] == [
        [True],
        [False],
        [False],
        [True],
    ]
    assert bodies[0].identity != bodies[1].identity


def test_a_body_that_needs_a_size_that_its_input_does_not_show_is_refused() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x[: x.shape[0] // 2], x[x.shape[0] // 2 :]])

    with pytest.raises(BlueprintError, match="cannot be recorded"):
        record(Halves(), _meta(("d0 * d1", 4), {"d0": 2, "d1": 3}), training=True)


def test_an_integer_input_describes_itself_and_needs_no_gradient() -> None:
    meta = SizeMeta("n0", 5)
    assert meta.with_grad(True) is meta
    assert meta.describe() == ["size", "n0", 5]
    with Symbols.of([meta]).mode:
        number, x = Symbols.of([meta]).examples([meta, _meta(("n0", 4), {"n0": 5})])
    assert int(number) == 5
    assert x.shape[0] == 5
