"""Kernels in memory: least recently used out first, bounded by number and bytes, except for what is pinned."""

from __future__ import annotations

from collections import Counter, OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A kernel in memory.

    Attributes:
        kernel: The kernel.
        nbytes: What it counts for.
        done: A completed future of the kernel: what every fetch of it returns.
    """

    kernel: Any
    nbytes: int
    done: Future[Any]


class PinnedLru:
    """The rules of the kernel cache's memory, without its locks.

    Methods that drop entries return them, so that the caller can let go of them outside its lock: the finalizer of a
    kernel may be slow. Every step leaves the fields consistent, because the garbage collector may run a finalizer
    in the middle of a method, and that may unpin what its object used.
    """

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.evictions = 0
        self.entries: OrderedDict[str, Entry] = OrderedDict()
        self._pins: Counter[str] = Counter()

    @property
    def pinned(self) -> int:
        """How many entries are pinned."""
        return sum(digest in self._pins for digest in self.entries)

    def touch(self, digest: str) -> Entry | None:
        """Returns an entry and makes it the most recently used."""
        entry = self.entries.get(digest)
        if entry is not None:
            self.entries.move_to_end(digest)
        return entry

    def insert(self, digest: str, kernel: Any, nbytes: int) -> list[Entry | None]:
        """Inserts or replaces an entry; one that alone exceeds ``max_bytes`` is not kept unless pinned."""
        done: Future[Any] = Future()
        done.set_result(kernel)
        dropped = [self._remove(digest)]
        if nbytes <= self.max_bytes or digest in self._pins:
            self.entries[digest] = Entry(kernel, nbytes, done)
            self.nbytes += nbytes
        return dropped + self._shrink()

    def pin(self, digest: str) -> None:
        """Adds a pin; the entry need not be there yet."""
        self._pins[digest] += 1

    def unpin(self, digest: str) -> list[Entry | None]:
        """Takes one pin back and shrinks to the bounds; raises KeyError if there is none."""
        pins = self._pins.get(digest, 0)
        if pins == 0:
            raise KeyError(digest)
        if pins > 1:
            self._pins[digest] = pins - 1
            return []
        del self._pins[digest]
        return self._shrink()

    def clear(self) -> list[Entry | None]:
        """Removes what is not pinned."""
        return [self._remove(digest) for digest in list(self.entries) if digest not in self._pins]

    def _over(self) -> bool:
        return len(self.entries) > self.max_entries or self.nbytes > self.max_bytes

    def _shrink(self) -> list[Entry | None]:
        evicted: list[Entry | None] = []
        if self._over():
            for digest in list(self.entries):
                if not self._over():
                    break
                if digest not in self._pins:
                    evicted.append(self._remove(digest))
                    self.evictions += 1
        return evicted

    def _remove(self, digest: str) -> Entry | None:
        entry = self.entries.pop(digest, None)
        if entry is not None:
            self.nbytes -= entry.nbytes
        return entry
