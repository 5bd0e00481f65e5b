"""Give a module of a morphed model its new forward: a spliced graph, or its own with a seed on what it returns."""

from __future__ import annotations

import functools
from typing import Any

from torch import fx, nn

from esper_fx.morphing.branch import NAMESPACE, Branch, mangled
from esper_fx.morphing.original import OWN_FORWARD, Original, Swap
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
    module.__class__ = type(f"Traced{type(module).__name__}", (plain_base(module),), members)
    return draft.graph


def adopt_python(module: nn.Module, site: str, branch: Branch) -> None:
    """Let a module whose forward stays Python hand what it returns to the seed of its site.

    A linear kind of module hands over its first positional argument as well, as the source.
    """
    module.__dict__[NAMESPACE] = branch
    original = type(module).forward
    if "forward" in vars(module):
        vars(module)[OWN_FORWARD] = vars(module).pop("forward")
        original = _own_forward
    name = mangled(site)
    sources = 1 if is_linear_kind(module) else 0

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = original(self, *args, **kwargs)
        mine = self.esper
        return getattr(mine.seeds, name)(value, mine.state.alpha, mine.state.gate, *args[:sources])

    members = Original(type(module), site, Swap.PYTHON).members()
    module.__class__ = type(f"Seeded{type(module).__name__}", (type(module),), {**members, "forward": forward})


def _own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return vars(module)[OWN_FORWARD](*args, **kwargs)


def plain_base(module: nn.Module) -> type[nn.Module]:
    """The class to derive from: graph modules run their own graph."""
    return nn.Module if isinstance(module, fx.GraphModule) else type(module)
