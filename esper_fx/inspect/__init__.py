"""Look inside a morphed model while it works: summaries, its graph, a report. Reads only; nothing imports this package.

It may import everything of esper_fx, and networkx; rich only when text is made.
"""

from __future__ import annotations

from esper_fx.inspect.collect import summary
from esper_fx.inspect.dot import to_dot
from esper_fx.inspect.network import graph
from esper_fx.inspect.node_link import to_json
from esper_fx.inspect.page import report
from esper_fx.inspect.records import PendingChange, ProgramSummary, RegionSummary, SeedSummary, Summary

__all__ = [
    "PendingChange",
    "ProgramSummary",
    "RegionSummary",
    "SeedSummary",
    "Summary",
    "graph",
    "report",
    "summary",
    "to_dot",
    "to_json",
]
