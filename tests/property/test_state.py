"""Any interleaving of schedules, clocks, moves, copies and checkpoints, against a closed form in float64."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from esper_fx.lifecycle import Stage
from esper_fx.state import FIELDS, MAX_SCHEDULE_STEPS, KasminaStateLayout
from tests.support.states import KINDS, WithMirror, new_state

alphas = st.floats(-100, 100, width=32, allow_subnormal=False)


@dataclass
class Plan:
    """The reference: one schedule, in plain Python and float64."""

    frm: float
    to: float
    steps: int
    kind: str
    since: int

    def ended(self, now: int) -> bool:
        return self.kind == "constant" or now - self.since >= self.steps

    def alpha(self, now: int) -> float:
        if self.ended(now):
            return self.to
        p = max(now - self.since, 0) / self.steps
        return self.frm + (self.to - self.frm) * (p if self.kind == "linear" else 0.5 * (1 - math.cos(math.pi * p)))

    def tolerance(self) -> float:
        return 1e-6 * max(abs(self.frm), abs(self.to)) + 1e-37


plans = st.builds(
    Plan,
    frm=alphas,
    to=alphas,
    steps=st.integers(0, 300) | st.integers(0, MAX_SCHEDULE_STEPS),
    kind=st.sampled_from(KINDS),
    since=st.integers(0, 2**40),
)


@given(plan=plans, fractions=st.lists(st.floats(0, 1.1), max_size=5))
def test_alpha_follows_its_schedule_and_arrives_once(plan: Plan, fractions: list[float]) -> None:
    state = new_state(1)
    state.write(0, alpha=plan.frm)
    state.schedule_alpha(0, to=plan.to, steps=plan.steps, schedule=plan.kind, now=plan.since)
    times = [*(int(fraction * plan.steps) for fraction in fractions), max(plan.steps - 1, 0), plan.steps]
    running = True
    for elapsed in sorted(times):
        now = plan.since + elapsed
        ends = running and plan.ended(now)
        running = running and not ends
        assert state.advance(now) == ([0] if ends else [])
        assert state.read("alpha", 0) == pytest.approx(plan.alpha(now), rel=0, abs=plan.tolerance())
        assert int(state.step) == now
    assert state.read("alpha", 0) == plan.to
    assert state.read("schedule", 0) == 255


# Any interleaving of everything.


class Interleaving(RuleBasedStateMachine):
    """Several seeds, a clock, and moves, copies and checkpoints in between; the reference is Python numbers."""

    @initialize(n=st.integers(1, 4), kind=st.sampled_from([KasminaStateLayout, WithMirror]))
    def begin(self, n: int, kind: type[KasminaStateLayout]) -> None:
        self.n, self.now = n, 0
        self.state = new_state(n, kind)
        self.plans: dict[int, Plan] = {}
        born = {field: value for field, (_, value) in FIELDS.items()}
        self.rows: list[dict[str, Any]] = [dict(born) for _ in range(n)]

    @rule(data=st.data(), to=alphas, steps=st.integers(0, 12), kind=st.sampled_from(KINDS))
    def schedule(self, data: st.DataObject, to: float, steps: int, kind: str) -> None:
        i = data.draw(st.integers(0, self.n - 1))
        frm = float(self.state.read("alpha", i))
        self.state.schedule_alpha(i, to=to, steps=steps, schedule=kind, now=self.now)
        self.plans[i] = Plan(frm, to, steps, kind, self.now)

    @rule(ticks=st.integers(0, 8))
    def tick(self, ticks: int) -> None:
        self.now += ticks
        ended = sorted(i for i, plan in self.plans.items() if plan.ended(self.now))
        assert self.state.advance(self.now) == ended
        for i, plan in self.plans.items():
            self.rows[i]["alpha"] = pytest.approx(plan.alpha(self.now), rel=0, abs=plan.tolerance())
        for i in ended:
            self.rows[i]["alpha"] = self.plans.pop(i).to

    @rule(data=st.data(), alpha=alphas)
    def set_alpha(self, data: st.DataObject, alpha: float) -> None:
        i = data.draw(st.integers(0, self.n - 1))
        self.state.write(i, alpha=alpha)
        self.plans.pop(i, None)
        self.rows[i]["alpha"] = alpha

    @rule(
        data=st.data(),
        values=st.fixed_dictionaries(
            {},
            optional={
                "stage": st.sampled_from(Stage),
                "blueprint": st.integers(-1, 2**31 - 1),
                "gate": st.sampled_from([0.0, 1.0]),
                "health": st.floats(width=32),
                "error_count": st.integers(0, 9),
                "stage_since": st.integers(0, 2**60),
                "embargo_until": st.integers(0, 30),
                "germinations": st.integers(0, 9),
            },
        ),
    )
    def write(self, data: st.DataObject, values: dict[str, Any]) -> None:
        i = data.draw(st.integers(0, self.n - 1))
        self.state.write(i, **values)
        self.rows[i].update(values)

    @rule(dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
    def cast(self, dtype: torch.dtype) -> None:
        before = self.state.generation
        self.state.to(dtype)
        self.state.type(dtype)
        assert self.state.generation == before

    @rule(device=st.sampled_from(["cpu", "meta"]))
    def move(self, device: str) -> None:
        changes = self.state.step.device.type != device
        before = self.state.generation
        self.state.to_empty(device=device) if changes else self.state.to(device)
        assert (self.state.generation > before) == changes
        assert self.state.step.device.type == device

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def replace_by_copy(self, how: str) -> None:
        old = self.state
        self.state = copy.deepcopy(old) if how == "deepcopy" else pickle.loads(pickle.dumps(old))
        assert self.state.generation > old.generation
        old.write(0, alpha=-7.0, stage=Stage.ERROR)  # must not show in the copy

    @rule(assign=st.booleans(), widened=st.booleans())
    def replace_by_checkpoint(self, assign: bool, widened: bool) -> None:
        if self.state.step.is_meta:
            return
        saved = {name: tensor.clone() for name, tensor in self.state.state_dict().items()}
        if widened:
            saved = {name: t.double() if t.is_floating_point() else t for name, t in saved.items()}
        other = new_state(self.n, type(self.state))
        other.write(0, alpha=3.0)
        before = other.generation
        other.load_state_dict(saved, assign=assign)
        assert (other.generation > before) == assign
        self.state = other

    @invariant()
    def all_fields_are_as_expected(self) -> None:
        for i in range(self.n):
            row = self.state.rows(i)
            for field in set(FIELDS) - {"alpha_from", "alpha_target", "alpha_rate", "schedule", "schedule_since"}:
                expected = self.rows[i][field]
                assert row[field] == expected or (math.isnan(row[field]) and math.isnan(expected)), field
            assert (row["schedule"] == 255) == (i not in self.plans)
            if i in self.plans:
                assert row["alpha_target"] == self.plans[i].to
                assert row["schedule_since"] == self.plans[i].since

    @invariant()
    def buffers_keep_their_dtypes_and_equal_the_mirror(self) -> None:
        for field, (dtype, _) in FIELDS.items():
            buffer = self.state.get_buffer(field)
            assert buffer.dtype == dtype
            if not buffer.is_meta:
                read = torch.tensor([self.state.read(field, i) for i in range(self.n)], dtype=dtype)
                torch.testing.assert_close(buffer, read, rtol=0, atol=0, equal_nan=True)

    @invariant()
    def embargoes_end_when_they_should(self) -> None:
        for now in (self.now, self.now + 3):
            over = [
                i for i, row in enumerate(self.rows) if row["stage"] == Stage.EMBARGOED and row["embargo_until"] <= now
            ]
            assert self.state.expired_embargoes(now) == over


Interleaving.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestInterleaving = Interleaving.TestCase
