"""Germination: the future of a seed's body going live."""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from esper_fx.checks import real

if TYPE_CHECKING:
    from esper_fx.seed import KasminaSeed


class Germination:
    """What ``germinate`` returns: done when the seed's body is live, or when that has failed.

    Awaitable: ``await germination`` returns the seed or raises the error.
    """

    def __init__(self, seed: KasminaSeed) -> None:
        self.seed = seed
        self._done = threading.Event()
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether the seed is live or has failed; never blocks."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until done; call it between steps. Returns False if ``timeout`` seconds passed first; 0 or less only looks.

        On the thread that runs the model the switch is made here, without waiting for the next forward.

        Raises:
            ArgumentError: ``timeout`` is neither a number nor None.
        """
        return self.seed.growth.changes.wait_for(self, timeout)

    def exception(self, timeout: float | None = 0.0) -> BaseException | None:
        """Why the germination failed, or None if it has not (yet). With a ``timeout`` it waits first, as :meth:`wait` does."""
        if real(timeout) != 0.0:
            self.wait(timeout)
        return self._error

    def __await__(self) -> Generator[Any, None, KasminaSeed]:
        yield from self.seed.growth.changes.wait_without_thread(self).__await__()
        if self._error is not None:
            raise self._error
        return self.seed

    def settle(self, error: BaseException | None = None) -> None:
        """Mark as done; for the engine."""
        self._error = error
        self._done.set()

    def __repr__(self) -> str:
        state = "pending" if not self.done() else "live" if self._error is None else f"failed: {self._error}"
        return f"Germination({self.seed.name!r}, {state})"
