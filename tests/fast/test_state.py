"""The seeds' state: schedules against a closed form in float64, and a state that survives whatever happens to it."""

from __future__ import annotations

import copy
import io
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from esper_fx.errors import LifecycleError
from esper_fx.lifecycle import Stage
from esper_fx.state import FIELDS, MAX_SCHEDULE_STEPS, KasminaStateLayout, StateError
from esper_fx.state_fields import MEASURED
from tests.support.states import KINDS, WithMirror, new_state

# Schedules.


def test_known_values_of_the_schedules() -> None:
    state = new_state(3)
    for i, kind in enumerate(KINDS):
        state.schedule_alpha(i, to=1.0, steps=4, schedule=kind, now=10)
    seen = [[state.advance(now), [round(a, 6) for a in state.alpha.tolist()]] for now in range(10, 16)]
    assert seen == [
        [[0], [1.0, 0.0, 0.0]],
        [[], [1.0, 0.25, 0.146447]],
        [[], [1.0, 0.5, 0.5]],
        [[], [1.0, 0.75, 0.853553]],
        [[1, 2], [1.0, 1.0, 1.0]],
        [[], [1.0, 1.0, 1.0]],
    ]


def test_a_clock_that_jumps_or_stands_before_the_beginning_is_clipped() -> None:
    state = new_state(1)
    state.write(0, alpha=0.25)
    state.schedule_alpha(0, to=0.75, steps=10, schedule="cosine", now=100)
    assert (state.advance(3), state.read("alpha", 0)) == ([], 0.25)
    assert (state.advance(10**9), state.read("alpha", 0)) == ([0], 0.75)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 1000, 99_991, MAX_SCHEDULE_STEPS - 1, MAX_SCHEDULE_STEPS])
def test_the_last_step_is_told_from_the_one_before(steps: int) -> None:
    state = new_state(1)
    state.schedule_alpha(0, to=1.0, steps=steps, schedule="linear", now=5)
    assert state.advance(5 + steps - 1) == []
    assert state.advance(5 + steps) == [0]


def test_setting_alpha_ends_its_schedule() -> None:
    state = new_state(2)
    for i in range(2):
        state.schedule_alpha(i, to=1.0, steps=10, schedule="linear", now=0)
    state.advance(5)
    state.write(0, alpha=0.0)
    assert state.advance(9) == []
    assert state.alpha.tolist() == pytest.approx([0.0, 0.9])
    assert state.advance(10) == [1]


# What it costs.


class Operators(TorchDispatchMode):
    """Records the names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded() -> Iterator[list[str]]:
    with Operators() as operators:
        yield operators.names


@pytest.mark.parametrize("kind", [KasminaStateLayout, WithMirror])
def test_advancing_takes_the_same_operators_however_many_seeds_there_are(kind: type[KasminaStateLayout]) -> None:
    def operators(n: int) -> list[list[str]]:
        state = new_state(n, kind)
        for i in range(n):
            state.schedule_alpha(i, to=1.0, steps=10, schedule=KINDS[1 + i % 2], now=0)
        seen = []
        for now in (1, 10):  # under way, and arriving
            with recorded() as names:
                assert len(state.advance(now)) == (n if now == 10 else 0)
            seen.append(names)
        return seen

    one, many = operators(1), operators(300)
    assert one == many
    assert 0 < len(one[0]) < 60


def test_advancing_writes_just_the_clock_when_nothing_is_scheduled() -> None:
    state = new_state(5)
    state.schedule_alpha(2, to=1.0, steps=3, schedule="linear", now=0)
    state.advance(3)
    with recorded() as names:
        assert state.advance(4) == []
        assert state.expired_embargoes(4) == []
    assert names == ["aten.fill_.Scalar"]
    assert int(state.step) == 4


def test_nothing_waits_for_the_device() -> None:
    # On "meta" whatever would read a value from the device raises.
    state = new_state(2).to("meta")
    state.write(0, alpha=0.5, stage=Stage.EMBARGOED, embargo_until=2)
    state.schedule_alpha(1, to=1.0, steps=2, schedule="linear", now=0)
    assert state.advance(1) == []
    assert state.advance(2) == [1]
    assert state.expired_embargoes(2) == [0]
    assert state.rows(0)["alpha"] == 0.5
    assert state.to_empty(device="cpu").alpha.tolist() == [0.5, 1.0]


# Views.


def test_a_view_shares_memory_with_its_buffer() -> None:
    state = new_state(3)
    for field, (dtype, _) in FIELDS.items():
        view = state.view(field, 1)
        buffer = state.get_buffer(field)
        assert (view.shape, view.dtype) == ((), dtype)
        assert view.data_ptr() == buffer.data_ptr() + buffer.element_size()
    alpha, gate = state.view("alpha", 1), state.view("gate", 1)
    state.write(1, gate=1.0)
    state.schedule_alpha(1, to=0.5, steps=2, schedule="linear", now=0)
    state.advance(1)
    assert (alpha.item(), gate.item()) == (0.25, 1.0)


def test_the_generation_tells_when_views_are_stale() -> None:
    state = new_state(2)
    view, generation = state.view("alpha", 0), state.generation
    state.half().cpu().double()
    state.load_state_dict({name: t + 1 if name == "alpha" else t for name, t in state.state_dict().items()})
    assert state.generation == generation
    assert view.item() == 1.0

    twin = copy.deepcopy(state)
    twin.write(0, alpha=4.0)
    assert twin.generation > generation
    assert (state.generation, view.item(), twin.view("alpha", 0).item()) == (generation, 1.0, 4.0)

    state.load_state_dict({name: t.clone() for name, t in state.state_dict().items()}, assign=True)
    assert state.generation > generation
    generation = state.generation
    state.to("meta")
    assert state.generation > generation


# Checkpoints and surroundings.


class Host(nn.Module):
    """A model with a state in it."""

    def __init__(self, n_seeds: int) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.esper_state = new_state(n_seeds)


def test_the_state_travels_in_the_models_checkpoint() -> None:
    model, other = Host(2), Host(2)
    model.esper_state.schedule_alpha(1, to=1.0, steps=4, schedule="cosine", now=0)
    model.esper_state.advance(2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.esper_state.alpha, model.esper_state.alpha)
    assert other.esper_state.read("alpha", 1) == pytest.approx(0.5)
    assert other.esper_state.advance(4) == [1]
    assert model.esper_state.read("alpha", 1) == pytest.approx(0.5)


def test_a_checkpoint_in_half_precision_does_not_change_the_states_dtypes() -> None:
    state, other = new_state(1), new_state(1)
    state.write(0, alpha=0.5)
    saved = {name: t.half() if t.is_floating_point() else t for name, t in state.state_dict().items()}
    other.load_state_dict(saved, assign=True)
    assert other.alpha.dtype == torch.float32
    assert other.read("alpha", 0) == 0.5


def test_a_checkpoint_from_before_morphing_loads_and_leaves_the_state_alone() -> None:
    model = Host(2)
    model.esper_state.write(1, alpha=0.5)
    assert str(model.load_state_dict(nn.ModuleDict({"layer": nn.Linear(2, 2)}).state_dict())) == (
        "<All keys matched successfully>"
    )
    assert model.esper_state.read("alpha", 1) == 0.5


def test_a_checkpoint_with_part_of_the_state_or_other_seeds_is_refused() -> None:
    model = Host(2)
    saved = model.state_dict()
    del saved["esper_state.gate"]
    with pytest.raises(RuntimeError, match=r"Missing key.*esper_state\.gate"):
        model.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"size mismatch for esper_state\.stage"):
        model.load_state_dict(Host(3).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.esper_state.load_state_dict({})


def test_values_survive_to_empty_only_by_way_of_meta() -> None:
    model = Host(1).half()
    model.esper_state.write(0, alpha=0.1)
    assert model.layer.weight.dtype == torch.float16
    assert model.esper_state.alpha.dtype == torch.float32
    model.to("meta").to_empty(device="cpu")
    assert model.esper_state.read("alpha", 0) == pytest.approx(0.1, abs=1e-8)


def test_a_state_born_on_meta_starts_with_dormant_seeds() -> None:
    with torch.device("meta"):
        state = new_state(2)
    assert state.alpha.is_meta
    state.to_empty(device="cpu")
    for row in (state.rows(0), state.rows(1)):
        assert [field for field in row if math.isnan(row[field])] == list(MEASURED)
        assert {k: v for k, v in row.items() if k not in MEASURED} == {
            field: value for field, (_, value) in FIELDS.items() if field not in MEASURED
        }


def test_a_state_made_in_inference_mode_can_be_used_outside_and_back() -> None:
    with torch.inference_mode():
        state = new_state(1)
    state.schedule_alpha(0, to=1.0, steps=4, schedule="linear", now=0)
    state.advance(1)
    with torch.inference_mode():
        state.advance(2)
        state.write(0, gate=1.0)
    state.advance(3)
    assert (state.read("alpha", 0), state.read("gate", 0)) == (0.75, 1.0)


def test_a_write_from_another_thread_is_never_undone_by_advancing() -> None:
    state = new_state(2)
    stop = threading.Event()

    def train() -> None:
        now = 0
        while not stop.is_set():
            state.advance(now := now + 1)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(200):
            state.schedule_alpha(1, to=5.0, steps=MAX_SCHEDULE_STEPS, schedule="linear", now=-10)
            state.schedule_alpha(0, to=9.0, steps=MAX_SCHEDULE_STEPS, schedule="linear", now=-10)
            state.write(0, alpha=-1.0)
            for _ in range(3):
                assert state.read("alpha", 0) == -1.0
    finally:
        stop.set()
        thread.join()
    assert state.read("alpha", 0) == -1.0


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps=-1 for the seed at 'layers.1': expected a whole number from 0 to 1048576"),
        ({"steps": 2.5}, "steps=2.5 for the seed at 'layers.1': expected a whole number from 0 to 1048576"),
        ({"steps": 1 << 21}, "steps=2097152 for the seed at 'layers.1': expected a whole number from 0 to 1048576"),
        (
            {"schedule": "cubic"},
            "schedule='cubic' for the seed at 'layers.1': expected one of ['constant', 'linear', 'cosine']",
        ),
        (
            {"schedule": "none"},
            "schedule='none' for the seed at 'layers.1': expected one of ['constant', 'linear', 'cosine']",
        ),
        ({"to": math.nan}, "to=nan for the seed at 'layers.1': expected a finite number of at most 1e+30"),
        ({"to": math.inf}, "to=inf for the seed at 'layers.1': expected a finite number of at most 1e+30"),
        ({"to": 1e39}, "to=1e+39 for the seed at 'layers.1': expected a finite number of at most 1e+30"),
        ({"to": "1"}, "to='1' for the seed at 'layers.1': expected a finite number of at most 1e+30"),
        ({"i": 2}, "there is no seed 2: expected 0 to 1 (2 seeds)"),
    ],
)
def test_a_bad_schedule_is_refused_and_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    state = new_state(2)
    state.schedule_alpha(1, to=1.0, steps=4, schedule="linear", now=0)
    before = state.rows(1)
    good: dict[str, Any] = {"i": 1, "to": 0.5, "steps": 3, "schedule": "cosine", "now": 7}
    with pytest.raises(StateError) as refusal:
        state.schedule_alpha(**{**good, **arguments})
    assert str(refusal.value) == message
    assert isinstance(refusal.value, ValueError)
    assert isinstance(refusal.value, LifecycleError)
    assert repr(state.rows(1)) == repr(before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate": 1.0, "alpha": -math.inf}, "alpha=-inf for the seed at 'layers.0': expected a finite number"),
        ({"gate": 1.0, "stage": 8}, "stage=8 for the seed at 'layers.0': expected a Stage"),
        ({"gate": 1.0, "schedule": 3}, "schedule=3 for the seed at 'layers.0': expected a Schedule"),
        ({"gate": 1.0, "error_count": 1 << 31}, "error_count=2147483648 .* expected a whole number that fits torch.i"),
        ({"gate": 1.0, "embargo_until": 0.5}, "embargo_until=0.5 .* expected a whole number that fits torch.int64"),
        ({"gate": 1.0, "colour": 1}, "seeds have no field 'colour': expected one of stage, blueprint, alpha, "),
        ({"gate": 1.0, "step": 1}, "seeds have no field 'step'"),
    ],
)
def test_a_bad_write_is_refused_whole(fields: dict[str, Any], message: str) -> None:
    state = new_state(1)
    with pytest.raises(StateError, match=message):
        state.write(0, **fields)
    assert state.read("gate", 0) == 0.0


def test_reading_what_is_not_there_is_refused() -> None:
    state = new_state(1)
    for attempt in (state.read, state.view):
        with pytest.raises(StateError, match="seeds have no field 'weight'"):
            attempt("weight", 0)
        with pytest.raises(StateError, match="there is no seed -1: expected 0 to 0"):
            attempt("alpha", -1)
    with pytest.raises(StateError, match="n_seeds is 2 with 1 names"):
        KasminaStateLayout(2, names=["a"])
    with pytest.raises(StateError, match="n_seeds is -1: expected 0 or more"):
        KasminaStateLayout(-1)


def test_a_state_without_seeds_works() -> None:
    state = KasminaStateLayout(0)
    assert (state.advance(3), state.expired_embargoes(3), int(state.step)) == ([], [], 3)
    with pytest.raises(StateError, match=r"there is no seed 0: this model has no seeds"):
        state.read("alpha", 0)
