"""Notice what running a forward did besides returning a value, and take it back.

A forward may keep things: in an attribute, in a list or a dict, in its class or in a global variable. Done with
stand-ins for tensors, that would leave these behind; done while tracing, it would never be done again.
"""

from __future__ import annotations

import functools
import gc
import operator
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import CellType, FunctionType, ModuleType
from typing import Any

from torch import nn

from esper_fx._torch import HOOKS

Foreign = Callable[[Any], bool]
"""Whether an object is a stand-in, which must not stay."""

_CONTAINERS = (dict, list, set, deque)
#: How deep stand-ins are looked for in containers.
_DEPTH = 3


class Attributes:
    """The attributes of a network's modules as they are now, and what is in the containers among them.

    Args:
        root: The network. Modules of torch.nn are left out: their code is known.
    """

    def __init__(self, root: nn.Module) -> None:
        own = ((name, vars(module)) for name, module in root.named_modules() if not _of_torch(type(module)))
        self._before = [(name, attributes, dict(attributes), _contents(attributes)) for name, attributes in own]

    def take_back(self) -> str:
        """Undo all that has changed since; returns what changed first in words, empty if nothing did."""
        found = ""
        for module, attributes, before, contents in self._before:
            rebound, changed = _rebound(attributes, before), _changed(contents)
            for name in rebound | changed:
                found = found or f"attribute {name!r} of {module or 'the model'}"
            for name in rebound:
                if name in before:
                    attributes[name] = before[name]
                else:
                    del attributes[name]
            for name in changed:
                _fill(*contents[name])
        return found


class Variables:
    """The variables of the classes and the files of a network's modules as they are now.

    Args:
        root: The network. PyTorch's classes and files are left out.
    """

    def __init__(self, root: nn.Module) -> None:
        spaces = _namespaces({type(module) for module in root.modules()})
        self._before = [(space, dict(vars(space)), _contents(vars(space))) for space in spaces]
        caches = {id(cache): cache for _, before, _ in self._before for cache in _caches(before.values())}
        self._caches = [(cache, cache.cache_info().misses) for cache in caches.values()]

    def take_back(self, foreign: Foreign) -> str:
        """Remove all stand-ins from them; returns what has changed since in words, empty if nothing did.

        A cache of `functools` that holds one is emptied, and counts as unchanged. What was only assigned to a variable
        and holds no stand-in does not count: such is what is made when it is first needed, and may stay.
        """
        found = ""
        for space, before, contents in self._before:
            changed = _changed(contents)
            for name, value in [item for item in vars(space).items() if not _is_special(item[0])]:
                if isinstance(value, _CONTAINERS):
                    spoilt = remove(value, foreign)
                elif spoilt := holds(value, foreign):
                    setattr(space, name, before[name]) if name in before else delattr(space, name)
                if spoilt or name in changed:
                    found = found or f"{name!r} of {space.__name__}"
        for cache, misses in self._caches:
            if cache.cache_info().misses != misses and any(holds(held, foreign) for held in gc.get_referents(cache)):
                cache.cache_clear()
        return found


def holds(value: Any, foreign: Foreign, depth: int = _DEPTH) -> bool:
    """Whether a value is a stand-in, or a container with one in it."""
    if foreign(value):
        return True
    if depth == 0 or not isinstance(value, (*_CONTAINERS, tuple)):
        return False
    return any(holds(item, foreign, depth - 1) for item in _content(value))


def remove(container: Any, foreign: Foreign, depth: int = _DEPTH) -> bool:
    """Remove stand-ins from a container and the containers in it, in place; returns whether there were any."""
    if not holds(container, foreign, depth):
        return False
    if isinstance(container, dict):
        for key, value in list(container.items()):
            if not isinstance(value, _CONTAINERS):
                if holds((key, value), foreign):
                    del container[key]
            else:
                remove(value, foreign, depth - 1)
        return True
    kept = [item for item in container if isinstance(item, _CONTAINERS) or not holds(item, foreign, depth - 1)]
    for item in kept:
        if isinstance(item, _CONTAINERS):
            remove(item, foreign, depth - 1)
    _fill(container, kept)
    return True


_Contents = dict[str, tuple[Any, list[Any]]]
"""Containers by name, each with what was in it: of a dict its keys and then its values."""


def _contents(variables: Mapping[str, Any]) -> _Contents:
    return {
        name: (value, _content(value))
        for name, value in variables.items()
        if isinstance(value, _CONTAINERS) and name not in HOOKS and not _is_special(name)
    }


def _content(container: Collection[Any]) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _fill(container: Any, content: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        half = len(content) // 2
        container.update(zip(content[:half], content[half:], strict=True))
    else:
        container.update(content) if isinstance(container, set) else container.extend(content)


def _changed(contents: _Contents) -> set[str]:
    return {name for name, (container, content) in contents.items() if not _same(content, _content(container))}


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _rebound(variables: Mapping[str, Any], before: Mapping[str, Any]) -> set[str]:
    if _same([*variables, *variables.values()], [*before, *before.values()]):
        return set()
    absent = object()
    names = variables.keys() | before.keys()
    return {name for name in names if variables.get(name, absent) is not before.get(name, absent)}


def _namespaces(kinds: set[type[nn.Module]]) -> list[type | ModuleType]:
    """The classes and those they derive from, and the files that define them, but not PyTorch's."""
    classes = dict.fromkeys(
        base for kind in kinds for base in kind.__mro__ if not _of_torch(base) and base is not object
    )
    files = dict.fromkeys(sys.modules[kind.__module__] for kind in classes if kind.__module__ in sys.modules)
    return [*classes, *files]


def _of_torch(kind: type | FunctionType) -> bool:
    return str(kind.__module__).partition(".")[0] == "torch"


def _caches(values: Iterable[Any], depth: int = _DEPTH) -> Iterator[Any]:
    """The caches of `functools` among functions and behind them, in their closures."""
    for value in values:
        function = getattr(value, "__func__", value) if isinstance(value, staticmethod | classmethod) else value
        if isinstance(function, functools._lru_cache_wrapper):
            yield function
        elif depth and isinstance(function, FunctionType) and function.__closure__ and not _of_torch(function):
            yield from _caches(map(_held, function.__closure__), depth - 1)


def _held(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # its variable has no value yet
        return None


def _is_special(name: str) -> bool:
    return name.startswith("__")
