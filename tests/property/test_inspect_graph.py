"""A model's graph for networkx: all that the spliced graphs hold, or what can be read of it, and nothing that leads back."""

from __future__ import annotations

import copy
import json
from collections import Counter
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import esper_fx
from esper_fx import inspect
from esper_fx.errors import InspectionError
from esper_fx.inspect.modules import READABLE
from esper_fx.morphing.scopes import is_seed
from tests.support.examples import examples
from tests.support.growing import grow
from tests.support.inspecting import ODD_NAMES, grown_transformer, odd, parts, small_transformer
from tests.support.models import residual_cnn
from tests.support.networks import Description, descriptions, possible_sites
from tests.support.zoo import KINDS


def morphed(name: str) -> esper_fx.MorphableModel:
    """A model of some kind."""
    args, kwargs = KINDS[name].inputs(9)
    return esper_fx.morph(KINDS[name].build(), sites=KINDS[name].sites, example_inputs=None if kwargs else args)


def random_model(description: Description, share: float) -> esper_fx.MorphableModel:
    """A random network with seeds at some of its modules."""
    net = description.build()
    called = list(esper_fx.morph(net, sites=possible_sites(net)).seeds)
    chosen = called[: max(1, round(share * len(called)))]
    return esper_fx.morph(net, sites=chosen, example_inputs=(description.example(),))


def identity(scope: str, node: fx.Node) -> str:
    return f"{scope}:{node.name}" if scope else node.name


def uses(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads, as often as it reads them, found by torch.fx's own means."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def check_holds_every_node_and_use(model: esper_fx.MorphableModel) -> None:
    result = inspect.graph(model, detail="operations")
    traced = {scope: list(graph.nodes) for scope, graph in model.graphs.items()}
    names = [identity(scope, node) for scope, nodes in traced.items() for node in nodes]
    assert [name for name, attributes in result.nodes(data=True) if not name.startswith(untraced(model))] == names
    expected = Counter(
        (identity(scope, used), identity(scope, node))
        for scope, nodes in traced.items()
        for node in nodes
        for used in uses(node)
    )
    own = [(a, b) for a, b in result.edges() if not a.startswith(untraced(model))]
    assert Counter(own) == expected
    assert nx.is_directed_acyclic_graph(result)


def untraced(model: esper_fx.MorphableModel) -> tuple[str, ...]:
    """How the names of nodes begin that stand for sites outside of all graphs."""
    inside = {node.meta["esper_seed"] for graph in model.graphs.values() for node in graph.nodes if is_seed(node)}
    return tuple(f"{site}:" for site in model.seeds if site not in inside)


@pytest.mark.parametrize("name", KINDS)
def test_operations_are_the_nodes_and_uses_of_the_spliced_graphs(name: str) -> None:
    check_holds_every_node_and_use(morphed(name))


@examples(50)
@given(descriptions(wide=True), st.floats(0, 1))
def test_operations_of_random_networks(description: Description, share: float) -> None:
    check_holds_every_node_and_use(random_model(description, share))


def check_preserves_reachability(model: esper_fx.MorphableModel, depth: int | None) -> None:
    """What leads from one node to another leads from what stands for the one to what stands for the other."""
    fine, coarse = inspect.graph(model, detail="operations"), inspect.graph(model, depth=depth)
    assert nx.is_directed_acyclic_graph(coarse)
    assert set(coarse) <= set(fine)
    order = list(fine)
    assert [node for node in order if node in coarse] == list(coarse)
    stands_for: dict[str, str] = {}
    singles = {"seed", "input", "output"}
    current = ""
    for node in order:
        kind = fine.nodes[node]["kind"]
        if node in coarse:
            current = node
        if kind not in ("state", "parameter", "constant"):
            assert node in coarse or kind not in singles
            stands_for[node] = current
    reach = {node: {node, *nx.descendants(coarse, node)} for node in coarse}
    for node, part in stands_for.items():
        assert {stands_for[other] for other in nx.descendants(fine, node)} <= reach[part]
    # And every edge is there because of one.
    pairs = {(stands_for[a], stands_for[b]) for a, b in fine.edges() if a in stands_for}
    assert {(a, b) for a, b in coarse.edges()} == {(a, b) for a, b in pairs if a != b}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("depth", [1, 2, None])
def test_modules_preserve_reachability(name: str, depth: int | None) -> None:
    check_preserves_reachability(morphed(name), depth)


@examples(50)
@given(descriptions(wide=True), st.floats(0, 1), st.integers(1, 3))
def test_modules_of_random_networks(description: Description, share: float, depth: int) -> None:
    check_preserves_reachability(random_model(description, share), depth)


def test_what_is_said_of_nodes() -> None:
    nodes = inspect.graph(grown_transformer(), detail="operations").nodes
    assert nodes["ids_bt"] == {"kind": "input", "op": "placeholder", "target": "ids_BT", "scope": "", "module": ""}
    assert nodes["position_embedding"] == {
        "kind": "parameter",
        "op": "get_attr",
        "target": "position_embedding",
        "scope": "",
        "module": "",
        "shape": [8, 16],
        "dtype": "float32",
    }
    assert nodes["scaled_dot_product_attention"] == {
        "kind": "operation",
        "op": "call_function",
        "target": "torch._C._nn.scaled_dot_product_attention",
        "scope": "",
        "module": "blocks.0.attention",
    }
    assert (nodes["add"]["target"], nodes["unflatten"]["target"]) == ("operator.add", "unflatten")
    assert nodes["blocks_1_attention_qkv"] == {
        "kind": "module",
        "op": "call_module",
        "target": "blocks.1.attention.qkv",
        "scope": "",
        "module": "blocks.1.attention.qkv",
        "type": "Linear",
    }
    assert nodes["esper_seeds_blocks_1"] == {
        "kind": "seed",
        "op": "call_module",
        "target": "esper.seeds.blocks/1",
        "scope": "",
        "module": "blocks.1",
        "site": "blocks.1",
        "stage": "BLENDING",
        "blueprint": "low_rank",
        "alpha": 0.75,
        "live": True,
        "shape": [2, 8, 16],
        "dtype": "float32",
    }
    assert nodes["output"]["kind"] == "output"
    state = [node for node, kind in nodes(data="kind") if kind == "state"]
    assert state == ["esper_state_alpha", "esper_state_gate"]
    assert "state" not in dict(inspect.graph(grown_transformer()).nodes(data="kind")).values()


def test_edges_say_which_argument_they_are() -> None:
    class Arguments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x: Tensor, sizes: Tensor) -> Any:
            y = self.first(x)
            z = torch.cat([y, x, y], dim=0)
            z = torch.where(input=z, condition=z > 0, other=y.sum())
            return {"all": z[sizes:], "y": (y, y)}  # type: ignore[misc]

    model = esper_fx.morph(Arguments(), sites="first")
    result = inspect.graph(model, detail="operations")
    (seed,) = (node for node, kind in result.nodes(data="kind") if kind == "seed")

    def arguments(source: str, target: str) -> list[str]:
        return [edge["argument"] for edge in result.get_edge_data(source, target).values()]

    assert arguments(seed, "cat") == ["0[0]", "0[2]"]
    assert arguments("x", "cat") == ["0[1]"]
    assert arguments("gt", "where") == ["condition"]
    assert arguments("sizes", "getitem") == ["1.start"]
    assert arguments(seed, "output") == ["0['y'][0]", "0['y'][1]"]
    assert arguments("getitem", "output") == ["0['all']"]
    assert arguments("x", seed) == ["3"]  # its source


def test_modules_are_shown_as_a_whole_from_a_depth_on() -> None:
    model = small_transformer(depth=2, sites=["blocks.1"])
    targets = {
        depth: [a["target"] for _, a in inspect.graph(model, depth=depth).nodes(data=True)] for depth in (1, 2, 3)
    }
    seed = "esper.seeds.blocks/1"
    assert targets[1] == ["ids_BT", "token_embedding", "operator.add", "blocks", seed, "norm", "head", "output"]
    assert targets[2] == [
        "ids_BT",
        "token_embedding",
        "operator.add",
        "blocks.0",
        "blocks.1",
        seed,
        "norm",
        "head",
        "output",
    ]
    assert targets[3][3:8] == [
        "blocks.0.attention_norm",
        "blocks.0.attention",
        "operator.add",
        "blocks.0.feed_forward_norm",
        "blocks.0.feed_forward",
    ]
    first = dict(inspect.graph(model, depth=2).nodes(data=True))["blocks_0_attention_norm"]
    assert first == {
        "kind": "module",
        "op": "call_module",
        "target": "blocks.0",
        "scope": "",
        "module": "blocks.0",
        "type": "TransformerBlock",
        "operations": 17,
    }


def test_a_seed_within_a_module_divides_it() -> None:
    model = small_transformer(depth=1, sites=["blocks.0.attention"])
    result = inspect.graph(model, depth=2)
    around = [node for node, module in result.nodes(data="module") if module == "blocks.0"]
    assert len(around) == 2
    (seed,) = (node for node, kind in result.nodes(data="kind") if kind == "seed")
    assert list(result.predecessors(seed)) == [around[0]]
    assert list(result.successors(seed)) == [around[1]]
    assert set(result.predecessors(around[1])) == {seed, "add"}  # the residual


def test_calls_of_one_module_stay_apart_and_their_seed_is_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
            self.last = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.block(self.block(x)))
            return y

    result = inspect.graph(esper_fx.morph(Twice(), sites="last"), depth=1)
    assert [a["target"] for _, a in result.nodes(data=True)] == [
        "x",
        "block",
        "block",
        "last",
        "esper.seeds.last",
        "output",
    ]
    model = esper_fx.morph(Twice(), sites="block", example_inputs=(torch.ones(2, 4),))
    grow(model, "block", "affine")
    seeds = [a for _, a in inspect.graph(model).nodes(data=True) if a["kind"] == "seed"]
    assert len(seeds) == 2
    assert seeds[0] == seeds[1]
    assert seeds[0]["blueprint"] == "affine"


def test_between_modules_there_is_an_edge_for_every_value_and_none_for_its_further_uses() -> None:
    class Gives(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.exp(), x.sin()

    class Takes(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return first * second + first

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gives, self.takes, self.last = Gives(), Takes(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.takes(*self.gives(x)))
            return y

    result = inspect.graph(esper_fx.morph(Both(), sites="last"))
    assert list(result.get_edge_data("exp", "mul").values()) == [
        {"argument": "0", "value": "exp"},
        {"argument": "1", "value": "sin"},
    ]


def test_large_models_stay_readable() -> None:
    model = small_transformer(depth=20, sites=["blocks.*"])
    assert len(inspect.graph(model, detail="operations")) > 6 * READABLE
    assert len(inspect.graph(model)) <= READABLE
    assert {a["target"] for _, a in inspect.graph(model).nodes(data=True)} >= {f"blocks.{i}" for i in range(20)}
    shallow = small_transformer(depth=40, sites=["blocks.*"])  # where nothing helps: what belongs to seeds, and no more
    assert len(inspect.graph(shallow)) == 2 * 40 + 6


def test_parts_of_a_plain_python_model_each_have_a_graph() -> None:
    model = parts()
    result = inspect.graph(model, detail="operations")
    assert set(model.graphs) == {"first", "twice"}
    scopes = Counter(scope for _, scope in result.nodes(data="scope"))
    assert scopes == {"first": len(model.graphs["first"].nodes), "twice": len(model.graphs["twice"].nodes), "noisy": 2}
    assert nx.number_weakly_connected_components(result) == 3
    assert result.nodes["first:_0"]["target"] == "first.0"
    assert result.nodes["noisy:forward"]["type"] == "Noisy"
    assert result.nodes["noisy:seed"]["site"] == "noisy"
    assert list(result.edges(data=True))[-1] == ("noisy:forward", "noisy:seed", {"argument": "0"})
    weight = next(a for _, a in result.nodes(data=True) if a["target"] == "twice.weight")
    assert (weight["kind"], weight["shape"], weight["module"]) == ("parameter", [4, 4], "twice")


def test_graphs_are_the_same_every_time_and_of_a_copy() -> None:
    model = grown_transformer()
    for detail in ("modules", "operations"):
        first, again, copied = (inspect.graph(m, detail=detail) for m in (model, model, copy.deepcopy(model)))
        for other in (again, copied):
            assert list(first.nodes(data=True)) == list(other.nodes(data=True))
            assert list(first.edges(keys=True, data=True)) == list(other.edges(keys=True, data=True))
    assert first.graph == {"model": "Transformer", "detail": "operations", "clock": 5}


def test_a_residual_network_has_its_shortcuts() -> None:
    example = residual_cnn(channels=(4, 8), blocks_per_stage=2, size=8, batch=2)
    model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
    result = inspect.graph(model, depth=3)
    convolution = next(node for node, target in result.nodes(data="target") if target == "blocks.1.conv1")
    (before,) = result.predecessors(convolution)
    assert result.nodes[before]["site"] == "blocks.0"
    assert {result.nodes[node]["target"] for node in result.successors(before)} == {
        "blocks.1.conv1",
        "blocks.1.shortcut",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detail": "nodes"}, r"^detail='nodes': expected one of 'modules', 'operations'$"),
        ({"depth": 0}, r"^depth=0 with detail='modules': expected a whole number from 1, for 'modules' only$"),
        ({"depth": 1.5}, r"^depth=1.5 with"),
        ({"depth": 2, "detail": "operations"}, r"^depth=2 with detail='operations': expected"),
    ],
)
def test_unknown_details_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InspectionError, match=message):
        inspect.graph(small_transformer(), **options)


# JSON.


def read_back(text: str) -> nx.MultiDiGraph:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    return nx.node_link_graph(json.loads(text, parse_constant=refuse), edges="edges")


def assert_equal(one: nx.MultiDiGraph, other: nx.MultiDiGraph) -> None:
    assert type(one) is type(other)
    assert one.graph == other.graph
    assert list(one.nodes(data=True)) == list(other.nodes(data=True))
    assert list(one.edges(keys=True, data=True)) == list(other.edges(keys=True, data=True))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("detail", ["modules", "operations"])
def test_json_reads_back_to_an_equal_graph(name: str, detail: str) -> None:
    result = inspect.graph(morphed(name), detail=detail)
    assert_equal(read_back(inspect.to_json(result)), result)


def test_json_of_a_model_is_that_of_its_graph() -> None:
    for model in (grown_transformer(), odd(), parts()):
        assert inspect.to_json(model) == inspect.to_json(inspect.graph(model))
    assert [site for _, site in read_back(inspect.to_json(odd())).nodes(data="site") if site] == [
        f"layers.{name}" for name in ODD_NAMES
    ]


@given(
    st.lists(st.text(), min_size=1, max_size=8, unique=True),
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.text())),
)
def test_json_of_random_names(names: list[str], edges: list[tuple[int, int, str]]) -> None:
    result = nx.MultiDiGraph(model=names[0])
    for name in names:
        result.add_node(name, kind="module", target=name, module=name, type=name)
    for source, target, argument in edges:
        result.add_edge(names[source % len(names)], names[target % len(names)], argument=argument)
    assert_equal(read_back(inspect.to_json(result)), result)


def test_json_of_another_graph_is_refused() -> None:
    other = nx.MultiDiGraph()
    other.add_edge("a", "b")
    with pytest.raises(InspectionError, match=r"to_json\(\) was given a graph whose node 'a' has no 'kind'"):
        inspect.to_json(other)
