"""The passes that make a morphed graph: trace, find_sites, splice, and check against broken twins of each."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import esper_fx
from esper_fx.errors import MorphError, SiteError
from esper_fx.passes.check import check
from esper_fx.passes.find_sites import find_sites, glob_matches, no_match_message
from esper_fx.passes.pipeline import Draft, Pipeline
from esper_fx.passes.splice import splice
from esper_fx.passes.trace import TraceError, trace
from tests.support.examples import examples
from tests.support.networks import Description, assert_same, descriptions, run

ALPHA, GATE = "esper.state.alpha", "esper.state.gate"


def target(site: str) -> str:
    return f"esper.seeds.{site.replace('.', '/')}"


splice_seeds = partial(splice, target=target, alpha=ALPHA, gate=GATE)


class Net(nn.Module):
    """`a` is called twice, `b` once with two users, and two layers are nested."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(F.leaky_relu(x, negative_slope=0.1))
        second = self.b(first)
        return self.inner(torch.relu(second) + second) * self.a(second)


def traced(net: nn.Module | None = None) -> Draft:
    draft = Draft(net or Net())
    assert trace(draft)
    return draft


def found(sites: Any, net: nn.Module | None = None) -> Draft:
    draft = traced(net)
    find_sites(draft, sites=sites, modules=dict(draft.root.named_modules()))
    return draft


def spliced(sites: Any = ("a", "b", "inner.*"), net: nn.Module | None = None) -> Draft:
    draft = found(list(sites) if isinstance(sites, tuple) else sites, net)
    assert splice_seeds(draft)
    return draft


def graph_of(draft: Draft) -> fx.Graph:
    assert draft.graph is not None
    return draft.graph


def node(draft: Draft, name: str) -> fx.Node:
    return next(n for n in graph_of(draft).nodes if n.name == name)


def seeds_of(draft: Draft, site: str) -> list[fx.Node]:
    return [n for n in graph_of(draft).nodes if n.op == "call_module" and n.target == target(site)]


# trace


def test_trace_remembers_what_every_call_of_every_module_returned() -> None:
    draft = traced()
    assert {name: [value.name for value in values] for name, values in draft.outputs.items() if name} == {
        "a": ["a", "a_1"],
        "b": ["b"],
        "inner.0": ["inner_0"],
        "inner.1": ["inner_1"],
        "inner": ["inner_1"],
    }


def test_trace_writes_down_what_the_graph_computes_and_later_passes_do_not_touch_that() -> None:
    draft = traced()
    assert [row[:2] for row in draft.traced] == [(n.op, n.target) for n in graph_of(draft).nodes]
    splice_seeds(found_in := found("**"))
    assert found_in.traced == draft.traced
    assert "esper" not in str(found_in.traced)


def test_trace_refuses_control_flow_that_depends_on_values() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match="Branching cannot be traced symbolically: .*control flow"):
        trace(Draft(Branching()))


def test_trace_refuses_a_forward_that_reads_training_and_keeps_such_a_child_whole() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if self.training else x

    with pytest.raises(TraceError, match=r"Reads.forward reads self.training, which a graph would freeze"):
        trace(Draft(Reads()))
    draft = traced(nn.Sequential(Reads(), nn.ReLU()))
    assert [n.target for n in graph_of(draft).nodes if n.op == "call_module"] == ["0", "1"]


def test_trace_keeps_a_module_with_hooks_whole_so_that_they_run_at_run_time() -> None:
    net = Net()
    net.inner.register_forward_hook(lambda *_: None)
    assert [n.target for n in graph_of(traced(net)).nodes if n.op == "call_module"] == ["a", "b", "inner", "a"]


# find_sites


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("blocks.*", "blocks.3", True),
        ("blocks.*", "blocks.3.attention", False),
        ("blocks.*", "blocks", False),
        ("blocks.**", "blocks.3.attention", True),
        ("**.attention", "blocks.3.attention", True),
        ("**", "blocks.3", True),
        ("blocks.*.attention", "blocks.12.attention", True),
        ("blocks.?", "blocks.3", True),
        ("blocks.?", "blocks.12", False),
        ("blocks.?", "blocks..", False),
        ("b*", "blocks", True),
        ("blocks.3", "blocksX3", False),
        ("a+", "aa", False),
        ("[ab]", "a", False),
        ("Blocks.*", "blocks.1", False),
    ],
)
def test_a_star_stays_within_a_level_and_two_cross_levels(pattern: str, name: str, expected: bool) -> None:
    assert glob_matches(pattern, name) is expected


names = st.lists(st.text("ab1_", min_size=1, max_size=3), min_size=1, max_size=4).map(".".join)


@examples(50)
@given(names)
def test_a_name_matches_itself_and_two_stars_match_every_name(name: str) -> None:
    assert glob_matches(name, name)
    assert glob_matches("**", name)
    assert glob_matches("*", name) == ("." not in name)
    assert glob_matches(".".join("*" for _ in name.split(".")), name)


@examples(50)
@given(names, st.integers(0, 3))
def test_one_star_stands_for_any_one_level(name: str, level: int) -> None:
    parts = name.split(".")
    parts[level % len(parts)] = "*"
    assert glob_matches(".".join(parts), name)
    assert not glob_matches(".".join(["*", *parts]), name)


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ("a", {"a": ["a", "a_1"]}),
        (["a", "inner.*"], {"a": ["a", "a_1"], "inner.0": ["inner_0"], "inner.1": ["inner_1"]}),
        (nn.Tanh, {"inner.1": ["inner_1"]}),
        ([nn.Tanh, "b"], {"b": ["b"], "inner.1": ["inner_1"]}),
        (nn.Sequential, {"inner": ["inner_1"]}),
        (lambda n: n.target is F.leaky_relu or n.target == "b", {"leaky_relu": ["leaky_relu"], "b": ["b"]}),
        (lambda n: n.target == "a", {"a": ["a"], "a_1": ["a_1"]}),
        ("nothing", {}),
    ],
    ids=["glob", "several globs", "type", "type and glob", "container", "predicate", "predicate per visit", "none"],
)
def test_sites_are_found_by_glob_type_and_predicate(sites: Any, expected: dict[str, list[str]]) -> None:
    draft = found(sites)
    assert {site: [visit.name for visit in visits] for site, visits in draft.sites.items()} == expected


def test_a_predicate_is_never_asked_about_inputs_and_outputs() -> None:
    asked: list[str] = []
    found(lambda n: asked.append(n.op) or False)  # type: ignore[func-returns-value]
    assert asked
    assert set(asked) == {"call_function", "call_module"}


def test_every_node_that_a_predicate_selects_is_a_site_of_its_own_whatever_the_modules_are_called() -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.act_1 = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act_1(self.act(self.act(x)))

    draft = found(lambda n: n.op == "call_module", Names())
    visits = [visit for nodes in draft.sites.values() for visit in nodes]
    assert visits == [n for n in graph_of(draft).nodes if n.op == "call_module"]


def test_site_names_begin_with_the_scope_of_the_traced_part() -> None:
    net = nn.ModuleDict({"part": Net()})
    draft = Draft(net["part"])
    trace(draft)
    find_sites(draft, sites="part.inner.*", modules=dict(net.named_modules()), scope="part")
    assert list(draft.sites) == ["part.inner.0", "part.inner.1"]


def test_find_sites_reports_whether_it_changed_anything() -> None:
    draft = traced()
    arguments: dict[str, Any] = {"sites": "a", "modules": dict(draft.root.named_modules())}
    assert find_sites(draft, **arguments)
    assert not find_sites(draft, **arguments)


def test_of_a_tuple_the_first_value_is_the_site_and_a_dict_is_refused_by_name() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x + 2

    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": x}

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()
            self.named = Named()

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.pair(x)
            return self.named(a + b)["a"]

    assert [node.target for node in found("pair", Uses()).sites["pair"]] == [operator.add]
    with pytest.raises(SiteError, match=r"site 'named' returns a dict, but a seed needs one floating tensor"):
        found("named", Uses())


def test_no_match_names_what_comes_nearest() -> None:
    message = no_match_message("blcks.3", ["blocks.3", "head", "blocks.4"])
    assert "sites='blcks.3' selects no module" in message
    assert message.index("blocks.3") < message.index("head")
    assert "'*' stays within one level of the dotted name, '**' crosses levels" in message


# splice


def test_a_seed_follows_every_visit_and_every_user_reads_it() -> None:
    draft = spliced(("a", "b"))
    for site, visits in (("a", ["a", "a_1"]), ("b", ["b"])):
        seeds = seeds_of(draft, site)
        assert [seed.args[0] for seed in seeds] == [node(draft, name) for name in visits]
        for seed in seeds:
            assert [array.target for array in seed.args[1:]] == [ALPHA, GATE]  # type: ignore[union-attr]
            assert list(seed.args[0].users) == [seed]  # type: ignore[union-attr]
    assert len(node(draft, "relu").all_input_nodes) == 1
    assert node(draft, "relu").args[0] is node(draft, "add").args[1] is seeds_of(draft, "b")[0]


def test_the_state_arrays_are_read_once_however_many_seeds_there_are() -> None:
    draft = spliced("**")
    assert [n.target for n in graph_of(draft).nodes if n.op == "get_attr"] == [ALPHA, GATE]


def test_where_two_sites_share_a_value_the_inner_seed_comes_first() -> None:
    draft = spliced(("inner", "inner.1"))
    (inner,), (outer,) = seeds_of(draft, "inner.1"), seeds_of(draft, "inner")
    assert inner.args[0] is node(draft, "inner_1")
    assert outer.args[0] is inner
    assert list(inner.users) == [outer]


@pytest.mark.parametrize("sites", ["**", ["a", "inner"], lambda n: n.op == "call_function"])
def test_splice_is_idempotent(sites: Any) -> None:
    draft = spliced(sites)
    before = str(graph_of(draft))
    assert not splice_seeds(draft)
    assert str(graph_of(draft)) == before


def test_splice_without_sites_changes_nothing() -> None:
    draft = found("nothing")
    before = str(graph_of(draft))
    assert not splice_seeds(draft)
    assert str(graph_of(draft)) == before


def test_a_seed_node_carries_the_provenance_of_the_value_it_serves() -> None:
    draft = found("b")
    node(draft, "b").meta.update(stack_trace="line 7", nn_module_stack={"b": ("b", nn.Linear)}, other=1)
    splice_seeds(draft)
    (seed,) = seeds_of(draft, "b")
    assert seed.meta["stack_trace"] == "line 7"
    assert seed.meta["nn_module_stack"] == {"b": ("b", nn.Linear)}
    assert seed.meta["esper_seed"] == "b"
    assert "other" not in seed.meta


# check


def test_check_accepts_every_stage_of_a_sound_pipeline() -> None:
    draft = Draft(Net())
    check(draft)
    records = _pipeline().run(draft)
    assert [(record.name, record.changed) for record in records] == [
        ("trace", True),
        ("find_sites", True),
        ("splice", True),
    ]
    assert records[2].nodes_after == records[2].nodes_before + 2 + 5  # two arrays; a twice, b, inner.0, inner.1
    assert str(_pipeline()) == "trace -> find_sites -> splice"
    assert str(records[2]).startswith("splice ")


def _pipeline(**replaced: Callable[[Draft], Any]) -> Pipeline:
    passes: dict[str, Callable[[Draft], Any]] = {
        "trace": trace,
        "find_sites": lambda d: find_sites(d, sites=["a", "b", "inner.*"], modules=dict(d.root.named_modules())),
        "splice": splice_seeds,
    }
    return Pipeline(list({**passes, **replaced}.items()), check)


def _then(sound: Callable[..., Any], damage: Callable[[Draft], None]) -> Callable[[Draft], bool]:
    """A broken twin of a pass: it does what the pass does, and then some damage."""

    def broken(draft: Draft) -> bool:
        sound(draft)
        damage(draft)
        return True

    return broken


def _sound_find_sites(draft: Draft) -> bool:
    return find_sites(draft, sites=["a", "b", "inner.*"], modules=dict(draft.root.named_modules()))


def _bypass(seed: fx.Node) -> None:
    seed.replace_all_uses_with(seed.args[0])  # type: ignore[arg-type]
    seed.graph.erase_node(seed)


def forget_a_visit(draft: Draft) -> None:
    _bypass(seeds_of(draft, "a")[1])


def forget_a_site(draft: Draft) -> None:
    _bypass(seeds_of(draft, "b")[0])


def visit_one_value_twice(draft: Draft) -> None:
    first, second = seeds_of(draft, "a")
    _bypass(second)
    with graph_of(draft).inserting_after(first):
        again = graph_of(draft).call_module(target("a"), first.args)
    first.replace_all_uses_with(again)
    again.args = (first, *first.args[1:])


def drop_a_user(draft: Draft) -> None:
    (seed,) = seeds_of(draft, "b")
    assert len(seed.users) > 1
    next(iter(seed.users)).replace_input_with(seed, seed.args[0])  # type: ignore[arg-type]


def drop_all_users(draft: Draft) -> None:
    (seed,) = seeds_of(draft, "b")
    seed.replace_all_uses_with(seed.args[0])  # type: ignore[arg-type]


def swap_the_arrays(draft: Draft) -> None:
    (seed,) = seeds_of(draft, "b")
    value, alpha, gate = seed.args
    seed.args = (value, gate, alpha)


def read_one_array_twice(draft: Draft) -> None:
    (seed,) = seeds_of(draft, "b")
    seed.args = (seed.args[0], seed.args[1], seed.args[1])


def forget_the_arrays(draft: Draft) -> None:
    (seed,) = seeds_of(draft, "b")
    seed.args = seed.args[:1]


def exchange_two_seeds(draft: Draft) -> None:
    (one,), (other,) = seeds_of(draft, "b"), seeds_of(draft, "inner.0")
    one.target, other.target = other.target, one.target


def move_a_seed(draft: Draft) -> None:
    """The seed of `b` follows `relu(b)` instead."""
    (seed,) = seeds_of(draft, "b")
    relu = node(draft, "relu")
    _bypass(seed)
    with graph_of(draft).inserting_after(relu):
        moved = graph_of(draft).call_module(target("b"), (relu, *seeds_of(draft, "a")[0].args[1:]))
    relu.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)


def rewire_an_edge(draft: Draft) -> None:
    add, relu = node(draft, "add"), node(draft, "relu")
    add.args = (relu, relu)


def add_an_operation(draft: Draft) -> None:
    relu = node(draft, "relu")
    with graph_of(draft).inserting_after(relu):
        extra = graph_of(draft).call_function(torch.neg, (relu,))
    relu.replace_all_uses_with(extra, delete_user_cb=lambda user: user is not extra)


def add_a_dead_operation(draft: Draft) -> None:
    with graph_of(draft).inserting_after(node(draft, "relu")):
        graph_of(draft).call_function(torch.neg, (node(draft, "relu"),))


def erase_an_operation(draft: Draft) -> None:
    relu = node(draft, "relu")
    relu.replace_all_uses_with(relu.args[0])  # type: ignore[arg-type]
    graph_of(draft).erase_node(relu)


def change_an_operator(draft: Draft) -> None:
    node(draft, "relu").target = torch.tanh


def change_a_constant(draft: Draft) -> None:
    node(draft, "leaky_relu").kwargs = {**node(draft, "leaky_relu").kwargs, "negative_slope": 0.2}


def return_something_else(draft: Draft) -> None:
    next(iter(reversed(graph_of(draft).nodes))).args = (node(draft, "relu"),)


def use_before_definition(draft: Draft) -> None:
    node(draft, "relu").append(node(draft, "b"))


def two_nodes_of_one_name(draft: Draft) -> None:
    node(draft, "relu").name = "b"


@pytest.mark.parametrize(
    "damage",
    [
        forget_a_visit,
        forget_a_site,
        visit_one_value_twice,
        drop_a_user,
        drop_all_users,
        swap_the_arrays,
        read_one_array_twice,
        forget_the_arrays,
        exchange_two_seeds,
        move_a_seed,
        rewire_an_edge,
        add_an_operation,
        add_a_dead_operation,
        erase_an_operation,
        change_an_operator,
        change_a_constant,
        return_something_else,
        use_before_definition,
        two_nodes_of_one_name,
    ],
)
def test_check_rejects_a_broken_splice(damage: Callable[[Draft], None]) -> None:
    with pytest.raises(MorphError):
        _pipeline(splice=_then(splice_seeds, damage)).run(Draft(Net()))


def invent_a_node_in_the_graph(draft: Draft) -> None:
    with graph_of(draft).inserting_after(node(draft, "b")):
        draft.sites["new"] = [graph_of(draft).call_function(torch.neg, (node(draft, "b"),))]


def invent_a_node_elsewhere(draft: Draft) -> None:
    draft.sites["new"] = [fx.Graph().placeholder("x")]


def name_a_node_of_another_graph(draft: Draft) -> None:
    other = Draft(draft.root)
    trace(other)
    draft.sites["b"] = [n for n in graph_of(other).nodes if n.name == "b"]


def rewire_while_looking(draft: Draft) -> None:
    node(draft, "add").args = (node(draft, "b"), node(draft, "b"))


@pytest.mark.parametrize(
    "damage",
    [invent_a_node_in_the_graph, invent_a_node_elsewhere, name_a_node_of_another_graph, rewire_while_looking],
)
def test_check_rejects_a_broken_find_sites(damage: Callable[[Draft], None]) -> None:
    with pytest.raises(MorphError):
        _pipeline(find_sites=_then(_sound_find_sites, damage)).run(Draft(Net()))


def lose_a_node(draft: Draft) -> None:
    erase_an_operation(draft)


def lose_the_output(draft: Draft) -> None:
    graph_of(draft).erase_node(next(iter(reversed(graph_of(draft).nodes))))


@pytest.mark.parametrize("damage", [lose_a_node, lose_the_output, add_a_dead_operation, change_a_constant])
def test_check_rejects_a_broken_trace(damage: Callable[[Draft], None]) -> None:
    with pytest.raises(MorphError):
        _pipeline(trace=_then(trace, damage)).run(Draft(Net()))


def test_check_says_what_is_wrong() -> None:
    with pytest.raises(MorphError, match="site 'a' is visited 2 times but its seed is called 1 times"):
        _pipeline(splice=_then(splice_seeds, forget_a_visit)).run(Draft(Net()))
    with pytest.raises(MorphError, match="no longer means what was traced; first difference: .*relu.* became .*tanh"):
        _pipeline(splice=_then(splice_seeds, change_an_operator)).run(Draft(Net()))
    with pytest.raises(MorphError, match="the graph of Net is malformed"):
        _pipeline(splice=_then(splice_seeds, use_before_definition)).run(Draft(Net()))
    with pytest.raises(MorphError, match="must read one value and the state arrays alpha and gate"):
        _pipeline(splice=_then(splice_seeds, forget_the_arrays)).run(Draft(Net()))


# All together: a spliced model is the original.


@examples(20)
@given(descriptions(), st.sampled_from(["layers.*", "**", "lambda"]))
def test_a_spliced_network_is_bitwise_the_original_in_outputs_and_gradients(
    description: Description, sites: str
) -> None:
    net, x = description.build(), description.example()
    state = {name: buffer.clone() for name, buffer in net.named_buffers()}
    expected = run(net, x)
    changed = {name: buffer.clone() for name, buffer in net.named_buffers()}
    for name, buffer in net.named_buffers():  # BatchNorm's statistics, which the two share, as they were
        buffer.copy_(state[name])
    model = esper_fx.morph(net, sites=(lambda n: n.op != "get_attr") if sites == "lambda" else sites)
    outputs, gradients = run(model, x)
    assert_same(outputs, expected[0])
    assert_same(gradients, expected[1])
    assert_same({name: buffer for name, buffer in model.named_buffers() if not name.startswith("esper.")}, changed)
