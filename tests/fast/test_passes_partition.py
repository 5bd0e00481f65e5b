"""Where programs are cut, and that the regions of a plan, run one after another, are the program."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from esper_fx._torch import storage_id
from esper_fx.engine.plan import Layout
from esper_fx.passes import partition
from esper_fx.passes.canonical import qualified_name
from esper_fx.passes.metas import TensorMeta
from esper_fx.passes.propagate import Effects, propagate
from esper_fx.passes.record import record
from tests.support import programs
from tests.support.examples import examples
from tests.support.plans import Scale, ambient, gradients_of, run_plan
from tests.support.programs import Host, Instruction, instructions


def annotated(module: fx.GraphModule, inputs: list[Tensor]) -> tuple[partition.Flow, Effects]:
    with FakeTensorMode() as mode:
        effects = propagate(module, [mode.from_tensor(tensor) for tensor in inputs])
    return partition.analyse(module.graph, effects), effects


def analysed(program: tuple[Instruction, ...]) -> tuple[fx.GraphModule, partition.Flow, Effects]:
    module = programs.build(program)
    module.constant = torch.empty_like(module.constant)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        effects = propagate(module, [mode.from_tensor(tensor) for tensor in programs.arguments(program)])
    return module, partition.analyse(module.graph, effects), effects


def labels_of(flow: partition.Flow) -> list[str]:
    return [partition.label(n, lambda t: t if isinstance(t, str) else qualified_name(t)) for n in flow.nodes]


def is_sum(node: fx.Node) -> bool:
    return node.target is torch.add


# Liveness and legality, against definitions written down independently.


@examples(20)
@given(instructions())
def test_live_values_are_those_made_before_and_read_after(program: tuple[Instruction, ...]) -> None:
    module, flow, _ = analysed(program)
    assert [n for n in module.graph.nodes if n.op not in ("placeholder", "get_attr", "output")] == list(flow.nodes)
    order = {node: i for i, node in enumerate(flow.nodes)}
    for cut in range(len(flow.nodes) + 1):
        expected = [n for n in flow.nodes[:cut] if any(order.get(user, len(order)) >= cut for user in n.users)]
        assert list(flow.live[cut]) == expected


@examples(20)
@given(instructions())
def test_no_cut_parts_a_mode_switch_crosses_a_tuple_or_comes_before_a_change_in_place(
    program: tuple[Instruction, ...],
) -> None:
    _, flow, effects = analysed(program)
    cuts = partition.blocks(flow, labels_of(flow))
    assert cuts == sorted(set(cuts))
    assert (cuts[0], cuts[-1]) == (0, len(flow.nodes))
    for cut in cuts[1:-1]:
        before, after = flow.nodes[:cut], flow.nodes[cut:]
        grad_switches = [n.args[0] for n in before if n.target is torch._C._set_grad_enabled]
        assert grad_switches[-1:] in ([], [True])
        assert sum(n.target is _enter_autocast for n in before) == sum(n.target is _exit_autocast for n in before)
        changed_later = {storage for n in after for storage in effects.mutations.get(n, ())}
        for value in flow.live[cut]:
            assert isinstance(value.meta["example_value"], Tensor)
            assert storage_id(value.meta["example_value"]) not in changed_later


def _graph(build: Callable[[fx.Graph, fx.Node], Any]) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output((build(graph, graph.placeholder("x")),))
    return fx.GraphModule(nn.Module(), graph)


def _chain(graph: fx.Graph, value: fx.Node, function: Any, times: int) -> fx.Node:
    for _ in range(times):
        value = graph.call_function(function, (value,))
    return value


def _legal(build: Callable[[fx.Graph, fx.Node], Any]) -> dict[str, bool]:
    """For each operation, by name, whether a cut may lie before it."""
    flow, _ = annotated(_graph(build), [torch.randn(2, 4)])
    return {node.name: legal for node, legal in zip(flow.nodes, flow.legal, strict=False)}


def test_a_block_under_no_grad_is_never_cut() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        graph.call_function(torch._C._set_grad_enabled, (False,))
        y = _chain(graph, x, torch.sin, 2)
        graph.call_function(torch._C._set_grad_enabled, (True,))
        return _chain(graph, y, torch.cos, 2)

    assert _legal(build) == {
        "_set_grad_enabled": True,
        "sin": False,
        "sin_1": False,
        "_set_grad_enabled_1": False,
        "cos": True,
        "cos_1": True,
    }


def test_a_block_with_gradients_in_a_program_without_is_never_cut() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        graph.call_function(torch._C._set_grad_enabled, (True,))
        y = _chain(graph, x, torch.sin, 2)
        graph.call_function(torch._C._set_grad_enabled, (False,))
        return _chain(graph, y, torch.cos, 1)

    with torch.no_grad():
        assert _legal(build) == {
            "_set_grad_enabled": True,
            "sin": False,
            "sin_1": False,
            "_set_grad_enabled_1": False,
            "cos": True,
        }


def test_nested_autocast_is_never_cut() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        outer = graph.call_function(_enter_autocast, ("cpu", torch.bfloat16, True, None))
        inner = graph.call_function(_enter_autocast, ("cpu", torch.bfloat16, False, None))
        y = graph.call_function(torch.sin, (x,))
        graph.call_function(_exit_autocast, (inner,))
        z = graph.call_function(torch.cos, (y,))
        graph.call_function(_exit_autocast, (outer,))
        return graph.call_function(torch.neg, (z,))

    legal = _legal(build)
    assert legal.pop("_enter_autocast")
    assert legal.pop("neg")
    assert len(legal) == 5
    assert not any(legal.values())


@pytest.mark.parametrize("through", ["itself", "a view", "a view of it that came first", "a detached alias", "a seed"])
def test_a_value_does_not_cross_a_cut_before_it_is_changed_in_place(through: str) -> None:
    seed = partial(torch.ops.esper.seed)

    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        value = graph.call_function(torch.sin, (x,))
        early = graph.call_method("view", (value, -1))
        graph.call_function(torch.cos, (value,))
        changed = {
            "itself": lambda: value,
            "a view": lambda: graph.call_method("view", (value, -1)),
            "a view of it that came first": lambda: early,
            "a detached alias": lambda: graph.call_method("detach", (value,)),
            "a seed": lambda: graph.call_function(seed.func, (value, x, x, 0, 0, True)),  # the identity while it sleeps
        }[through]()
        graph.call_method("add_", (changed, 1.0))
        after = graph.call_function(torch.neg, (changed,))
        return graph.call_function(torch.exp, (after,))

    legal = _legal(build)
    first, last = legal.pop("sin"), legal.pop("exp")
    assert first
    assert last
    assert legal.pop("neg")  # after the change everything may cross
    assert not any(legal.values()), legal


def test_no_cut_lies_between_two_uses_of_an_input_that_is_changed_in_place() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        other = graph.placeholder("other")
        view = graph.call_method("view", (other, -1))
        first = _chain(graph, x, torch.sin, 2)
        changed = graph.call_method("add_", (other, first))
        middle = _chain(graph, first, torch.cos, 3)
        last = graph.call_function(torch.mul, (middle, view))
        del changed
        return _chain(graph, last, torch.tanh, 2)

    module = _graph(build)
    flow, _ = annotated(module, [torch.ones(4), torch.ones(4)])
    names = [node.name for node in flow.nodes]
    forbidden = {names[i] for i, legal in enumerate(flow.legal[:-1]) if not legal}
    assert forbidden == {"sin", "sin_1", "add_", "cos", "cos_1", "cos_2", "mul"}


def test_an_input_that_is_changed_by_one_operation_forbids_no_cut() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        count = graph.placeholder("count")
        first = _chain(graph, x, torch.sin, 2)
        graph.call_method("add_", (count, 1))
        return _chain(graph, first, torch.cos, 2)

    flow, _ = annotated(_graph(build), [torch.ones(4), torch.zeros(())])
    assert all(flow.legal)


def test_a_tuple_does_not_cross_a_cut() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        halves = graph.call_function(torch.chunk, (x, 2))
        other = graph.call_function(torch.sin, (x,))
        return graph.call_function(torch.add, (graph.call_function(programs._item, (halves, 0)), other))

    assert _legal(build) == {"chunk": True, "sin": False, "_item": False, "add": True}


# Plans.


def test_whole_is_one_region_and_short_programs_are_not_cut() -> None:
    flow, _ = annotated(_graph(lambda g, x: _chain(g, x, torch.sin, 5)), [torch.randn(2, 4)])
    assert partition.whole(flow) == [0, 5]
    assert partition.blocks(flow, labels_of(flow)) == [0, 5]


def test_regions_are_neither_tiny_nor_huge_and_few_tensors_cross() -> None:
    flow, _ = annotated(_graph(lambda g, x: _chain(g, x, torch.sin, 200)), [torch.randn(2, 4)])
    cuts = partition.blocks(flow, labels_of(flow))
    sizes = [b - a for a, b in zip(cuts, cuts[1:], strict=False)]
    assert sum(sizes) == 200
    assert min(sizes) >= partition.MIN_OPERATIONS
    assert max(sizes) <= partition.MAX_OPERATIONS
    assert all(len(flow.live[cut]) == 1 for cut in cuts[1:-1])


@examples(20)
@given(
    block=st.lists(st.sampled_from([torch.sin, torch.cos, torch.relu, torch.neg]), min_size=5, max_size=9),
    times=st.integers(3, 7),
    before=st.lists(st.sampled_from([torch.exp, torch.abs]), max_size=3),
    after=st.lists(st.sampled_from([torch.exp, torch.abs]), max_size=3),
)
def test_equal_blocks_are_cut_alike(block: list[Any], times: int, before: list[Any], after: list[Any]) -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        value = x
        for function in before:
            value = graph.call_function(function, (value,))
        for _ in range(times):  # residual blocks: two values are live inside, one between
            inner = value
            for function in block:
                inner = graph.call_function(function, (inner,))
            value = graph.call_function(torch.add, (value, inner))
        for function in after:
            value = graph.call_function(function, (value,))
        return value

    flow, _ = annotated(_graph(build), [torch.randn(2, 4)])
    labels = labels_of(flow)
    cuts = partition.blocks(flow, labels)
    contents = Counter(tuple(labels[a:b]) for a, b in zip(cuts, cuts[1:], strict=False))
    # One region a block, alike but for the first and the last, which may hold what comes before and after.
    one_block = [label for label, count in contents.items() if count >= times - 2]
    assert one_block
    assert len(contents) <= 3
    assert len(cuts) - 1 >= times - 1


def test_what_repeats_in_the_network_repeats_in_the_plan() -> None:
    block = [torch.sin, torch.cos, torch.tanh, torch.neg, torch.relu, torch.abs, torch.exp]

    def build(
        graph: fx.Graph, x: fx.Node
    ) -> fx.Node:  # one value is live everywhere: only repetition tells where to cut
        value = x
        for function in [torch.sigmoid, torch.floor, *block * 8, torch.ceil]:
            value = graph.call_function(function, (value,))
        return value

    flow, _ = annotated(_graph(build), [torch.randn(2, 4)])
    labels = labels_of(flow)
    cuts = partition.blocks(flow, labels)
    contents = Counter(tuple(labels[a:b]) for a, b in itertools.pairwise(cuts))
    ((content, times),) = contents.most_common(1)
    assert times >= 6
    assert len(content) == len(block)


def test_labels_tell_operations_shapes_and_dtypes_apart() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        values = [graph.call_function(torch.sin, (x,)), graph.call_function(torch.sin, (x,))]
        values += [
            graph.call_function(torch.cos, (x,)),
            graph.call_function(torch.sin, (graph.call_method("double", (x,)),)),
        ]
        values += [graph.call_function(torch.sin, (graph.call_method("view", (x, -1)),))]
        return graph.call_function(torch.stack, (values[:2],))

    flow, _ = annotated(_graph(build), [torch.randn(2, 4)])
    labels = dict(zip([n.name for n in flow.nodes], labels_of(flow), strict=True))
    assert labels["sin"] == labels["sin_1"]
    assert len({labels[name] for name in ("sin", "cos", "sin_2", "sin_3")}) == 4


# Layout: the regions of a plan are the program.


@examples(20)
@given(
    instructions(), st.tuples(st.booleans(), st.booleans(), st.booleans()), st.sets(st.integers(0, 2)), st.booleans()
)
def test_the_regions_of_every_plan_compute_what_the_program_does(
    program: tuple[Instruction, ...], grad: tuple[bool, bool, bool], live: set[int], sources: bool
) -> None:
    seeds = [step.kind for step in program if step.kind in ("seed", "source")]
    n_seeds = len(seeds)
    bodies = {site: Scale(site, sources and seeds[site] == "source") for site in live if site < n_seeds}
    host = Host(bodies)
    module = programs.build(program, host.handle)
    args = programs.arguments(program, grad=grad)
    parameters = [body.weight for body in bodies.values()]
    leaves = [*(arg for arg in args if arg.requires_grad), *parameters]
    expected = module(*args)
    try:
        expected_gradients = gradients_of(expected, leaves)
    except RuntimeError as error:  # the program itself has no backward pass
        assert "modified by an inplace operation" in str(error)
        expected_gradients = None
    layout = Layout(module, args, ambient(), blocks=True)
    assert layout.plans[0].name == "whole"
    assert len(layout.plans[0].regions) == 1
    assert [(slot.model, slot.site) for slot in layout.slots] == [(host.handle, site) for site in range(n_seeds)]
    for plan in layout.plans:
        outputs = run_plan(layout, plan, args, bodies)
        assert torch.equal(outputs[0], expected[0])
        assert torch.equal(outputs[1], expected[1])
        assert outputs[2] is module.constant
        assert outputs[3] == 7
        assert [o.requires_grad for o in outputs[:2]] == [o.requires_grad for o in expected[:2]]
        if expected_gradients is not None:
            for mine, theirs in zip(gradients_of(outputs, leaves), expected_gradients, strict=True):
                assert (mine is None) == (theirs is None)
                # Regions may add up the branches of a gradient in another order.
                assert mine is None or torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


def _repeated(times: int) -> tuple[Instruction, ...]:
    return tuple(Instruction(kind, 0, 0) for _ in range(times) for kind in ("linear", "unary", "seed", "repeat"))


def test_equal_regions_share_a_template_and_so_a_kernel() -> None:
    program = _repeated(6)
    layout = Layout(programs.build(program), programs.arguments(program), ambient(), blocks=True)
    whole, blocks = layout.plans
    assert (whole.name, blocks.name) == ("whole", "blocks")
    templates = [region.template for region in blocks.regions]
    assert len(templates) > len({id(template) for template in templates})
    variants = layout.variants(blocks, (None,) * 6)
    assert variants is not None
    assert len({variant.key.digest for variant in variants}) < len(variants)


def test_a_layout_without_seeds_or_blocks_has_one_plan_and_an_empty_program_has_none() -> None:
    program = _repeated(4)
    module, args = programs.build(program), programs.arguments(program)
    assert [plan.name for plan in Layout(module, args, ambient(), blocks=False).plans] == ["whole"]
    for node in list(module.graph.nodes):
        if node.target is programs.SEED:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    assert [plan.name for plan in Layout(module, args, ambient(), blocks=True).plans] == ["whole"]
    empty = _graph(lambda graph, x: x)
    assert Layout(empty, [torch.ones(2)], ambient(), blocks=True).plans == []


def test_a_layout_leaves_the_programs_graph_alone() -> None:
    program = _repeated(3)
    module = programs.build(program)
    before = str(module.graph)
    Layout(module, programs.arguments(program), ambient(), blocks=True)
    assert str(module.graph) == before
    assert not any("example_value" in node.meta for node in module.graph.nodes)


def test_unknown_variants_are_not_made_when_only_known_ones_are_wanted() -> None:
    program = (*_repeated(2), Instruction("unary", 0, 3))
    layout = Layout(programs.build(program), programs.arguments(program), ambient(), blocks=True)
    body = record(Scale(0), layout.slots[0].value, training=True)
    assert layout.variants(layout.plans[0], (body, None), known=True) is None
    made = layout.variants(layout.plans[0], (body, None))
    assert made is not None
    assert layout.variants(layout.plans[0], (body, None), known=True) == made


def test_values_are_let_go_after_their_last_use() -> None:
    program = _repeated(6)
    layout = Layout(programs.build(program), programs.arguments(program), ambient(), blocks=True)
    for plan in layout.plans:
        freed: set[int] = set()
        for region in plan.regions:
            assert not freed.intersection(region.inputs)
            freed.update(region.frees)
        outputs = {item.index for item in plan.outputs if hasattr(item, "index") and not isinstance(item, tuple)}
        assert not freed & outputs
        used = {place for region in plan.regions for place in (*region.inputs, *region.outputs)}
        assert freed == used - outputs


def test_metas_say_what_tensors_are() -> None:
    tensor = torch.zeros(3, 4, dtype=torch.float64).t().requires_grad_()
    meta = TensorMeta.of(tensor)
    assert meta == TensorMeta((4, 3), (1, 4), torch.float64, torch.device("cpu"), True)
    assert TensorMeta.of(meta.empty()) == meta
    assert TensorMeta.of(tensor, requires_grad=False) == TensorMeta((4, 3), (1, 4), torch.float64, tensor.device, False)
    assert meta.describe() == [[4, 3], [1, 4], "torch.float64", "cpu", True]
