"""The passes over random networks and programs: meaning is kept, a second run changes nothing, graphs stay sound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import esper_fx
from esper_fx.errors import SiteError
from esper_fx.morphing.drafting import morph_pipeline
from esper_fx.passes import serialize
from esper_fx.passes.canonical import canonical
from esper_fx.passes.carry_sizes import carry_sizes
from esper_fx.passes.check import check
from esper_fx.passes.pipeline import Draft
from esper_fx.passes.propagate import is_seed, propagate
from esper_fx.passes.specialize import specialize
from esper_fx.passes.trace import TraceError
from tests.support import programs
from tests.support.examples import property_examples
from tests.support.networks import Description, assert_same, descriptions, possible_sites, run
from tests.support.programs import Instruction, instructions


def _all_but_reads(node: fx.Node) -> bool:
    return node.op != "get_attr"


def _sums(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") in ("add", "mul")


@st.composite
def site_choices(draw: st.DrawFn, net: nn.Module) -> Any:
    """Names, a type, or a predicate over nodes."""
    names = st.lists(st.sampled_from(possible_sites(net)), unique=True, min_size=1)
    return draw(st.one_of(names, names, st.sampled_from([nn.Linear, nn.Tanh, _all_but_reads, _sums])))


@property_examples()
@given(descriptions(wide=True), st.data(), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_a_spliced_network_is_bitwise_the_original(
    description: Description, data: st.DataObject, training: bool, dtype: torch.dtype
) -> None:
    net = description.build().to(dtype).train(training)
    x = description.example().detach().to(dtype).requires_grad_()
    state = {name: buffer.clone() for name, buffer in net.named_buffers()}
    outputs, gradients = run(net, x)
    changed = {name: buffer.clone() for name, buffer in net.named_buffers()}
    for name, buffer in net.named_buffers():  # the two share them
        buffer.copy_(state[name])
    try:
        model = esper_fx.morph(net, sites=data.draw(site_choices(net)))
    except SiteError:  # nothing of that kind is called
        assume(False)
        raise
    actual = run(model, x)
    assert_same(actual[0], outputs)
    assert_same(actual[1], gradients)
    assert_same({name: buffer for name, buffer in model.named_buffers() if not name.startswith("esper.")}, changed)


@property_examples()
@given(descriptions(wide=True), st.data())
def test_a_second_run_of_the_passes_changes_nothing(description: Description, data: st.DataObject) -> None:
    net = description.build()
    pipeline = morph_pipeline(data.draw(site_choices(net)), dict(net.named_modules()))
    draft = Draft(net)
    try:
        pipeline.run(draft)  # checks after every pass
    except TraceError:
        assume(False)
    assert draft.graph is not None
    before, sites = str(draft.graph), {name: list(visits) for name, visits in draft.sites.items()}
    passes: dict[str, Callable[[Draft], bool]] = dict(pipeline.passes)
    for name in ("find_sites", "splice", "find_sites", "splice"):
        assert not passes[name](draft)
        check(draft)
    assert str(draft.graph) == before
    assert draft.sites == sites
    spliced = [n.meta["esper_seed"] for n in draft.graph.nodes if "esper_seed" in n.meta]
    assert sorted(spliced) == sorted(name for name, visits in sites.items() for _ in dict.fromkeys(visits))


@property_examples()
@given(instructions())
def test_numbers_are_frozen_once_and_the_program_means_the_same(program: tuple[Instruction, ...]) -> None:
    host = programs.Host({})
    module = programs.build(program, host.handle)
    args = programs.arguments(program)
    sized = _with_sizes(module)
    expected = module(*args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        propagate(sized, [mode.from_tensor(tensor) for tensor in args])
    assert carry_sizes(sized.graph)
    before = str(sized.graph)
    assert not carry_sizes(sized.graph)
    assert str(sized.graph) == before
    sized.graph.lint()
    sized.recompile()
    actual = sized(*args)
    assert_same(list(actual[:3]), list(expected[:3]))
    assert not any(node.target == "size" for node in sized.graph.nodes)


def _with_sizes(module: fx.GraphModule) -> fx.GraphModule:
    """The program with a multiplication by a size over itself after every operation that returns a tensor."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    sized = ("sin", "relu", "sigmoid", "neg", "add", "mul")
    for node in module.graph.nodes:
        new = mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        if node.op == "call_function" and getattr(node.target, "__name__", "") in sized:
            size = graph.call_method("size", (new, 0))
            ratio = graph.call_function(torch.sym_max, (size, 1))
            part = graph.call_function(_half, (ratio, ratio))
            mapping[node] = graph.call_function(torch.mul, (new, part))
    return fx.GraphModule(module, graph)


def _half(a: int, b: int) -> int:
    return a // b


@property_examples()
@given(instructions())
def test_dormant_seeds_vanish_once_and_a_graph_is_the_same_after_it_was_sent(program: tuple[Instruction, ...]) -> None:
    host = programs.Host({})
    module = programs.build(program, host.handle)
    seeds = sum(map(is_seed, module.graph.nodes))
    variant = fx.GraphModule(module, specialize(module.graph, [None] * seeds))
    again = fx.GraphModule(module, specialize(variant.graph, []))
    sent = serialize.loads(serialize.dumps(variant))
    text = canonical(variant.graph, variant)
    assert text == canonical(again.graph, again) == canonical(sent.graph, sent)
    assert text != canonical(module.graph, module)
    args = programs.arguments(program)
    expected = module(*args)
    for other in (variant, again, sent):
        other.graph.lint()
        actual: list[Tensor] = other(*args)
        assert_same(list(actual[:3]), list(expected[:3]))
