"""sites="auto": block outputs and residual streams, found by the flow of data alone."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import esper_fx
from esper_fx.errors import BlueprintError, SiteError
from esper_fx.passes.auto_sites import auto_sites
from esper_fx.passes.flow import Flow, observe, of_graph
from esper_fx.passes.pipeline import Draft
from esper_fx.passes.trace import trace
from tests.support.examples import examples
from tests.support.models import residual_cnn, transformer
from tests.support.networks import Description, descriptions


class Branch(nn.Module):
    """A residual block: only the sum cuts the flow."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


class Masked(nn.Module):
    """Blocks that read a mask beside the stream; it is computed, and it can be left out."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Branch() for _ in range(blocks))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        if mask is not None:
            mask = (mask > 0).to(x.dtype).unsqueeze(-1)
        x = self.first(x)
        for block in self.blocks:
            x = block(x if mask is None else x * mask)
        return {"logits": self.head(x)}


class Shortcut(nn.Module):
    """A U: an inner part beside a shortcut over it."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.after = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(torch.cat([x, self.inner(x)], dim=-1))  # type: ignore[no-any-return]


class ByValue(nn.Module):
    """What it does depends on values, so that fake tensors do not do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Branch() for _ in range(3))
        self.head = nn.Linear(8, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        for block in self.blocks:
            if float(x.sum()) > -1e9:
                x = block(torch.dropout(x, 0.5, True))
        return self.head(x)  # type: ignore[no-any-return]


def found(net: nn.Module, *inputs: Tensor, **options: int) -> list[str]:
    return list(esper_fx.morph(net, sites="auto", example_inputs=inputs, **options).seeds)  # type: ignore[arg-type]


def test_the_blocks_of_a_residual_network_are_found() -> None:
    for example, last in ((transformer(), 5), (residual_cnn(), 8)):
        names = found(example.model, *example.inputs)
        assert set(names) <= {f"blocks.{i}" for i in range(last + 1)}
        assert len(names) >= last


def test_a_mask_beside_the_stream_does_not_matter_nor_does_an_output_in_a_dict() -> None:
    expected = ["blocks.0", "blocks.1", "blocks.2"]
    x, mask = torch.randn(2, 5, 8), torch.ones(2, 5)
    assert set(expected) <= set(found(Masked(3), x))
    assert set(found(Masked(3), x, mask)) == set(found(Masked(3), x))


def test_layers_in_a_row_give_one_site_after_each_stretch_of_work() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert found(net, torch.randn(2, 8)) == ["2", "4"]


def test_what_lies_beside_a_shortcut_is_looked_into_if_there_is_nothing_else() -> None:
    assert len(found(Shortcut(), torch.randn(2, 8))) >= 3


def test_a_module_called_several_times_is_one_site() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block, self.last = nn.Linear(8, 8), Branch(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for _ in range(3):
                x = self.block(x)
            return self.last(x)  # type: ignore[no-any-return]

    model = esper_fx.morph(Shared(), sites="auto", example_inputs=(torch.randn(2, 8),))
    assert "block" in model.seeds


class Heads(nn.Module):
    """One norm for queries of four heads and keys of two, without a shortcut around it."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = nn.Linear(8, 16), nn.Linear(8, 8)
        self.norm, self.mlps = Norm(), nn.ModuleList([Mlp(), Mlp()])
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.norm(self.queries(x).unflatten(-1, (-1, 4)).transpose(1, 2))
        keys = self.norm(self.keys(x).unflatten(-1, (-1, 4)).transpose(1, 2)).repeat(1, 2, 1, 1)
        x = self.out((queries * keys).transpose(1, 2).flatten(2))
        for mlp in self.mlps:
            x = mlp(x)
        return x


class Mlp(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.square().mean(-1, keepdim=True))


def test_a_module_whose_values_have_different_numbers_of_features_is_no_site_of_its_own() -> None:
    net, x = Heads(), torch.randn(2, 3, 8)
    assert found(net, x) == ["queries", "keys", "out", "mlps.0"]
    for model in (esper_fx.morph(net, sites="norm", example_inputs=(x,)), esper_fx.morph(net, sites="norm")):
        model(x)
        seed = model.seeds["norm"]
        assert (seed.site.shape, seed.site.odd) == ((2, 4, 3, 4), (2, 2, 3, 4))
        assert seed.fits() == ()
        with pytest.raises(
            BlueprintError, match=r"different numbers of features, such as .*4, 3, 4\) and \(2, 2, 3, 4"
        ):
            seed.germinate("affine")


def test_values_of_other_lengths_are_no_others() -> None:
    layer = nn.Linear(8, 8)
    model = esper_fx.morph(nn.Sequential(layer, nn.Flatten(0, 1), layer, nn.ReLU()), sites="0")
    for length in (3, 5):
        model(torch.randn(2, length, 8))
    assert model.seeds["0"].site.odd is None
    assert "low_rank" in model.seeds["0"].fits()


def test_where_fake_tensors_do_not_do_a_copy_is_called_for_real_and_leaves_no_trace() -> None:
    net, x = ByValue(), torch.randn(2, 8)
    state = torch.get_rng_state()
    assert found(net, x) == ["blocks.0", "blocks.1", "blocks.2"]
    assert float(net.get_buffer("seen")) == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_no_more_sites_than_asked_for_evenly_spread_over_the_work() -> None:
    net, x = Masked(9), torch.randn(2, 5, 8)
    assert len(found(net, x)) >= 9
    few = found(net, x, max_sites=3)
    assert len(few) == 3
    assert few[0] in ("blocks.1", "blocks.2", "blocks.3")
    assert few[-1] == "blocks.8"


def test_without_example_inputs_the_graph_is_enough() -> None:
    example = residual_cnn()
    by_graph = list(esper_fx.morph(example.model, sites="auto").seeds)
    assert by_graph == found(example.model, *example.inputs)


def test_a_model_that_cannot_be_traced_needs_example_inputs() -> None:
    with pytest.raises(
        SiteError, match=r"sites='auto' needs example_inputs here, because Masked\.forward .*mask is None"
    ):
        esper_fx.morph(Masked(2), sites="auto")


def test_a_model_without_a_candidate_is_refused() -> None:
    with pytest.raises(SiteError, match=r"sites='auto' found no place in Sequential .* Name sites instead"):
        esper_fx.morph(nn.Sequential(nn.Linear(4, 4)), sites="auto", example_inputs=(torch.randn(2, 4),))


@given(description=descriptions())
@examples(50)
def test_sites_that_are_found_cut_the_flow_and_are_the_same_each_time(description: Description) -> None:
    net, x = description.build(), description.example().detach()
    flow = observe(net, lambda: net(x))
    modules = dict(net.named_modules())
    names = auto_sites(flow, modules)
    assert names == auto_sites(observe(net, lambda: net(x)), modules)
    assert len(names) == len(set(names))
    reached = nx.descendants(flow.graph, 0) | {0}
    for name in names:
        (first, *_) = flow.modules[name]
        assert first in reached or flow.graph.nodes[first]["work"] > 0
        before = nx.ancestors(flow.graph, first) | {first}
        after = nx.descendants(flow.graph, first)
        assert any(flow.graph.nodes[node]["work"] > 0 for node in before)
        assert any(flow.graph.nodes[node]["work"] > 0 for node in after)


def test_the_work_of_a_call_is_counted_in_floating_point_operations() -> None:
    net = Branch()
    flow = observe(net, lambda: net(torch.randn(3, 8)))
    assert sorted(work for _, work in flow.graph.nodes(data="work") if work) == [2 * 3 * 8 * 16] * 2
    assert set(flow.modules) == {"up", "down"}


def test_writing_in_place_is_part_of_the_flow() -> None:
    def written(x: Tensor) -> Tensor:
        y = torch.zeros(2, 2)
        y[0].add_(x)
        return y * 2

    flow = observe(nn.Module(), lambda: written(torch.ones(2)))
    addition = next(n for n in flow.graph if flow.graph.in_degree(n) >= 1 and flow.shapes[n] == (2,))
    (output,) = flow.outputs
    assert addition in nx.ancestors(flow.graph, output)


def test_the_work_of_a_graph_is_the_number_of_weights() -> None:
    draft = Draft(Branch())
    trace(draft)
    assert sorted(work for _, work in of_graph(draft).graph.nodes(data="work") if work) == [128, 128]


@st.composite
def ladders(draw: st.DrawFn) -> tuple[Flow, set[int]]:
    """A chain of nodes with work and, over some of its stretches, shortcuts; with the nodes that no shortcut passes."""
    length = draw(st.integers(3, 12))
    flow = Flow()
    for node in range(length):
        flow.add([node - 1] if node else [], 1.0)
        flow.modules[f"layer{node}"] = [node]
    cut = set(range(length))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, length - 2))
        end = draw(st.integers(start + 1, length - 1))
        flow.graph.add_edge(start, end)
        cut -= set(range(start + 1, end))
    flow.outputs = {length - 1}
    return flow, cut


class Layer(nn.Module):
    """A module of nobody's library."""


@given(ladder=ladders())
def test_exactly_the_nodes_that_no_shortcut_passes_are_candidates(ladder: tuple[Flow, set[int]]) -> None:
    flow, cut = ladder
    last = max(flow.graph)
    expected = [f"layer{node}" for node in sorted(cut - {last})]
    names = auto_sites(flow, {name: Layer() for name in flow.modules})
    if len(expected) >= 2:
        assert names == expected
    else:
        assert set(expected) <= set(names)
