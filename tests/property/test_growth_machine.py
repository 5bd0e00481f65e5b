"""Random lives of several seeds in a small eager model, against a model of the rules that is written down here anew."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import esper_fx
import esper_fx.blueprints
from esper_fx.errors import EsperError, LifecycleError
from esper_fx.lifecycle import Stage
from tests.support.examples import examples

SITES = ("a", "b", "c")
EMBARGO = 3
# What may follow, by the verb that asks for it; the passing of time is in `_tick`.
ALLOWED = {
    "germinate": {"DORMANT"},
    "blend": {"INCUBATING", "ACTIVE"},
    "fossilize": {"ACTIVE"},
    "prune": {"INCUBATING", "BLENDING", "ACTIVE"},
}
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("low_rank", {"rank": 2}),
    ("low_rank", {"rank": 3, "activation": "relu"}),
    ("bottleneck", {"width": 2}),
)
site_names = st.sampled_from(SITES)


class Net(nn.Module):
    """c(b(a(x)) + a(x)), and `a` is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        return self.c(self.b(hidden) + self.a(hidden))


class Expected:
    """What one seed should be."""

    def __init__(self) -> None:
        self.stage = "DORMANT"
        self.alpha = 0.0
        self.gate = 0.0
        self.germinations = 0
        self.until = 0
        self.blend: tuple[float, float, int, int, str] | None = None  # from, to, steps, since, schedule
        self.kind: tuple[str, dict[str, Any]] | None = None
        self.weights: dict[str, Tensor] = {}
        self.events: list[tuple[int, str, str]] = []

    def move(self, clock: int, stage: str) -> None:
        self.events.append((clock, self.stage, stage))
        self.stage = stage


class Lives(RuleBasedStateMachine):
    """Everything a user may do, in any order."""

    @initialize()
    def begin(self) -> None:
        self.embargo = esper_fx.configure(embargo_steps=EMBARGO, incubation_alpha=0.5)
        torch.manual_seed(0)
        self.net = Net().double()
        self.x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
        self.model = esper_fx.morph(self.net, sites=list(SITES), example_inputs=(self.x,))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        esper_fx.attach(self.optimizer, self.model)
        self.expected = {site: Expected() for site in SITES}
        self.clock = 0

    def teardown(self) -> None:
        if hasattr(self, "embargo"):
            self.embargo.__exit__(None, None, None)

    # What a user does.

    def _may(self, verb: str) -> list[str]:
        """The sites at which it is legal now."""
        return [site for site, expected in self.expected.items() if expected.stage in ALLOWED[verb]]

    def _choose(self, data: st.DataObject, verb: str) -> tuple[esper_fx.KasminaSeed, Expected]:
        site = data.draw(st.sampled_from(self._may(verb)), label="site")
        return self.model.seeds[site], self.expected[site]

    def _observed(self) -> Any:
        seeds = self.model.seeds.values()
        return (
            repr([self.model.state.rows(seed.index) for seed in seeds]),
            [(seed.stage, id(seed.body), seed.blueprint, seed.live) for seed in seeds],
            list(self.model.ledger),
            [id(parameter) for parameter in self.optimizer.param_groups[0]["params"]],
        )

    @precondition(lambda self: self._may("germinate"))
    @rule(
        data=st.data(),
        kind=st.sampled_from(KINDS),
        alpha=st.none() | st.sampled_from([0.0, 0.25]),
        trained=st.booleans(),
    )
    def germinate(
        self, data: st.DataObject, kind: tuple[str, dict[str, Any]], alpha: float | None, trained: bool
    ) -> None:
        seed, expected = self._choose(data, "germinate")
        blueprint, config = kind
        extra: dict[str, Any] = {} if alpha is None else {"alpha": alpha}
        if trained:
            fresh = esper_fx.blueprints.get(blueprint).build(seed.site, config, seed=1)
            extra["weights"] = {name: torch.full_like(value, 0.25) for name, value in fresh.state_dict().items()}
        seed.germinate(blueprint, **extra, **config)
        expected.kind = kind
        expected.germinations += 1
        expected.alpha = alpha if alpha is not None else 1.0 if trained else 0.5
        expected.gate = 1.0 if trained else 0.0
        expected.blend = None
        expected.move(self.clock, "GERMINATING")
        expected.move(self.clock, "ACTIVE" if trained else "INCUBATING")

    @rule(
        site=site_names,
        config=st.sampled_from([{"rank": 0}, {"wrong": 1}, {"rank": 2, "weights": {"no": torch.ones(1)}}]),
    )
    def germinate_badly(self, site: str, config: dict[str, Any]) -> None:
        before = self._observed()
        with pytest.raises(EsperError):
            self.model.seeds[site].germinate("low_rank", **config)
        assert self._observed() == before

    @precondition(lambda self: self._may("blend"))
    @rule(
        data=st.data(),
        to=st.sampled_from([0.0, 0.5, 1.0, -1.0]),
        steps=st.integers(0, 4),
        schedule=st.sampled_from(["linear", "cosine", "constant"]),
    )
    def blend(self, data: st.DataObject, to: float, steps: int, schedule: str) -> None:
        seed, expected = self._choose(data, "blend")
        seed.blend(to=to, steps=steps, schedule=schedule)
        expected.blend = (expected.alpha, to, steps, self.clock, schedule)
        expected.gate = 1.0
        expected.move(self.clock, "BLENDING")

    @precondition(lambda self: self._may("fossilize"))
    @rule(data=st.data())
    def fossilize(self, data: st.DataObject) -> None:
        seed, expected = self._choose(data, "fossilize")
        seed.fossilize()
        expected.move(self.clock, "FOSSILIZED")

    @precondition(lambda self: self._may("prune"))
    @rule(data=st.data())
    def prune(self, data: st.DataObject) -> None:
        seed, expected = self._choose(data, "prune")
        seed.prune()
        expected.alpha = expected.gate = 0.0
        expected.blend = expected.kind = None
        expected.until = self.clock + EMBARGO
        expected.move(self.clock, "EMBARGOED")

    @rule()
    def everything_illegal_is_refused_and_changes_nothing(self) -> None:
        before = self._observed()
        actions: dict[str, Any] = {
            "germinate": lambda seed: seed.germinate("low_rank"),
            "blend": lambda seed: seed.blend(),
            "fossilize": lambda seed: seed.fossilize(),
            "prune": lambda seed: seed.prune(),
        }
        for verb, action in actions.items():
            for site in set(SITES) - set(self._may(verb)):
                wording = f"the seed at '{site}' is {self.expected[site].stage} and cannot become"
                with pytest.raises(LifecycleError, match=wording):
                    action(self.model.seeds[site])
        assert self._observed() == before

    @rule(steps=st.integers(1, 4))
    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(self.x).square().sum().backward()
            self.optimizer.step()
            self._tick()

    @precondition(lambda self: any(e.stage in ALLOWED["prune"] for e in self.expected.values()))
    @rule(wrong=st.floats(-1, 1))
    def disturb(self, wrong: float) -> None:
        """Give all bodies parameters that matter: at birth they are the zero map."""
        with torch.no_grad():
            for seed in self.model.seeds.values():
                for number, parameter in enumerate([] if seed.body is None else seed.body.parameters()):
                    ramp = torch.linspace(-1, 1, parameter.numel(), dtype=torch.float64)
                    parameter.copy_((ramp * (1 + number) + wrong).reshape(parameter.shape))

    @rule()
    def evaluate(self) -> None:
        """A forward without a step moves nothing but what is computed."""
        before = self._observed()
        with torch.no_grad():
            self.model(self.x)
        assert self._observed() == before

    # What time does.

    def _tick(self) -> None:
        self.clock += 1
        for expected in self.expected.values():
            if expected.blend is not None:
                frm, to, steps, since, schedule = expected.blend
                part = min(1.0, (self.clock - since) / steps) if steps else 1.0
                if schedule == "constant" or part >= 1.0:
                    expected.alpha, expected.blend = to, None
                else:
                    part = part if schedule == "linear" else (1 - math.cos(math.pi * part)) / 2
                    expected.alpha = frm + (to - frm) * part
                if expected.blend is None:
                    expected.move(self.clock, "ACTIVE")
        for expected in self.expected.values():
            if expected.stage == "EMBARGOED" and self.clock >= expected.until:
                expected.move(self.clock, "DORMANT")

    # What must always hold.

    @invariant()
    def stages_and_state_follow_the_rules(self) -> None:
        assert self.model.clock == self.clock
        for site, expected in self.expected.items():
            seed = self.model.seeds[site]
            assert seed.stage.name == expected.stage
            assert seed.alpha == pytest.approx(expected.alpha, abs=1e-6)
            assert self.model.state.read("gate", seed.index) == expected.gate
            assert self.model.state.read("germinations", seed.index) == expected.germinations
            assert seed.blueprint == (None if expected.kind is None else expected.kind[0])
            assert (seed.body is not None) == (expected.kind is not None) == seed.live
            assert seed.error is None

    @invariant()
    def the_ledger_holds_every_move_in_order(self) -> None:
        events = list(self.model.ledger)
        assert [event.step for event in events] == sorted(event.step for event in events)
        for site, expected in self.expected.items():
            mine = [(e.step, e.frm.name, e.to.name) for e in events if e.site == site]
            assert mine == expected.events

    @invariant()
    def the_morphology_holds_the_bodies(self) -> None:
        alive = {site: e.kind for site, e in self.expected.items() if e.kind is not None}
        bodies = self.model.morphology.bodies
        assert {(site, blueprint) for site, blueprint, _ in bodies} == {(s, k[0]) for s, k in alive.items()}
        for site, blueprint, key in bodies:
            kind = alive[site]
            assert key == esper_fx.blueprints.get(blueprint).config_key(kind[1])
        assert hash(self.model.morphology) == hash(self.model.morphology)

    @invariant()
    def the_optimizer_holds_the_hosts_and_the_living(self) -> None:
        bodies = [seed.body for seed in self.model.seeds.values() if seed.body is not None]
        wanted = [*self.net.parameters(), *(p for body in bodies for p in body.parameters())]
        held = self.optimizer.param_groups[0]["params"]
        assert sorted(map(id, held)) == sorted(map(id, wanted))
        assert {id(p) for p in self.optimizer.state} <= {id(p) for p in wanted}
        assert [id(p) for p in self.model.parameters()] == [id(p) for p in wanted]

    @invariant()
    def output_and_gradients_are_those_of_the_model_written_by_hand(self) -> None:
        x = self.x.clone().requires_grad_()
        actual = torch.autograd.grad((y := self.model(x)).square().sum(), [x, *self.net.parameters()])
        other = self.x.clone().requires_grad_()
        wanted = torch.autograd.grad((z := self._by_hand(other)).square().sum(), [other, *self.net.parameters()])
        torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-12)
        for mine, theirs in zip(actual, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)

    def _by_hand(self, x: Tensor) -> Tensor:
        def grow(site: str, value: Tensor) -> Tensor:
            seed, expected = self.model.seeds[site], self.expected[site]
            if expected.kind is None or seed.alpha == 0:
                return value
            assert seed.body is not None
            inner = value * expected.gate + value.detach() * (1 - expected.gate)
            grown: Tensor = value + seed.alpha * seed.body(inner)
            return grown

        hidden = grow("a", self.net.a(x))
        return grow("c", self.net.c(grow("b", torch.tanh(hidden)) + grow("a", self.net.a(hidden))))


TestLives = Lives.TestCase
TestLives.settings = settings(examples(15), stateful_step_count=25)


def test_a_failure_quarantines_the_seed_and_training_goes_on() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    model = esper_fx.morph(net, sites="0", example_inputs=(torch.randn(2, 4),))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    esper_fx.attach(optimizer, model)
    with esper_fx.configure(embargo_steps=2):
        seed = model.seeds["0"]
        seed.germinate("low_rank")
        model.growth.fail(seed, RuntimeError("it broke\nin two lines"))
    assert seed.stage == Stage.EMBARGOED
    assert str(seed.error) == "it broke\nin two lines"
    assert (seed.body, seed.alpha, model.state.read("error_count", 0)) == (None, 0.0, 1)
    assert len(optimizer.param_groups[0]["params"]) == 2
    assert [(e.frm.name, e.to.name) for e in model.ledger][-2:] == [("INCUBATING", "ERROR"), ("ERROR", "EMBARGOED")]
    assert model.ledger[-2].why == "RuntimeError: it broke"
    x = torch.randn(2, 4)
    assert torch.equal(model(x), net(x))
    for _ in range(2):
        model(x).sum().backward()
        optimizer.step()
    assert seed.stage == Stage.DORMANT
    seed.germinate("low_rank")
    assert seed.error is None
