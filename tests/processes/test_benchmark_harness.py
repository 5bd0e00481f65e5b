"""The harness that the benchmarks' figures come from: statistics, turns, verdicts and what is written down."""

from __future__ import annotations

import gc
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import swap
from benchmarks.__main__ import main
from benchmarks.harness import (
    LEAST_ROUNDS,
    GcPauses,
    Quantiles,
    Samples,
    Stamps,
    gc_off,
    interleave,
    quantile,
    quantiles,
)
from benchmarks.options import NAMES
from benchmarks.report import Bar, Report, Row

FINITE = st.floats(min_value=1e-6, max_value=1e6)


class FakeClock:
    """A clock that only moves when a side says how long it took."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float) -> None:
        self.now += seconds


# Statistics


@given(st.lists(FINITE, min_size=1, max_size=50), st.floats(min_value=0, max_value=1))
def test_quantile_is_numpys(values: list[float], fraction: float) -> None:
    assert quantile(values, fraction) == pytest.approx(float(numpy.quantile(values, fraction)), rel=1e-9)


@given(st.lists(FINITE, min_size=1, max_size=50))
def test_quantiles_are_ordered_and_p50_is_the_median(values: list[float]) -> None:
    found = quantiles(values)
    assert found.p20 <= found.p50 <= found.p80
    assert found.p50 == pytest.approx(statistics.median(values), rel=1e-9)


def test_quantiles_of_known_data() -> None:
    assert quantiles([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == Quantiles(2.0, 3.5, 5.0)
    assert quantiles([0.002]).scaled(1e3) == Quantiles(2.0, 2.0, 2.0)


def test_a_quantile_of_nothing_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="time at least one round"):
        quantile([], 0.5)
    with pytest.raises(ValueError, match=r"fraction is 1\.5; expected a number from 0 to 1"):
        quantile([1.0], 1.5)


@given(st.floats(0.5, 2.0), st.lists(FINITE, min_size=3, max_size=30))
def test_pairwise_ratio_is_blind_to_drift(factor: float, drift: list[float]) -> None:
    samples = Samples({"a": [factor * speed for speed in drift], "b": drift})
    found = samples.ratio("a", "b")
    assert found.p20 == pytest.approx(factor)
    assert found.p80 == pytest.approx(factor)


def test_ratio_pairs_rounds_and_does_not_divide_medians() -> None:
    samples = Samples({"a": [1.0, 4.0, 9.0], "b": [10.0, 2.0, 3.0]})
    assert samples.ratio("a", "b").p50 == pytest.approx(2.0)  # of 0.1, 2, 3; the medians' ratio is 4 / 3
    assert samples.side("a").p50 == 4.0


# Turns


@pytest.mark.parametrize("order", ["random", "alternating"])
def test_every_side_runs_once_per_round_and_warmup_is_not_recorded(order: str) -> None:
    clock, calls = FakeClock(), []
    lengths = {"a": 1.0, "b": 2.0, "c": 3.0}

    def side(name: str) -> Callable[[], None]:
        def work() -> None:
            calls.append(name)
            clock.takes(100.0 if len(calls) <= 6 else lengths[name])

        return work

    samples = interleave({name: side(name) for name in lengths}, rounds=10, warmup=2, order=order, clock=clock)
    assert samples.seconds == {name: [length] * 10 for name, length in lengths.items()}
    assert len(calls) == 36
    assert [tuple(calls[start : start + 3]) for start in range(6, 36, 3)] == samples.orders
    assert all(sorted(turn) == ["a", "b", "c"] for turn in samples.orders)


def test_a_budget_ends_the_rounds_but_not_before_there_are_enough() -> None:
    clock = FakeClock()
    samples = interleave({"a": lambda: clock.takes(1.0)}, rounds=1000, warmup=0, budget_s=100.5, clock=clock)
    assert len(samples.seconds["a"]) == 101
    samples = interleave({"a": lambda: clock.takes(1.0)}, rounds=1000, warmup=0, budget_s=1.0, clock=clock)
    assert len(samples.seconds["a"]) == LEAST_ROUNDS
    assert len(samples.orders) == LEAST_ROUNDS


def test_alternating_gives_every_side_every_place_equally_often() -> None:
    samples = interleave({"a": int, "b": int, "c": int}, rounds=6, warmup=0, order="alternating")
    for place in range(3):
        assert sorted(turn[place] for turn in samples.orders) == ["a", "a", "b", "b", "c", "c"]


def test_random_orders_vary_and_repeat_with_their_seed() -> None:
    sides = {"a": int, "b": int}
    first = interleave(sides, rounds=40, seed=1).orders
    assert first == interleave(sides, rounds=40, seed=1).orders
    assert first != interleave(sides, rounds=40, seed=2).orders
    assert set(first) == {("a", "b"), ("b", "a")}


def test_nothing_is_collected_while_timing() -> None:
    enabled = []
    interleave({"a": lambda: enabled.append(gc.isenabled())}, rounds=3)
    assert enabled == [False] * 6
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), gc_off():
        raise ZeroDivisionError
    assert gc.isenabled()


def test_interleave_needs_sides_and_rounds() -> None:
    with pytest.raises(ValueError, match="no sides"):
        interleave({}, rounds=1)
    with pytest.raises(ValueError, match=r"rounds=0, warmup=3; expected rounds >= 1"):
        interleave({"a": int}, rounds=0)


def test_stamps_lose_no_time_between_steps() -> None:
    clock = FakeClock()
    stamps = Stamps(clock)
    stamps.mark()
    for work, pause in [(1.0, 0.5), (2.0, 0.25)]:
        clock.takes(work)
        clock.takes(pause)
        stamps.mark()
    assert stamps.seconds == [1.5, 2.25]
    assert sum(stamps.seconds) == clock.now


def test_garbage_collections_are_seen_while_watched_only() -> None:
    watched = len(gc.callbacks)
    with GcPauses() as pauses:
        gc.collect()
    seen = len(pauses.seconds)
    gc.collect()
    assert seen >= 1
    assert len(pauses.seconds) == seen
    assert pauses.longest_ms > 0
    assert len(gc.callbacks) == watched


# Verdicts, JSON and the command


@pytest.mark.parametrize(
    ("figure", "bar", "verdict"),
    [
        (1.0, Bar(1.03, 1.005), "aim met"),
        (1.005, Bar(1.03, 1.005), "aim met"),
        (1.02, Bar(1.03, 1.005), "met"),
        (1.03, Bar(1.03), "met"),
        (1.031, Bar(1.03, 1.005), "missed"),
        (math.nan, Bar(1.03, 1.005), "missed"),
        (0, Bar(0, 0), "aim met"),
        (1.5, None, ""),
    ],
)
def test_verdict(figure: float, bar: Bar | None, verdict: str) -> None:
    assert Row("x", figure, "×", bar).verdict == verdict


def test_json_holds_rows_machine_and_samples(tmp_path: Path) -> None:
    report = Report("demo", raw={"step_s": {"a": [0.5, math.inf]}})
    report.add(Row("net: ratio", 1.02, "×", Bar(1.03, 1.0), Quantiles(1.0, 1.02, 1.04), "beside"))
    report.add(Row("net: never", math.nan, "s"))
    written = json.loads(report.write(tmp_path / "deep" / "demo.json").read_text(), parse_constant=pytest.fail)
    assert written["benchmark"] == "demo"
    assert written["rows"][0] == {
        "what": "net: ratio",
        "figure": 1.02,
        "unit": "×",
        "bar": {"at_most": 1.03, "aim": 1.0},
        "spread": {"p20": 1.0, "p50": 1.02, "p80": 1.04},
        "note": "beside",
        "verdict": "met",
    }
    assert written["rows"][1]["figure"] is None
    assert written["raw"] == {"step_s": {"a": [0.5, None]}}
    assert written["machine"]["cores"] >= 1
    assert {"cpu", "torch", "python", "esper_fx", "torch_threads"} <= set(written["machine"])


def test_swap_reads_the_longest_step_and_the_ratios_from_what_was_watched() -> None:
    grown = {
        "before_s": [0.01, 0.02, 0.03],
        "event_s": [0.02, 0.045, 0.02],
        "longest": [{"step": 1}],
        "host_ms": 0.5,
        "call_ms": 0.25,
        "live_s": 9.0,
        "takeover_s": 20.0,
        "compiled": 2,
        "gc_pause_ms": 3.0,
    }
    idle = {"idle_s": 2.0, "idle_takeover_s": 5.0}
    plain = {"before_s": [0.01, 0.01, 0.01], "event_s": [1.0, 0.01]}
    quieter = grown | {"event_s": [0.02, 0.02, 0.02], "host_ms": 0.1, "call_ms": 0.5}
    found = swap.rows("net", [grown, quieter, grown], [idle, idle | {"idle_s": 2 * idle["idle_s"]}, idle], plain)
    assert [round(row.figure, 6) for row in found] == [2.25, 1.5, 1.0, 100.0, 0.5, 4.5]
    assert [row.verdict for row in found] == ["met", "", "", "", "aim met", "missed"]


def test_an_unknown_benchmark_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["swpa"]) == 1
    output = capsys.readouterr().out
    assert "did you mean 'swap'?" in output
    assert all(name in output for name in NAMES)
