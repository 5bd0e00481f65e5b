"""The life of a seed: its stages, which may follow which, and the ledger of what happened."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, overload

from esper_fx.checks import cause, shown
from esper_fx.errors import LifecycleError


class Stage(enum.IntEnum):
    """Where a seed is in its life. The values are what the state arrays and checkpoints hold."""

    DORMANT = 0
    GERMINATING = 1
    INCUBATING = 2
    BLENDING = 3
    ACTIVE = 4
    FOSSILIZED = 5
    EMBARGOED = 6
    ERROR = 7


TRANSITIONS: Mapping[Stage, frozenset[Stage]] = MappingProxyType(
    {
        Stage.DORMANT: frozenset({Stage.GERMINATING}),
        # Straight to ACTIVE: a trained body put in with weights needs no incubation.
        Stage.GERMINATING: frozenset({Stage.INCUBATING, Stage.ACTIVE, Stage.EMBARGOED, Stage.ERROR}),
        Stage.INCUBATING: frozenset({Stage.BLENDING, Stage.EMBARGOED, Stage.ERROR}),
        Stage.BLENDING: frozenset({Stage.ACTIVE, Stage.EMBARGOED, Stage.ERROR}),
        Stage.ACTIVE: frozenset({Stage.BLENDING, Stage.FOSSILIZED, Stage.EMBARGOED, Stage.ERROR}),
        Stage.FOSSILIZED: frozenset({Stage.ERROR}),
        Stage.EMBARGOED: frozenset({Stage.DORMANT, Stage.ERROR}),
        Stage.ERROR: frozenset({Stage.EMBARGOED}),
    }
)
"""Which stages may follow each stage."""

HAS_BODY: frozenset[Stage] = frozenset({Stage.INCUBATING, Stage.BLENDING, Stage.ACTIVE, Stage.FOSSILIZED})
"""Stages in which a seed's body takes part in the computation."""

_ADVICE: Mapping[Stage, str] = MappingProxyType(
    {
        Stage.DORMANT: "call germinate() first",
        Stage.GERMINATING: "wait for the germination to end, or call prune()",
        Stage.INCUBATING: "call blend() first, or prune()",
        Stage.BLENDING: "wait for the blend to end, or call prune()",
        Stage.ACTIVE: "call blend(), fossilize() or prune()",
        Stage.FOSSILIZED: "a fossilized seed stays as it is",
        Stage.EMBARGOED: "wait for the embargo to end",
        Stage.ERROR: "read its error, then call prune()",
    }
)


def check_transition(site: str, frm: Stage, to: Stage) -> None:
    """Allow a transition that is in the table and refuse any other.

    Args:
        site: Name of the seed's site, for the message.
        frm: The stage the seed is in.
        to: The stage asked for.

    Raises:
        LifecycleError: If ``to`` may not follow ``frm``; the seed is unchanged.
    """
    legal = TRANSITIONS[frm]
    if to in legal:
        return
    options = ", ".join(stage.name for stage in sorted(legal))
    raise LifecycleError(
        f"the seed at {site!r} is {frm.name} and cannot become {to.name}: "
        f"from {frm.name} it can become {options} ({_ADVICE[frm]})"
    )


@dataclass(frozen=True)
class GrowthEvent:
    """One transition of one seed.

    Attributes:
        step: The model's clock (training steps) when it happened.
        site: Name of the seed's site.
        frm: Stage before.
        to: Stage after.
        why: What caused it, in plain words.
        blueprint: Name of the blueprint concerned, or None.
    """

    step: int
    site: str
    frm: Stage
    to: Stage
    why: str
    blueprint: str | None = None

    def to_json(self) -> dict[str, Any]:
        """This event as a plain dict; stages by name."""
        return {**vars(self), "frm": self.frm.name, "to": self.to.name}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> GrowthEvent:
        """The event that `to_json` made this record of.

        Raises:
            LifecycleError: If a field is missing or unknown, or a stage does not exist.
        """
        try:
            return cls(**{**record, "frm": Stage[record["frm"]], "to": Stage[record["to"]]})
        except (KeyError, TypeError) as error:
            stages = ", ".join(Stage.__members__)
            raise LifecycleError(
                f"{shown(record)} is not a growth event ({cause(error)}): expected step, site, frm, to, "
                f"why and blueprint, with stages out of {stages}"
            ) from error


class Ledger(Sequence[GrowthEvent]):
    """All growth events of a model in the order they happened. Append-only.

    Threads may append and read at the same time without a lock: the events only ever go through `list.append`,
    indexing and copying, each of which CPython keeps atomic, with and without the GIL.
    """

    def __init__(self, events: Iterable[GrowthEvent] = ()) -> None:
        self._events: list[GrowthEvent] = list(events)

    def append(self, event: GrowthEvent) -> None:
        """Add an event at the end."""
        self._events.append(event)

    @overload
    def __getitem__(self, index: int) -> GrowthEvent: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[GrowthEvent, ...]: ...
    def __getitem__(self, index: int | slice) -> GrowthEvent | tuple[GrowthEvent, ...]:
        return tuple(self._events[index]) if isinstance(index, slice) else self._events[index]

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[GrowthEvent]:
        """Iterate over the events there are now; what is appended meanwhile is not included."""
        return iter(tuple(self._events))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, Ledger) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # it grows, so it can be no key

    def to_json(self) -> list[dict[str, Any]]:
        """The events as plain dicts that any JSON writer takes."""
        return [event.to_json() for event in self]

    @classmethod
    def from_json(cls, records: Iterable[Mapping[str, Any]]) -> Ledger:
        """The ledger that `to_json` made these records of.

        Raises:
            LifecycleError: If a record is not a growth event.
        """
        return cls(GrowthEvent.from_json(record) for record in records)

    def __str__(self) -> str:
        """A table for people, one line an event."""
        rows = [("step", "site", "from", "to", "blueprint", "why")]
        rows += [(str(e.step), e.site, e.frm.name, e.to.name, e.blueprint or "-", e.why) for e in self]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = []
        for step, *middle, why in rows:
            cells = [
                step.rjust(widths[0]),
                *(cell.ljust(width) for cell, width in zip(middle, widths[1:], strict=True)),
            ]
            lines.append("  ".join([*cells, why]).rstrip())
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Ledger({len(self)} events)"
