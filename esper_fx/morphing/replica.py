"""Copies of module trees that share every tensor with what they are copies of, and TorchScript modules as a whole."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from esper_fx._torch import HOOKS


def replica(net: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a module tree that shares parameters, buffers and other tensor attributes.

    Args:
        net: The tree.
        memo: As for `copy.deepcopy`: objects, by identity, that stand for others in the copy. It is filled, so that
            a second tree can be copied with the same.
    """
    memo = {} if memo is None else memo
    graph_modules = []
    for module in net.modules():
        for value in (*vars(module).values(), *module._parameters.values(), *module._buffers.values()):
            if type(value) not in _NO_TENSORS and isinstance(value, Tensor):
                memo[id(value)] = value
        if isinstance(module, torch.jit.ScriptModule):
            memo[id(module)] = module  # a copy would have parameters of its own
        elif isinstance(module, fx.GraphModule) and id(module) not in memo:
            # Its own way of copying itself loses attributes, hooks and which buffers are not for a state_dict.
            memo[id(module)] = type(module).__new__(type(module))
            graph_modules.append(module)
    result: nn.Module = _copy(net, memo)
    for module in graph_modules:
        twin = memo[id(module)]
        vars(twin).update(copy.deepcopy(vars(module), memo))
        type(twin).__name__ = type(module).__name__
        twin.graph = twin.graph  # compiles the forward into the copy's own class
    return result


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """What `copy.deepcopy` returns, several times faster for modules that leave copying to it."""
    kind: Any = type(value)
    if kind in _ATOMS:
        return value
    if (known := memo.get(id(value), memo)) is not memo:
        return known
    if kind is dict or kind is OrderedDict:
        twin = memo[id(value)] = kind()
        for key, item in value.items():
            twin[_copy(key, memo)] = _copy(item, memo)
        return twin
    if kind is set and not value:
        return memo.setdefault(id(value), set())
    if isinstance(value, nn.Module) and _copies_plainly(kind):
        module = memo[id(value)] = object.__new__(kind)
        # The memo must never see an object that does not outlive it, as this state.
        state = value.__getstate__()
        module.__setstate__({name: _attribute(name, x, memo) for name, x in state.items()})
        return module
    return copy.deepcopy(value, memo)


def _attribute(name: str, value: Any, memo: dict[int, Any]) -> Any:
    if type(value) in _ATOMS:
        return value
    if name in HOOKS and not value:
        return type(value)()  # half of what a module holds, and of nobody else's
    return _copy(value, memo)


_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, type})
_NO_TENSORS = _ATOMS | {dict, OrderedDict, list, tuple, set}


@cache
def _copies_plainly(kind: type[nn.Module]) -> bool:
    """Whether deepcopy would copy a module of this class attribute by attribute."""
    own = all(getattr(kind, name) is getattr(object, name) for name in ("__reduce__", "__reduce_ex__", "__new__"))
    special = hasattr(kind, "__deepcopy__") or hasattr(kind, "__getnewargs__") or hasattr(kind, "__getnewargs_ex__")
    slots = copyreg._slotnames(kind)  # type: ignore[attr-defined]
    return own and not special and not slots and kind not in copyreg.dispatch_table
