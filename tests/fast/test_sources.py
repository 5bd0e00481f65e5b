"""The source of a site's value: which sites have one, that it is what the module reads, and that nobody else notices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, fx, nn

import esper_fx
from esper_fx import SiteSpec
from esper_fx.blueprints import get, validate_body
from esper_fx.engine.build import Ambient
from esper_fx.engine.plan import Layout
from esper_fx.errors import BlueprintError, MorphError
from esper_fx.lifecycle import Stage
from esper_fx.passes import partition
from esper_fx.passes.check import check
from esper_fx.passes.find_sites import find_sites
from esper_fx.passes.find_sources import find_sources
from esper_fx.passes.metas import TensorMeta
from esper_fx.passes.pipeline import Draft, Pipeline
from esper_fx.passes.propagate import SEED, is_seed, seed_operands
from esper_fx.passes.record import body_signature, record
from esper_fx.passes.specialize import specialize
from esper_fx.passes.splice import splice
from esper_fx.passes.trace import trace
from esper_fx.site import ConvolutionSpec, SourceSpec
from tests.support import programs
from tests.support.examples import examples
from tests.support.linear_kinds import Conv1D, Convolutional, Mixed, Named, matrices, with_lora
from tests.support.networks import assert_same, run
from tests.support.programs import Instruction, instructions


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def grow(model: esper_fx.MorphableModel, site: str, rank: int = 2, scale: float = 1.0, **options: Any) -> Any:
    """Germinate LoRA with random matrices; returns the matrices."""
    lora = matrices(model.get_submodule(site), rank, scale, seed=len(site))
    model.seeds[site].germinate(
        "low_rank",
        rank=rank,
        reads="input",
        scale=scale,
        weights={"down.weight": lora.down, "up.weight": lora.up},
        **options,
    )
    return lora


class Branching(nn.Module):
    """Cannot be traced, so that its children are scopes of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(4, 4)
        self.transposed = Conv1D(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x) if x.sum() > -1e9 else x
        return self.block(self.transposed(x))


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    net[0].register_forward_hook(lambda module, args, output: output * 2)
    return net


class Moody(nn.Linear):
    """A linear map that cannot be traced, so that it stays Python."""

    def forward(self, input: Tensor) -> Tensor:
        assert float(input.detach().sum()) < 1e9
        return super().forward(input)


def volumes() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 4, 3, padding=1, dilation=1), nn.ReLU(), nn.Conv3d(4, 2, 2, dilation=2))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "tokens": (Mixed, (2, 3, 6), ["first", "keyword", "transposed", "own", "shared", "head.1"]),
    "vectors": (Mixed, (3, 6), ["first", "keyword", "transposed", "own", "shared", "head.1"]),
    "maps": (Convolutional, (2, 4, 9, 9), ["strided", "grouped", "same", "pointwise", "head"]),
    "sequences": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, dilation=2), nn.ReLU()), (2, 4, 9), ["0"]),
    "volumes": (volumes, (2, 2, 5, 5, 5), ["0", "2"]),
    "scopes": (Branching, (3, 4), ["plain", "transposed", "block.0"]),
    "hooks": (hooked, (3, 4), ["0"]),
    "python": (lambda: nn.Sequential(Moody(4, 5), nn.Tanh(), Moody(5, 3)), (3, 4), ["0", "2"]),
}


@pytest.mark.parametrize("name", NETS)
def test_a_body_that_reads_the_input_computes_and_learns_what_lora_does(name: str) -> None:
    make, shape, sites = NETS[name]
    net, x = make(), torch.randn(shape, requires_grad=True)
    model = esper_fx.morph(net, sites=sites, example_inputs=(x.detach(),))
    assert_same(run(model, x)[0], run(net, x)[0])
    loras = {site: grow(model, site, rank=2 + 2 * (i % 2), scale=0.5 + i) for i, site in enumerate(sites)}
    assert {seed.stage for seed in model.seeds.values()} == {Stage.ACTIVE}
    exact = with_lora(net, {site: lora.double() for site, lora in loras.items()}).double()
    x = x.detach().double().requires_grad_()
    expected, gradients = run(exact, x)
    actual, mine = run(model.double(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert set(gradients) <= set(mine)
    for key, gradient in gradients.items():
        torch.testing.assert_close(mine[key], gradient, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["tokens", "scopes", "python"])
def test_a_body_that_reads_the_input_is_kept_by_unmorph(name: str) -> None:
    make, shape, sites = NETS[name]
    net, x = make(), torch.randn(shape)
    model = esper_fx.morph(net, sites=sites, example_inputs=(x,))
    loras = {site: grow(model, site, scale=0.5 + i) for i, site in enumerate(sites)}
    plain = esper_fx.unmorph(model)
    torch.testing.assert_close(plain(x), with_lora(net, loras)(x), rtol=1e-6, atol=1e-6)


def test_a_layer_that_stays_python_has_a_source_where_it_is_given_its_input_by_position() -> None:
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Moody(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    model = esper_fx.morph(Caller(), sites="layer", example_inputs=(torch.randn(2, 4),))
    assert model.seeds["layer"].site.source is None
    model = esper_fx.morph(nn.Sequential(Moody(4, 3)), sites="0", example_inputs=(torch.randn(2, 4),))
    assert model.seeds["0"].site.source == SourceSpec((2, 4), 1)


def test_a_source_is_what_the_module_reads_after_the_seeds_before_it() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    model = esper_fx.morph(net, sites="*", example_inputs=(torch.randn(2, 3),))
    loras = {site: grow(model, site) for site in ("2", "0", "1")}
    x = torch.randn(2, 3)
    torch.testing.assert_close(model(x), with_lora(net, loras)(x))


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (lambda: nn.Linear(3, 4), (2, 7, 3), SourceSpec((2, 7, 3), 2)),
        (lambda: Named(3, 4), (2, 3), SourceSpec((2, 3), 1)),
        (lambda: Conv1D(4, 3), (2, 5, 6, 3), SourceSpec((2, 5, 6, 3), 3, fan_in_fan_out=True)),
        (
            lambda: nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), groups=2),
            (2, 4, 9, 9),
            SourceSpec((2, 4, 9, 9), 1, ConvolutionSpec((3, 1), (2, 2), (1, 0), (1, 1), 2)),
        ),
        (
            lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2),
            (2, 4, 9),
            SourceSpec((2, 4, 9), 1, ConvolutionSpec((3,), (1,), "same", (2,), 1)),
        ),
        (lambda: nn.LayerNorm(3), (2, 3), None),
        (lambda: nn.Sequential(nn.Linear(3, 4)), (2, 3), None),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU()), (2, 3), None),
        (lambda: nn.ConvTranspose2d(4, 4, 3), (2, 4, 5, 5), None),
    ],
    ids=["linear", "own", "transposed", "conv2d", "conv1d", "norm", "block", "block with relu", "conv transpose"],
)
def test_a_site_says_whether_it_has_a_source(
    make: Callable[[], nn.Module], shape: tuple[int, ...], expected: SourceSpec | None
) -> None:
    model = esper_fx.morph(_Around(make()), sites="part", example_inputs=(torch.randn(shape),))
    site = model.seeds["part"].site
    assert site.source == expected
    if expected is not None:
        assert expected.features == shape[expected.feature_dim]
        assert site.feature_dim == (1 if expected.convolution else len(shape) - 1)


class _Around(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) * 1.0


def test_a_node_that_is_called_like_a_linear_module_but_is_not_its_output_has_no_source() -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.act_1 = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.act_1(self.act(self.act(x)))

    model = esper_fx.morph(Names(), sites=lambda n: n.op == "call_module", example_inputs=(torch.randn(2, 4),))
    assert list(model.seeds) == ["act", "act_1", "act_1_"]
    assert [seed.site.source for seed in model.seeds.values()] == [None, None, None]
    only = esper_fx.morph(Names(), sites=lambda n: n.target == "act_1", example_inputs=(torch.randn(2, 4),))
    assert only.seeds["act_1"].site.source == SourceSpec((2, 4), 1)


def test_a_layer_that_is_given_a_constant_is_traced_by_itself_and_has_its_source() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer(torch.ones(2, 4))

    model = esper_fx.morph(Constant(), sites="layer", example_inputs=(torch.randn(2, 4),))
    assert list(model.graphs) == ["layer"]
    assert model.seeds["layer"].site.source == SourceSpec((2, 4), 1)


# Blueprints that read the source.


@pytest.mark.parametrize("site", ["0", "1"])
def test_low_rank_refuses_to_read_an_input_that_is_not_known(site: str) -> None:
    net = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(4, 4)))
    model = esper_fx.morph(net, sites=["0", "1"], example_inputs=(torch.randn(2, 4),))
    wording = (
        f"reads='input' for blueprint 'low_rank' does not fit site '{site}': it is not the output of an nn.Linear, nn.Conv1d, "
        "nn.Conv2d, nn.Conv3d or Conv1D whose input is known. Use reads='output', or another site"
    )
    with pytest.raises(BlueprintError) as error:
        model.seeds[site].germinate("low_rank", reads="input")
    assert str(error.value) == wording
    assert model.seeds[site].stage is Stage.DORMANT
    assert model.seeds[site].body is None


@pytest.mark.parametrize(
    ("config", "wording"),
    [
        ({"reads": "both"}, "reads='both' for blueprint 'low_rank': expected 'output' or 'input'"),
        ({"scale": float("nan")}, "scale=nan for blueprint 'low_rank': expected a finite number"),
        ({"scale": float("-inf")}, "scale=-inf for blueprint 'low_rank': expected a finite number"),
        ({"scale": True}, "scale=True for blueprint 'low_rank': expected a finite number"),
        ({"dropout": 1.0}, "dropout=1.0 for blueprint 'low_rank': expected a number from 0 to below 1"),
        ({"dropout": -0.5}, "dropout=-0.5 for blueprint 'low_rank': expected a number from 0 to below 1"),
        (
            {"reads": "input", "rank": 3},
            "rank=3 for blueprint 'low_rank' at site '0': expected a multiple of the 2 groups",
        ),
    ],
)
def test_low_rank_refuses_parameters_out_of_range(config: dict[str, Any], wording: str) -> None:
    model = esper_fx.morph(
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), sites="0", example_inputs=(torch.randn(2, 4, 5, 5),)
    )
    with pytest.raises(BlueprintError) as error:
        model.seeds["0"].germinate("low_rank", **config)
    assert str(error.value).startswith(wording)


def test_a_fresh_body_that_reads_the_input_is_zero_and_two_layers_learn_from_there() -> None:
    net, x = nn.Sequential(nn.Linear(3, 5)), torch.randn(4, 3)
    model = esper_fx.morph(net, sites="0", example_inputs=(x,))
    model.seeds["0"].germinate("low_rank", rank=2, reads="input", scale=4.0)
    torch.testing.assert_close(model(x), net(x), rtol=0, atol=0)
    body = model.seeds["0"].body
    assert [tuple(p.shape) for p in body.parameters()] == [(2, 3), (5, 2)]
    model(x).square().sum().backward()
    assert body.up.weight.grad.abs().sum() > 0


def test_the_scale_follows_devices_but_is_never_rounded_and_is_no_part_of_the_state_dict() -> None:
    site = SiteSpec("x", (2, 4), torch.bfloat16, torch.device("cpu"), 1, SourceSpec((2, 3), 1))
    body = get("low_rank").build(site, {"reads": "input", "scale": 1.1}, seed=0)
    assert body.scale.dtype == torch.float32
    assert float(body.scale) == pytest.approx(1.1, rel=1e-7)
    assert list(body.state_dict()) == ["down.weight", "up.weight"]
    assert body.down.weight.dtype == torch.bfloat16
    assert body.to("meta").scale.is_meta


def test_a_body_that_reads_the_output_may_be_scaled_and_dropped_too() -> None:
    site = SiteSpec("x", (2, 4), torch.float32, torch.device("cpu"), 1)
    plain = get("low_rank").build(site, {"rank": 2}, seed=0)
    scaled = get("low_rank").build(site, {"rank": 2, "scale": 3.0, "dropout": 0.5}, seed=0)
    scaled.up.weight.data.fill_(1.0)
    plain.up.weight.data.fill_(1.0)
    x = torch.randn(2, 4)
    torch.testing.assert_close(scaled.eval()(x), 3.0 * plain(x))
    assert (scaled.train()(x) != 3.0 * plain(x)).any()


def test_the_cost_of_a_body_is_that_at_the_source() -> None:
    site = SiteSpec("x", (2, 4), torch.float32, torch.device("cpu"), 1, SourceSpec((2, 3), 1))
    cost = get("low_rank").cost(site, rank=5, reads="input")
    assert cost.parameters == 5 * 3 + 4 * 5
    assert cost.flops == 2 * 2 * (5 * 3 + 4 * 5)


class _Reads(nn.Module):
    reads_source = True

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, features)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, source: Tensor) -> Tensor:
        return self.layer(source)


def test_a_blueprint_of_the_users_own_may_read_the_source() -> None:
    @esper_fx.blueprint("test_reads_source", replace=True)
    def reads(site: SiteSpec) -> nn.Module:
        return _Reads(site.features)

    x = torch.randn(2, 3)
    model = esper_fx.morph(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), sites="*", example_inputs=(x,))
    model.seeds["0"].germinate("test_reads_source")
    model.seeds["0"].body.layer.bias.data.fill_(2.0)
    torch.testing.assert_close(model(x), torch.relu(model.get_submodule("0")(x) + 2.0))
    with pytest.raises(
        BlueprintError,
        match="'test_reads_source' built a body that reads the input of the module at its site, which is not known of "
        "site '1': expected the output of a linear map or a convolution",
    ):
        model.seeds["1"].germinate("test_reads_source")
    with pytest.raises(BlueprintError, match="a part of 'sequence', reads the input of the module at site"):
        esper_fx.morph(nn.Sequential(nn.Linear(3, 4)), sites="0", example_inputs=(x,)).seeds["0"].germinate(
            "sequence", parts=["affine", "test_reads_source"]
        )


def test_a_body_that_does_not_fit_the_value_is_refused_with_both_shapes() -> None:
    site = SiteSpec("x", (7, 4), torch.float32, torch.device("cpu"), 1, SourceSpec((7, 3), 1))
    validate_body("mine", _Reads(4), site)
    with pytest.raises(
        BlueprintError,
        match=r"maps an input of shape \[2, 3\] to one of shape \[2, 5\]: expected \[2, 4\], because it is added to the value",
    ):
        validate_body("mine", _Reads(5), site)


# The passes.

splice_seeds = partial(splice, target=lambda s: f"esper.seeds.{s.replace('.', '/')}", alpha="s.alpha", gate="s.gate")
SITES = ["first", "keyword", "transposed", "own", "shared", "head.*"]


def _pipeline(**replaced: Callable[[Draft], Any]) -> Pipeline:
    passes: dict[str, Callable[[Draft], Any]] = {
        "trace": trace,
        "find_sites": lambda d: find_sites(d, sites=SITES, modules=dict(d.root.named_modules())),
        "find_sources": _sound_find_sources,
        "splice": splice_seeds,
    }
    return Pipeline(list({**passes, **replaced}.items()), check)


def _sound_find_sources(draft: Draft) -> bool:
    return find_sources(draft, modules=dict(draft.root.named_modules()))


def seeds_of(draft: Draft, site: str) -> list[fx.Node]:
    assert draft.graph is not None
    return [n for n in draft.graph.nodes if n.op == "call_module" and n.target == draft.seeds[site]]


def test_every_seed_of_a_linear_module_reads_its_visits_source_and_the_others_none() -> None:
    draft = Draft(Mixed())
    records = _pipeline().run(draft)
    assert [record.name for record in records if record.changed] == ["trace", "find_sites", "find_sources", "splice"]
    assert {site: [len(seed.args) for seed in seeds_of(draft, site)] for site in draft.sites} == {
        "first": [4],
        "keyword": [4],
        "transposed": [4],
        "own": [4],
        "shared": [4, 4],
        "head.0": [3],
        "head.1": [4],
    }
    (own,), shared = seeds_of(draft, "own"), seeds_of(draft, "shared")
    assert shared[0].args[3] is own
    assert shared[1].args[3].target == "sin"  # type: ignore[union-attr]
    (head,), (tanh,) = seeds_of(draft, "head.1"), seeds_of(draft, "head.0")
    assert head.args[3] is tanh
    assert not splice_seeds(draft)
    assert not _sound_find_sources(draft)


def _then(sound: Callable[..., Any], damage: Callable[[Draft], None]) -> Callable[[Draft], bool]:
    """A broken twin of a pass: it does what the pass does, and then some damage."""

    def broken(draft: Draft) -> bool:
        sound(draft)
        damage(draft)
        return True

    return broken


def forget_the_source(draft: Draft) -> None:
    (seed,) = seeds_of(draft, "own")
    seed.args = seed.args[:3]


def forget_it_on_one_visit(draft: Draft) -> None:
    seed = seeds_of(draft, "shared")[1]
    seed.args = seed.args[:3]


def take_the_source_of_another_visit(draft: Draft) -> None:
    one, other = seeds_of(draft, "shared")
    other.args = (*other.args[:3], one.args[3])


def take_the_value_for_the_source(draft: Draft) -> None:
    (seed,) = seeds_of(draft, "own")
    seed.args = (*seed.args[:3], seed.args[0])


def read_past_the_seed_of_the_source(draft: Draft) -> None:
    (seed,), (before,) = seeds_of(draft, "head.1"), seeds_of(draft, "head.0")
    assert seed.args[3] is before
    seed.args = (*seed.args[:3], before.args[0])


def give_a_source_to_a_seed_without(draft: Draft) -> None:
    (seed,) = seeds_of(draft, "head.0")
    seed.args = (*seed.args, seeds_of(draft, "own")[0])


def give_two_sources(draft: Draft) -> None:
    (seed,) = seeds_of(draft, "own")
    seed.args = (*seed.args, seed.args[3])


def give_it_by_keyword(draft: Draft) -> None:
    (seed,) = seeds_of(draft, "own")
    seed.args, seed.kwargs = seed.args[:3], {"source": seed.args[3]}


def give_a_constant(draft: Draft) -> None:
    (seed,) = seeds_of(draft, "own")
    seed.args = (*seed.args[:3], 1.0)


@pytest.mark.parametrize(
    "damage",
    [
        forget_the_source,
        forget_it_on_one_visit,
        take_the_source_of_another_visit,
        take_the_value_for_the_source,
        read_past_the_seed_of_the_source,
        give_a_source_to_a_seed_without,
        give_two_sources,
        give_it_by_keyword,
        give_a_constant,
    ],
)
def test_check_rejects_a_splice_that_gets_sources_wrong(damage: Callable[[Draft], None]) -> None:
    with pytest.raises(MorphError):
        _pipeline(splice=_then(splice_seeds, damage)).run(Draft(Mixed()))


def lose_a_visit(draft: Draft) -> None:
    draft.sources["shared"] = draft.sources["shared"][:1]


def exchange_visits(draft: Draft) -> None:
    draft.sources["shared"] = draft.sources["shared"][::-1]


def take_what_is_not_read(draft: Draft) -> None:
    draft.sources["keyword"] = draft.sources["first"]


def take_what_comes_later(draft: Draft) -> None:
    draft.sources["transposed"] = draft.sites["head.1"]


def invent_a_site(draft: Draft) -> None:
    draft.sources["nothing"] = draft.sources["first"]


@pytest.mark.parametrize(
    "damage", [lose_a_visit, exchange_visits, take_what_is_not_read, take_what_comes_later, invent_a_site]
)
def test_check_rejects_a_broken_find_sources(damage: Callable[[Draft], None]) -> None:
    with pytest.raises(MorphError):
        _pipeline(find_sources=_then(_sound_find_sources, damage)).run(Draft(Mixed()))


def test_check_says_what_is_wrong_with_a_source() -> None:
    with pytest.raises(MorphError, match="must read the source '.*' besides its value and the state arrays"):
        _pipeline(splice=_then(splice_seeds, forget_the_source)).run(Draft(Mixed()))
    with pytest.raises(MorphError, match="must read no source besides its value and the state arrays"):
        _pipeline(splice=_then(splice_seeds, give_a_source_to_a_seed_without)).run(Draft(Mixed()))
    with pytest.raises(MorphError, match=r"users \['.*'\] of 'head_0' at site 'head.0' read past its seed"):
        _pipeline(splice=_then(splice_seeds, read_past_the_seed_of_the_source)).run(Draft(Mixed()))
    with pytest.raises(MorphError, match="site 'shared' has 2 visits but 1 sources"):
        _pipeline(find_sources=_then(_sound_find_sources, lose_a_visit)).run(Draft(Mixed()))
    with pytest.raises(MorphError, match="'x', a source of site 'keyword', is not what 'keyword' was made from"):
        _pipeline(find_sources=_then(_sound_find_sources, take_what_is_not_read)).run(Draft(Mixed()))


# The engine's graphs.


def _without_sources(module: fx.GraphModule) -> fx.GraphModule:
    for node in module.graph.nodes:
        if is_seed(node):
            node.args = node.args[:6]
    return module


@examples(20)
@given(instructions())
def test_dormant_seeds_with_sources_cost_nothing(program: tuple[Instruction, ...]) -> None:
    """The kernels and what they take are those of the same program without sources, and no source waits for a seed."""
    ambient, args = Ambient.current(), programs.arguments(program)
    layout = Layout(programs.build(program), args, ambient, blocks=True)
    bare = Layout(_without_sources(programs.build(program)), args, ambient, blocks=True)
    dormant: tuple[None, ...] = (None,) * len(layout.slots)
    (mine,), (theirs,) = (each.variants(each.plans[0], dormant) for each in (layout, bare))  # type: ignore[misc]
    assert mine.key == theirs.key
    for plan in layout.plans:
        for region, variant in zip(plan.regions, layout.variants(plan, dormant) or (), strict=True):
            read = [n for n in variant.module.graph.nodes if n.op == "placeholder" and n.users]
            needed = [n for n in region.template.graph.nodes if n.op == "placeholder" and _is_read(n)]
            assert len(read) == len(needed) == len(region.inputs)


def _is_read(node: fx.Node) -> bool:
    """Whether somebody reads a value other than as a seed's source."""
    return any(not is_seed(user) or seed_operands(user)[0] is node for user in node.users)


@examples(20)
@given(instructions())
def test_no_cut_parts_a_seed_from_what_else_reads_its_source(program: tuple[Instruction, ...]) -> None:
    layout = Layout(programs.build(program), programs.arguments(program), Ambient.current(), blocks=True)
    for plan in layout.plans:
        for region in plan.regions:
            for seed in filter(is_seed, region.template.graph.nodes):
                value, source = seed_operands(seed)
                assert source is None or _is_read(source)
                assert source is None or value.op != "placeholder"


def test_a_cut_is_illegal_between_the_last_reader_of_the_source_and_the_seed() -> None:
    graph = fx.Graph()
    x = graph.call_function(torch.neg, (graph.placeholder("x"),))
    one = graph.call_function(torch.sin, (x,))
    two = graph.call_function(torch.cos, (one,))
    seed = graph.call_function(SEED, (two, two, two, 0, 0, True, x))
    graph.output((graph.call_function(torch.tanh, (seed,)),))
    layout = Layout(fx.GraphModule(nn.Module(), graph), [torch.randn(2, 4)], Ambient.current(), blocks=False)
    flow = partition.analyse(layout.module.graph, partition.Effects())
    legal = {node.name: legal for node, legal in zip(flow.nodes, flow.legal, strict=False)}
    assert legal == {"neg": True, "sin": True, "cos": False, seed.name: False, "tanh": True}


VECTORS = TensorMeta((2, 4), (4, 1), torch.float64, torch.device("cpu"), True)
NARROW = TensorMeta((2, 3), (3, 1), torch.float64, torch.device("cpu"), True)


class _Body(nn.Module):
    def __init__(self, reads_source: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.reads_source = reads_source

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_record_knows_what_its_body_reads() -> None:
    same, other = (record(_Body(flag).double(), VECTORS, training=True) for flag in (False, True))
    assert (same.reads_source, other.reads_source) == (False, True)
    assert same.identity != other.identity
    assert body_signature(_Body(False)) != body_signature(_Body(True))


def test_bodies_that_differ_in_scale_alone_share_their_kernels_and_others_do_not() -> None:
    site = SiteSpec("x", (2, 4), torch.float64, torch.device("cpu"), 1, SourceSpec((2, 3), 1))

    def identity(**config: Any) -> str:
        body = get("low_rank").build(site, {"reads": "input", **config}, seed=0)
        return record(body, NARROW, training=True).identity

    assert identity(scale=0.5) == identity(scale=2.0)
    assert len({identity(), identity(rank=4), identity(dropout=0.5), identity(activation="relu")}) == 4


@pytest.mark.parametrize("live", [True, False])
def test_a_live_seed_reads_the_source_in_its_region_and_a_dormant_one_nothing(live: bool) -> None:
    graph = fx.Graph()
    x, source = graph.placeholder("x"), graph.placeholder("source")
    seed = graph.call_function(SEED, (x, x, x, 0, 0, True, source))
    graph.output((graph.call_function(torch.sin, (seed,)),))
    body = get("low_rank").build(
        SiteSpec("x", (2, 4), torch.float64, torch.device("cpu"), 1, SourceSpec((2, 3), 1)),
        {"reads": "input", "rank": 2, "scale": 0.5},
        seed=0,
    )
    nn.init.normal_(body.up.weight)
    module = fx.GraphModule(nn.Module(), specialize(graph, [record(body, NARROW, training=True) if live else None]))
    value, origin = (torch.randn(m.shape, dtype=m.dtype, requires_grad=True) for m in (VECTORS, NARROW))
    tensors = [torch.tensor(2.0), torch.tensor(0.25), *body.parameters(), *body.buffers()] if live else []
    (result,) = module(value, origin, *tensors)
    delta = 0.5 * (origin @ body.down.weight.T @ body.up.weight.T)
    torch.testing.assert_close(result, torch.sin(value + 2.0 * delta if live else value))
    result.sum().backward()
    upstream = torch.cos(value + 2.0 * delta if live else value).detach()
    torch.testing.assert_close(value.grad, upstream)
    expected = 0.25 * 2.0 * 0.5 * upstream @ body.up.weight @ body.down.weight
    torch.testing.assert_close(origin.grad, expected if live else None)


def test_a_slot_knows_the_value_and_the_source_and_hands_each_body_what_it_reads() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    product = graph.call_function(torch.matmul, (x, weight))
    graph.output((graph.call_function(SEED, (product, product, product, 5, 3, True, x)),))
    inputs = [torch.randn(2, 3), torch.randn(3, 4)]
    (slot,) = Layout(fx.GraphModule(nn.Module(), graph), inputs, Ambient.current(), blocks=False).slots
    assert (slot.model, slot.site, slot.training) == (5, 3, True)
    assert slot.source is not None
    assert (slot.value.shape, slot.source.shape) == ((2, 4), (2, 3))
    assert slot.input_of(_Body(False)) == slot.value
    assert slot.input_of(_Body(True)) == slot.source
