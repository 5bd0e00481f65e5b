"""Random networks live random lives: whatever is edited, the model computes what the network with its bodies does.

The reference knows nothing of graphs: it is the original network, which shares its parameters with the model, with a
forward hook for every live seed that spells out what a seed computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import assume, given, target
from hypothesis import strategies as st
from torch import Tensor, nn

import esper_fx
from esper_fx.errors import SiteError
from esper_fx.lifecycle import HAS_BODY, Stage
from tests.support.examples import property_examples
from tests.support.growing import classes_of_ours, randomize, run_by_tensor
from tests.support.networks import Description, Network, descriptions, possible_sites

Edit = tuple[Any, ...]
BLUEPRINTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("low_rank", {"rank": 2}),
    ("affine", {}),
    ("bottleneck", {"width": 2}),
    ("channel_gate", {}),
    ("sequence", {"parts": ["affine", ("low_rank", {"rank": 1})]}),
    ("depthwise_conv", {}),
)
LEGAL: dict[str, frozenset[Stage]] = {
    "germinate": frozenset({Stage.DORMANT}),
    "blend": frozenset({Stage.INCUBATING, Stage.ACTIVE}),
    "fossilize": frozenset({Stage.ACTIVE}),
    "prune": HAS_BODY - {Stage.FOSSILIZED},
    "fail": HAS_BODY,
}
which = st.integers(0, 11)
germinate = st.tuples(st.just("germinate"), which, which, st.sampled_from([1.0, 0.5, 0.0, 1.0]))
blend = st.tuples(st.just("blend"), which, st.sampled_from([1.0, -0.25, 0.0]), st.integers(0, 3))
train = st.tuples(st.just("train"), st.integers(1, 3))
edits = st.lists(
    st.one_of(
        germinate,
        germinate,
        germinate,
        blend,
        blend,
        train,
        train,
        st.tuples(st.sampled_from(["fossilize", "prune", "fail"]), which),
        st.tuples(st.just("mode"), st.booleans()),
    ),
    min_size=3,
    max_size=12,
)


class Reference(nn.Module):
    """The network and the live bodies, put together by hooks."""

    def __init__(self, net: nn.Module, model: esper_fx.MorphableModel) -> None:
        super().__init__()
        self.net = net
        self.seeds = [seed for seed in model.seeds.values() if seed.live]
        self.bodies = nn.ModuleList(seed.body for seed in self.seeds if seed.body is not None)

    def forward(self, x: Tensor) -> Any:
        handles = [self.net.get_submodule(seed.name).register_forward_hook(_hook(seed)) for seed in self.seeds]
        try:
            return self.net(x)
        finally:
            for handle in handles:
                handle.remove()


def _hook(seed: esper_fx.KasminaSeed) -> Any:
    alpha = float(seed.growth.state.alpha[seed.index])
    apart = seed.stage == Stage.INCUBATING

    def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        assert seed.body is not None
        return y + alpha * seed.body(y.detach() if apart else y) if alpha else y

    return hook


class Life:
    """A network, its model, and edits of it."""

    def __init__(self, description: Description, sites: list[str]) -> None:
        self.net = description.build().double()
        self.x = description.example().detach().double().requires_grad_()
        assume(any(True for _ in self.net.parameters()))
        self.model = esper_fx.morph(self.net, sites=sites, example_inputs=(self.x,))
        self.model(self.x)  # sites that example inputs do not reach
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        esper_fx.attach(self.optimizer, self.model)
        self.graphs = {scope: str(graph) for scope, graph in self.model.graphs.items()}
        self.sites = [name for name, seed in self.model.seeds.items() if seed._spec is not None]
        self.done = 0

    def edit(self, edit: Edit) -> bool:
        """Make an edit at one of the sites where it is legal now; returns whether there was one."""
        kind, *arguments = edit
        if kind == "train":
            for _ in range(arguments[0]):
                self.step()
            return True
        if kind == "mode":
            self.net.train(arguments[0])
            self.model.train(arguments[0])
            return True
        able = [name for name in self.sites if self.model.seeds[name].stage in LEGAL[kind]]
        if not able:
            return False
        seed = self.model.seeds[able[arguments[0] % len(able)]]
        if kind == "germinate":
            fitting = [(name, config) for name, config in BLUEPRINTS if name in seed.fits()]
            name, config = fitting[arguments[1] % len(fitting)]
            seed.germinate(name, alpha=arguments[2], **config)
            assert seed.body is not None
            randomize(seed.body, self.done)
        elif kind == "blend":
            seed.blend(to=arguments[1], steps=arguments[2], schedule="linear")
        elif kind == "fossilize":
            seed.fossilize()
        elif kind == "prune":
            seed.prune()
        else:
            self.model.growth.fail(seed, RuntimeError("a random failure"))
        self.done += 1
        return True

    def step(self) -> None:
        """One training step; too large gradients are made smaller, so that numbers stay numbers."""
        self.optimizer.zero_grad()
        result = self.model(self.x)
        loss = sum(value.square().mean() for value in (result if isinstance(result, tuple) else (result,)))
        assert isinstance(loss, Tensor)
        if loss.requires_grad and bool(loss.isfinite()):
            loss.backward()
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def check_computation(life: Life) -> None:
    """Outputs to the bit, gradients to rounding; to the bit as well while nothing is live."""
    reference = Reference(life.net, life.model)
    outputs, gradients = run_by_tensor(life.model, life.x)
    expected, expected_gradients = run_by_tensor(reference, life.x)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0, equal_nan=True)
    assert_gradients_close(gradients, expected_gradients, exact=not reference.seeds)


def assert_gradients_close(actual: Mapping[int, Tensor], expected: Mapping[int, Tensor], *, exact: bool) -> None:
    """Sums may be made in another order; a gradient that is missing is zero."""
    for key in actual.keys() | expected.keys():
        mine, theirs = actual.get(key), expected.get(key)
        if mine is None or theirs is None:
            given = mine if mine is not None else theirs
            assert given is not None
            assert not exact
            assert not given.count_nonzero()
        elif exact:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
        else:
            scale = float(theirs.nan_to_num(0, 0, 0).abs().max()) if theirs.numel() else 0.0
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * (1 + scale), equal_nan=True)


def _identities(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Which tensors a model holds, and how often each was written to."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: (id(tensor), tensor._version) for name, tensor in tensors}


def check_unmorph(life: Life) -> None:
    """The plain model computes the same, and folded nearly the same, whatever stage its seeds are in."""
    model = life.model
    before = _identities(model)
    plain, folded = esper_fx.unmorph(model), esper_fx.unmorph(model, fold=True)
    assert _identities(model) == before
    assert classes_of_ours(plain) == classes_of_ours(folded) == []
    outputs, gradients = run_by_tensor(plain, life.x)
    expected, expected_gradients = run_by_tensor(model, life.x)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0, equal_nan=True)
    live = [seed for seed in model.seeds.values() if seed.live]
    if all(seed.stage != Stage.INCUBATING for seed in live):
        assert_gradients_close(gradients, expected_gradients, exact=not live)
    for mine, theirs in zip(run_by_tensor(folded, life.x)[0], expected, strict=True):
        scale = float(theirs.nan_to_num(0, 0, 0).abs().max())
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * (1 + scale), equal_nan=True)
    kept = sum(seed.alpha != 0 for seed in live)
    assert sum("grown" in name for name in _outcomes(plain)) == kept
    assert sum("grown" in name or "folded" in name for name in _outcomes(folded)) == kept
    if not kept:
        assert type(plain) is Network
        tensors = life.net.state_dict(keep_vars=True)
        assert {name: id(t) for name, t in plain.state_dict(keep_vars=True).items()} == {
            name: id(t) for name, t in tensors.items()
        }


def _outcomes(plain: nn.Module) -> list[str]:
    lineage: Any = plain.lineage
    return [entry["outcome"] for entry in lineage["sites"]]


@contextmanager
def lives(description: Description, data: st.DataObject) -> Iterator[Life]:
    """A life at some of the possible sites, whose embargoes are short."""
    names = possible_sites(description.build())
    chosen = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1, max_size=8), label="sites")
    with esper_fx.configure(embargo_steps=1):
        try:
            life = Life(description, chosen)
        except SiteError:  # none of them is ever called
            life = Life(description, names)
        assume(life.sites)
        yield life


@property_examples()
@given(descriptions(wide=True), edits, st.data())
def test_whatever_is_edited_the_model_computes_what_network_and_bodies_do(
    description: Description, todo: list[Edit], data: st.DataObject
) -> None:
    with lives(description, data) as life:
        check_computation(life)
        for edit in todo:
            if life.edit(edit):
                check_computation(life)
        assert {scope: str(graph) for scope, graph in life.model.graphs.items()} == life.graphs
        target(float(life.done), label="edits that were legal")


@property_examples()
@given(descriptions(wide=True), edits, st.data())
def test_at_any_time_of_any_life_unmorph_gives_the_same_function(
    description: Description, todo: list[Edit], data: st.DataObject
) -> None:
    with lives(description, data) as life:
        for edit in todo:
            life.edit(edit)
        check_unmorph(life)
        target(float(sum(seed.live for seed in life.model.seeds.values())), label="live seeds")


@property_examples()
@given(descriptions(wide=True), edits, st.data())
def test_when_all_is_pruned_nothing_is_left_of_it(
    description: Description, todo: list[Edit], data: st.DataObject
) -> None:
    with lives(description, data) as life:
        for edit in todo:
            if edit[0] != "fossilize":
                life.edit(edit)
        for seed in life.model.seeds.values():
            if seed.stage in HAS_BODY:
                seed.prune()
        life.step()
        life.step()
        assert all(s.stage == Stage.DORMANT and s.body is None and not s.live for s in life.model.seeds.values())
        assert len(life.model.morphology) == 0
        check_computation(life)
        check_unmorph(life)
        held = [id(p) for group in life.optimizer.param_groups for p in group["params"]]
        assert held == [id(p) for p in life.net.parameters()]
        assert {id(p) for p in life.optimizer.state} <= set(held)
