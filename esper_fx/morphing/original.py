"""What morph changed about a module, written down so that unmorph can take it back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import nn

Footprint = Mapping[str, frozenset[Any]]
"""Names of a module's attributes, each with its keys where it is a dictionary (submodules, hooks)."""


class Swap(StrEnum):
    """Why a module has another class than its own."""

    TRACED = "traced"
    """Its forward is a spliced graph."""
    PYTHON = "python"
    """Its forward is its own; it may have a seed on what it returns."""


@dataclass(frozen=True)
class Original:
    """The class that a module had, kept on the class that it has.

    Attributes:
        kind: The class before.
        scope: The module's qualified name in the model.
        how: Why the class was changed.
    """

    kind: type[nn.Module]
    scope: str
    how: Swap

    def members(self) -> dict[str, Any]:
        """What to put into the namespace of the new class."""
        kind = self.kind

        @functools.wraps(kind.__init__)
        def __init__(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            # Called by code of the module's own, as in `type(self)(...)`, the class makes what it has always made.
            module.__class__ = kind
            module.__init__(*args, **kwargs)  # type: ignore[misc]

        return {_KEY: self, "__init__": __init__}


_KEY = "_esper_original"
OWN_FORWARD = "_esper_own_forward"
"""Where a module keeps a forward that was an attribute of it, while its class's forward is another."""


def original_of(module: nn.Module) -> Original | None:
    """What a module was before its class was changed, or None where it was not."""
    found: Original | None = getattr(type(module), _KEY, None)
    return found


def original_kind(module: nn.Module) -> type[nn.Module]:
    """The class of a module before anything of ours changed it."""
    kind = type(module)
    while (before := getattr(kind, _KEY, None)) is not None:
        kind = before.kind
    return kind


def footprint(module: nn.Module) -> Footprint:
    """What a module has now, by name."""
    return {name: frozenset(value) if isinstance(value, dict) else frozenset() for name, value in vars(module).items()}


def additions(module: nn.Module, before: Footprint) -> Footprint:
    """What a module has beyond an earlier footprint; a name that is new as a whole comes without keys."""
    added = {name: keys - before.get(name, frozenset()) for name, keys in footprint(module).items()}
    return {
        name: frozenset() if name not in before else keys for name, keys in added.items() if keys or name not in before
    }


def take_back(module: nn.Module, added: Footprint) -> None:
    """Remove additions from a module, or from a copy of it."""
    for name, keys in added.items():
        if not keys:
            vars(module).pop(name, None)
        for key in keys:
            vars(module)[name].pop(key, None)
