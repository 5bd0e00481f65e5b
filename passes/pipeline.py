"""The ordered list of passes that make a morphed graph, and the record each leaves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from esper_fx.passes.operations import Operations

logger = logging.getLogger(__name__)


@dataclass
class Draft:
    """One traced module on its way to a spliced graph.

    Attributes:
        root: The module whose forward the graph becomes.
        graph: The graph, None until ``trace`` has run.
        outputs: For each module called inside the graph, by qualified name, what its calls returned, in order of the calls;
            under the empty name what the whole graph returns.
        inputs: For each of these calls the first value it was given, None where that is no node.
        traced: What the graph computed as traced, before any pass changed it; what ``check`` compares with.
        sites: Site name to the nodes a seed follows, one node per visit; filled by ``find_sites``.
        sources: Site name to the inputs of its module, one node per visit, where a body may read them; filled by
            ``find_sources``.
        seeds: Site name to the target of its seed module; filled by ``splice``.
        checked: The nodes and what they take, as ``check`` last saw the graph and found it sound.
    """

    root: nn.Module
    graph: fx.Graph | None = None
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    inputs: dict[str, list[fx.Node | None]] = field(default_factory=dict)
    traced: Operations = ()
    sites: dict[str, list[fx.Node]] = field(default_factory=dict)
    sources: dict[str, list[fx.Node]] = field(default_factory=dict)
    seeds: dict[str, str] = field(default_factory=dict)
    checked: tuple[Any, ...] = ()


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: wall seconds, node counts before and after, and whether it changed anything."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    changed: bool

    def __str__(self) -> str:
        change = f"{self.nodes_before} -> {self.nodes_after} nodes" if self.changed else "no change"
        return f"{self.name:<12} {self.seconds * 1e3:8.2f} ms  {change}"


Pass = Callable[[Draft], bool]


@dataclass(frozen=True)
class Pipeline:
    """An ordered, printable list of named passes over a :class:`Draft`.

    Attributes:
        passes: Pairs of name and pass; a pass returns whether it changed the draft.
        invariants: Called after every pass with the draft; raises where the graph is no longer sound.
    """

    passes: Sequence[tuple[str, Pass]]
    invariants: Callable[[Draft], None]

    def run(self, draft: Draft) -> list[PassRecord]:
        """Run every pass in order and check the invariants after each."""
        records = []
        for name, transform in self.passes:
            before = _size(draft)
            started = time.perf_counter()
            changed = transform(draft)
            record = PassRecord(name, time.perf_counter() - started, before, _size(draft), changed)
            self.invariants(draft)
            logger.debug("%s", record)
            records.append(record)
        return records

    def __str__(self) -> str:
        return " -> ".join(name for name, _ in self.passes)


def _size(draft: Draft) -> int:
    return len(draft.graph.nodes) if draft.graph is not None else 0
