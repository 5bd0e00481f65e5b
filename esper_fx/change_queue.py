"""The queue of a model's changes: which bodies come and go, in which order, and what is live after each."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from esper_fx.germination import Germination
from esper_fx.lifecycle import Stage
from esper_fx.seed import KasminaSeed


@dataclass(frozen=True, eq=False)
class Move:
    """A seed's body comes or goes.

    Attributes:
        seed: Whose body it is.
        germination: What ``germinate`` returned, or None where the body goes.
        target: The stage that follows.
    """

    seed: KasminaSeed
    germination: Germination | None
    target: Stage


@dataclass(eq=False)
class Change:
    """A change of the morphology that is on its way: moves that are made in one step, or fail, together.

    Attributes:
        moves: All of them bring a body, or all of them take one away.
        error: Why their kernels cannot be had.
        ready: Whether the next step boundary decides it.
        agreed: Whether it does so in all processes that train replicas of the model.
        tried: Whether their kernels have been asked for.
        pause: Seconds for which it was put off last.
        until: Done when these are over; None where it never was.
    """

    moves: list[Move]
    error: BaseException | None = None
    ready: bool = False
    agreed: bool = False
    tried: bool = False
    pause: float = 0.0
    until: Future[None] | None = None

    @property
    def brings(self) -> bool:
        """Whether bodies come."""
        return any(move.germination is not None for move in self.moves)

    def apply_to(self, live: set[KasminaSeed]) -> None:
        """Make of the seeds that are live before it those that are live after it."""
        if self.error is None:
            for move in self.moves:
                (live.add if move.germination is not None else live.discard)(move.seed)

    def put_off(self, pause: float, until: Future[None]) -> None:
        """Ask for its kernels again in ``pause`` seconds, when ``until`` is done."""
        self.tried, self.pause, self.until = False, pause, until

    @property
    def names(self) -> str:
        """For messages: whose body comes or goes."""
        names = ", ".join(repr(move.seed.name) for move in self.moves)
        return f"the body at site {names}" if len(self.moves) == 1 else f"the bodies at sites {names}"

    def __str__(self) -> str:
        return f"{self.names} {'has' if len(self.moves) == 1 else 'have'}"


class ChangeQueue:
    """Changes in the order in which they go live, and those that are put off for a while. Its user holds a lock."""

    def __init__(self) -> None:
        self._waiting: list[Change] = []
        self._put_off: list[Change] = []

    def __bool__(self) -> bool:
        """Whether a change waits, one that is put off left aside."""
        return bool(self._waiting)

    def __iter__(self) -> Iterator[Change]:
        """The changes that wait, the next one first."""
        return iter(list(self._waiting))

    def __contains__(self, change: Change) -> bool:
        return change in self._waiting

    @property
    def first(self) -> Change:
        """The next one."""
        return self._waiting[0]

    @property
    def put_off(self) -> list[Change]:
        """The changes that are put off."""
        return list(self._put_off)

    def moves(self) -> Iterator[tuple[Change, Move]]:
        """All that is to come, each with its change; last what is put off."""
        return ((change, move) for change in (*self._waiting, *self._put_off) for move in list(change.moves))

    def add(self, change: Change) -> None:
        """Queue a change after all others."""
        self._waiting.append(change)

    def remove(self, change: Change) -> None:
        """Take one out that is made, or has failed."""
        self._waiting.remove(change)

    def withdraw(self, seed: KasminaSeed) -> Move | None:
        """Take what is to come for a seed out of its change, if anything is; the change's other moves stay."""
        change, move = next((found for found in self.moves() if found[1].seed is seed), (None, None))
        if change is not None and move is not None:
            change.moves.remove(move)
            if not change.moves:
                self._put_off = [other for other in self._put_off if other is not change]
                self._waiting = [other for other in self._waiting if other is not change]
        return move

    def clear(self) -> list[Change]:
        """Forget all, and return those that waited."""
        waiting, self._waiting = self._waiting, []
        self._put_off.clear()
        return waiting

    def live_after(self, change: Change, live: set[KasminaSeed]) -> set[KasminaSeed]:
        """Which seeds are live once a change has been made, and all before it, where ``live`` are now."""
        live = set(live)
        for other in self._waiting:
            other.apply_to(live)
            if other is change:
                break
        return live

    def delay(self, change: Change) -> None:
        """Let the others go before one that waits, until what it was put off for is over."""
        self._waiting.remove(change)
        self._put_off.append(change)

    def take_back(self) -> list[Future[None]]:
        """Queue again what was put off until now; returns what the others wait for."""
        over = [change for change in self._put_off if change.until is None or change.until.done()]
        self._put_off = [change for change in self._put_off if change not in over]
        self._waiting += over
        return [change.until for change in self._put_off if change.until is not None]
