"""Say for every module of a model whether it was traced, and if not, why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from esper_fx.passes.hazards import hazard
from esper_fx.passes.names import above, within
from esper_fx.passes.pipeline import Draft
from esper_fx.passes.trace import has_own_call


class How(StrEnum):
    """What tracing made of a module."""

    TRACED = "traced"
    """Its operations are nodes of a graph."""
    LEAF = "leaf"
    """One node of a graph: it is called as a whole."""
    INSIDE = "inside a leaf"
    """Part of a module that is called as a whole."""
    PYTHON = "python"
    """Its forward stays plain Python; its children are looked at one by one."""
    UNUSED = "unused"
    """The traced forward calls neither it nor anything in it."""


@dataclass(frozen=True)
class TracedModule:
    """What tracing made of one module: its qualified name ("" for the model), its class, how, and why ("" if traced)."""

    name: str
    kind: str
    how: How
    why: str = ""


class TraceReport(tuple[TracedModule, ...]):
    """One entry a module, in the order of ``named_modules``; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("module", "class", "how", "why"), *((m.name or "(the model)", m.kind, m.how, m.why) for m in self)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        )


def trace_report(
    modules: Mapping[str, nn.Module], drafts: Mapping[str, Draft], reasons: Mapping[str, str]
) -> TraceReport:
    """The report of a model.

    Args:
        modules: The model's modules by qualified name, before anything was added to them.
        drafts: What was traced, by the qualified name of the draft's root.
        reasons: Why a module could not be traced, by its qualified name.
    """
    entries: dict[str, TracedModule] = {}
    calls = {scope: _Calls.of(draft) for scope, draft in drafts.items()}
    scopes: dict[str, str | None] = {}
    for name, module in modules.items():
        around = name.rpartition(".")[0]
        scope = scopes[name] = name if name in drafts else scopes[around] if name and around in scopes else None
        if name in reasons:
            how, why = How.PYTHON, reasons[name]
        elif scope is None:
            how, why = How.UNUSED, "nothing in it has a forward that could be traced"
        else:
            parent = entries.get(around) if name != scope else None
            if parent is not None and parent.how in (How.LEAF, How.INSIDE):
                how, why = How.INSIDE, ""
            else:
                how, why = calls[scope].of_module(within(name, scope), module)
        entries[name] = TracedModule(name, type(module).__name__, how, why)
    return TraceReport(entries.values())


@dataclass(frozen=True)
class _Calls:
    """What a traced forward calls, by names within its scope.

    Attributes:
        leaves: The modules called as a whole.
        traced: The modules that were called, and those that they are in.
    """

    leaves: frozenset[str]
    traced: frozenset[str]

    @classmethod
    def of(cls, draft: Draft) -> _Calls:
        seeds = set(draft.seeds.values())
        nodes = draft.graph.nodes if draft.graph is not None else ()
        leaves = {str(node.target) for node in nodes if node.op == "call_module"} - seeds
        return cls(frozenset(leaves), frozenset({"", *draft.outputs}.union(*map(above, draft.outputs))))

    def of_module(self, name: str, module: nn.Module) -> tuple[How, str]:
        if name in self.leaves:
            return How.LEAF, _why_leaf(module)
        if name in self.traced:
            return How.TRACED, ""
        return How.UNUSED, "the traced forward does not call it"


def _why_leaf(module: nn.Module) -> str:
    if has_own_call(module):
        return "it has hooks, which would run while tracing instead of at every call"
    if is_parametrized(module):
        return "it is parametrized (torch.nn.utils.parametrize), and called as a whole"
    why = hazard(module) if not type(module).__module__.startswith("torch.nn") else None
    return "a layer of a library" if why is None else f"its forward {why}"
