"""Give a module of a morphed model its new forward: a spliced graph, or its own with a seed on what it returns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from esper_fx.branch import NAMESPACE, Branch, mangled
from esper_fx.original import Original, Swap
from esper_fx.passes.pipeline import Draft
from esper_fx.site import is_linear_kind


def adopt(scope: str, draft: Draft, branch: Branch) -> fx.Graph:
    """Give the draft's module the graph as its forward."""
    assert draft.graph is not None
    module = draft.root
    # Reachable by the graph's names, but not a submodule: that it is of the whole model, once.
    module.__dict__[NAMESPACE] = branch
    members = Original(type(module), scope, Swap.TRACED).members()
    compiled = fx.GraphModule(nn.Module(), fx.Graph())
    compiled.graph = draft.graph  # not given at once, or it would look up all that the graph calls
    members["forward"] = type(compiled).forward
    base = type(module) if scope and not isinstance(module, fx.GraphModule) else plain_base(module)
    module.__class__ = type(f"Traced{type(module).__name__}", (base,), members)
    return draft.graph


def adopt_python(module: nn.Module, site: str, branch: Branch) -> None:
    """Let a module whose forward stays Python hand what it returns to the seed of its site.

    A linear kind of module hands over its first positional argument as well, as the source.
    """
    module.__dict__[NAMESPACE] = branch
    original = type(module).forward
    name = mangled(site)
    sources = 1 if is_linear_kind(module) else 0

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = original(self, *args, **kwargs)
        mine = self.esper
        return getattr(mine.seeds, name)(value, mine.state.alpha, mine.state.gate, *args[:sources])

    members = Original(type(module), site, Swap.PYTHON).members()
    module.__class__ = type(f"Seeded{type(module).__name__}", (type(module),), {**members, "forward": forward})


def plain_base(module: nn.Module) -> type[nn.Module]:
    """The class to derive from: containers would count the seeds among their items, graph modules run their own graph."""
    others = (nn.Sequential, nn.ModuleList, nn.ModuleDict, fx.GraphModule)
    return nn.Module if isinstance(module, others) else type(module)


def in_turn(names: list[str]) -> Callable[..., Any]:
    """The forward of a Sequential that stays Python: its own would count the seeds among its items."""

    def forward(self: nn.Module, input: Any) -> Any:
        for name in names:
            input = getattr(self, name)(input)
        return input

    return forward
