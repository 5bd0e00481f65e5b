"""The transition table against the diagram it came from, random lives of a seed, and the ledger."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esper_fx.errors import EsperError, LifecycleError
from esper_fx.lifecycle import HAS_BODY, TRANSITIONS, GrowthEvent, Ledger, Stage, check_transition

DIAGRAM = """
    DORMANT > GERMINATING > INCUBATING > BLENDING > ACTIVE > FOSSILIZED
    ACTIVE > BLENDING
    GERMINATING > ACTIVE
    GERMINATING > EMBARGOED
    INCUBATING > EMBARGOED
    BLENDING > EMBARGOED
    ACTIVE > EMBARGOED > DORMANT
    GERMINATING > ERROR
    INCUBATING > ERROR
    BLENDING > ERROR
    ACTIVE > ERROR
    FOSSILIZED > ERROR
    EMBARGOED > ERROR
    ERROR > EMBARGOED
"""
LEGAL = {pair for line in DIAGRAM.split("\n") for pair in itertools.pairwise(line.replace(" ", "").split(">"))}

stages = st.sampled_from(list(Stage))
events = st.builds(
    GrowthEvent,
    step=st.integers(0, 2**40),
    site=st.text(max_size=8),
    frm=stages,
    to=stages,
    why=st.text(max_size=20),
    blueprint=st.none() | st.text(max_size=8),
)


@pytest.mark.parametrize(("frm", "to"), list(itertools.product(Stage, Stage)))
def test_a_transition_is_allowed_exactly_if_the_diagram_has_it(frm: Stage, to: Stage) -> None:
    assert (to in TRANSITIONS[frm]) == ((frm.name, to.name) in LEGAL)
    if (frm.name, to.name) in LEGAL:
        check_transition("layers.3", frm, to)
    else:
        with pytest.raises(LifecycleError):
            check_transition("layers.3", frm, to)


def test_stages_keep_the_numbers_that_checkpoints_hold() -> None:
    names = ["DORMANT", "GERMINATING", "INCUBATING", "BLENDING", "ACTIVE", "FOSSILIZED", "EMBARGOED", "ERROR"]
    assert [(stage.name, stage.value) for stage in Stage] == [(name, i) for i, name in enumerate(names)]


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS[Stage.DORMANT] = frozenset(Stage)  # type: ignore[index]


class Life(RuleBasedStateMachine):
    """One seed that is asked for anything at all."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage.DORMANT
        self.past: list[str] = []

    @rule(to=stages)
    def ask(self, to: Stage) -> None:
        try:
            check_transition("s", self.stage, to)
        except LifecycleError:
            assert (self.stage.name, to.name) not in LEGAL
        else:
            assert (self.stage.name, to.name) in LEGAL
            self.past = [] if to is Stage.DORMANT else [*self.past, to.name]
            self.stage = to

    @precondition(lambda self: self.stage in HAS_BODY)
    @rule()
    def a_body_can_always_be_quarantined(self) -> None:
        check_transition("s", self.stage, Stage.ERROR)

    @invariant()
    def a_body_has_germinated_since_the_seed_last_slept(self) -> None:
        if self.stage in HAS_BODY:
            assert self.past[0] == "GERMINATING"

    @invariant()
    def only_an_active_seed_was_fossilized_and_only_an_error_ends_it(self) -> None:
        for before, after in itertools.pairwise(self.past):
            assert after != "FOSSILIZED" or before == "ACTIVE"
            assert before != "FOSSILIZED" or after == "ERROR"


TestLife = Life.TestCase


def test_stages_with_a_body() -> None:
    assert {stage.name for stage in HAS_BODY} == {"INCUBATING", "BLENDING", "ACTIVE", "FOSSILIZED"}


def test_a_refusal_names_the_site_both_stages_the_legal_ones_and_what_to_do() -> None:
    with pytest.raises(LifecycleError) as refusal:
        check_transition("layers.3", Stage.DORMANT, Stage.BLENDING)
    assert str(refusal.value) == (
        "the seed at 'layers.3' is DORMANT and cannot become BLENDING: "
        "from DORMANT it can become GERMINATING (call germinate() first)"
    )
    assert isinstance(refusal.value, EsperError)
    assert isinstance(refusal.value, RuntimeError)
    with pytest.raises(
        LifecycleError,
        match=r"is ACTIVE and cannot become GERMINATING: from ACTIVE it can become BLENDING, FOSSILIZED, EMBARGOED, "
        r"ERROR \(call blend\(\), fossilize\(\) or prune\(\)\)",
    ):
        check_transition("layers.3", Stage.ACTIVE, Stage.GERMINATING)


# The ledger.


@given(st.lists(events, max_size=6))
def test_a_ledger_survives_json_pickle_and_copying(entries: list[GrowthEvent]) -> None:
    ledger = Ledger()
    for entry in entries:
        ledger.append(entry)
    written = json.loads(json.dumps(ledger.to_json()))
    assert written == [
        {
            "step": e.step,
            "site": e.site,
            "frm": e.frm.name,
            "to": e.to.name,
            "why": e.why,
            "blueprint": e.blueprint,
        }
        for e in entries
    ]
    for other in (Ledger.from_json(written), pickle.loads(pickle.dumps(ledger)), copy.deepcopy(ledger)):
        assert list(other) == entries
        assert other == ledger
        assert all(isinstance(e.frm, Stage) and isinstance(e.to, Stage) for e in other)


@given(st.lists(events, min_size=1, max_size=6), st.data())
def test_a_ledger_reads_like_a_sequence(entries: list[GrowthEvent], data: st.DataObject) -> None:
    ledger = Ledger(entries)
    index = data.draw(st.integers(-len(entries), len(entries) - 1))
    cut = data.draw(st.slices(len(entries)))
    assert len(ledger) == len(entries)
    assert ledger[index] == entries[index]
    assert ledger[cut] == tuple(entries[cut])
    assert ledger != Ledger(entries[:-1])
    with pytest.raises(IndexError):
        ledger[len(entries)]


def test_a_copy_of_a_ledger_has_a_future_of_its_own() -> None:
    event = GrowthEvent(1, "a", Stage.DORMANT, Stage.GERMINATING, "asked for")
    ledger = Ledger([event])
    twin = copy.deepcopy(ledger)
    ledger.append(event)
    assert (len(ledger), len(twin)) == (2, 1)


def test_iterating_stops_at_the_events_there_were_when_it_began() -> None:
    ledger = Ledger([GrowthEvent(0, "a", Stage.DORMANT, Stage.GERMINATING, "")])
    for event in itertools.islice(ledger, 5):
        ledger.append(event)
    assert len(ledger) == 2


def test_threads_append_without_losing_or_reordering_their_events() -> None:
    ledger = Ledger()
    start = threading.Barrier(4)

    def work(thread: int) -> None:
        start.wait()
        for step in range(100):
            ledger.append(GrowthEvent(step, str(thread), Stage.DORMANT, Stage.GERMINATING, ""))
            assert ledger.to_json()[-1]["frm"] == "DORMANT"

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert [event.step for event in ledger if event.site == str(i)] == list(range(100))


def test_a_ledger_prints_as_a_table() -> None:
    ledger = Ledger(
        [
            GrowthEvent(7, "layers.3", Stage.DORMANT, Stage.GERMINATING, "germinate()", "low_rank"),
            GrowthEvent(120, "head", Stage.ACTIVE, Stage.FOSSILIZED, "fossilize()"),
        ]
    )
    assert str(ledger).splitlines() == [
        "step  site      from     to           blueprint  why",
        "   7  layers.3  DORMANT  GERMINATING  low_rank   germinate()",
        " 120  head      ACTIVE   FOSSILIZED   -          fossilize()",
    ]
    assert str(Ledger()) == "step  site  from  to  blueprint  why"
    assert repr(ledger) == "Ledger(2 events)"


GOOD = GrowthEvent(1, "a", Stage.DORMANT, Stage.GERMINATING, "").to_json()


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({**GOOD, "to": "AWAKE"}, r"KeyError: 'AWAKE'"),
        ({**GOOD, "colour": 1}, r"unexpected keyword argument 'colour'"),
        ({k: v for k, v in GOOD.items() if k != "why"}, r"missing 1 required positional argument: 'why'"),
        ({k: v for k, v in GOOD.items() if k != "frm"}, r"KeyError: 'frm'"),
        (7, r"^7 is not a growth event"),
    ],
)
def test_a_record_that_is_no_event_is_refused(record: dict[str, object], complaint: str) -> None:
    with pytest.raises(LifecycleError, match=complaint) as refusal:
        Ledger.from_json([record])
    assert "expected step, site, frm, to, why and blueprint, with stages out of DORMANT, GERMINATING" in str(
        refusal.value
    )
