"""Fused kernels are chosen by measurement: never where they are slower, measured once, remembered between processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_fx.cache import ArtifactStore
from esper_fx.engine import choice
from esper_fx.engine.choice import INDUCTOR, Choice, Chooser
from esper_fx.passes.lower import Candidate, candidates
from tests.support.variants import grown, region_of

ENVIRONMENT = {"gpu": "a GPU 9.0", "torch": "2"}


@pytest.fixture(autouse=True)
def _forget() -> None:
    choice._choices.clear()


def candidate(rank: int = 4) -> Candidate:
    (found,) = candidates(region_of(grown("low_rank", (2, 5, 16), rank=rank), (2, 5, 16)).graph)
    return found


class Measured:
    """Stands for the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
        self.seconds = {name.removeprefix("_"): value for name, value in seconds.items()}
        self.calls = 0
        monkeypatch.setattr(choice, "measure", self.measure)

    def measure(self, candidate: Candidate, timer: object) -> Mapping[str, float]:
        self.calls += 1
        return self.seconds


@given(st.dictionaries(st.sampled_from([INDUCTOR, "0", "1", "2"]), st.floats(1e-6, 1.0), min_size=1))
def test_the_fused_operator_only_where_it_is_faster(seconds: dict[str, float]) -> None:
    seconds.setdefault(INDUCTOR, 0.5)
    chosen = Choice.fastest(seconds)
    if chosen.config is None:
        assert seconds[INDUCTOR] == min(seconds.values())
    else:
        assert seconds[str(chosen.config)] == min(seconds.values()) < seconds[INDUCTOR]
    assert Choice.from_bytes(chosen.to_bytes()) == chosen


def test_a_choice_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Measured(monkeypatch, inductor=2.0, _0=1.5, _1=1.0)
    chooser = Chooser(ENVIRONMENT, None)
    assert [chooser(candidate()) for _ in range(3)] == [1, 1, 1]
    assert device.calls == 1
    chooser(candidate(rank=8))
    assert device.calls == 2


def test_a_choice_is_remembered_by_the_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "kernels")
    device = Measured(monkeypatch, inductor=1.0, _0=2.0)
    assert Chooser(ENVIRONMENT, store)(candidate()) is None
    choice._choices.clear()  # another process
    assert Chooser(ENVIRONMENT, store)(candidate()) is None
    assert device.calls == 1
    choice._choices.clear()
    Chooser(ENVIRONMENT | {"gpu": "another 10.0"}, store)(candidate())
    assert device.calls == 2


def test_a_store_that_cannot_be_written_costs_a_measurement_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = ArtifactStore(tmp_path / "kernels")
    Measured(monkeypatch, inductor=1.0, _0=0.5)

    def full(*_: object, **__: object) -> None:
        raise choice.StoreError("the disk is full")

    monkeypatch.setattr(store, "put", full)
    assert Chooser(ENVIRONMENT, store)(candidate()) == 0


def test_a_damaged_record_is_measured_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "kernels")
    device = Measured(monkeypatch, inductor=1.0, _0=0.5)
    chooser: Callable[[Candidate], int | None] = Chooser(ENVIRONMENT, store)
    chooser(candidate())
    (entry,) = store.entries()
    store.put(entry.key, b"not json", metadata={})
    choice._choices.clear()
    assert Chooser(ENVIRONMENT, store)(candidate()) == 0
    assert device.calls == 2
