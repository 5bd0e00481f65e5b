"""Find out whether the code around a module reaches into it: calls its parts past its own forward."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from functools import lru_cache

from torch import nn

from esper_fx.passes.bytecode import inner_codes, steps_of
from esper_fx.passes.hazards import codes_of_forward

_NONE_TESTS = ("IF_NONE", "IF_NOT_NONE")


def is_reached_into(module: nn.Module, name: str, callers: Iterable[type[nn.Module]]) -> bool:
    """Whether code of a module's callers may call parts of it by themselves.

    It may where it names a part, as in ``self.backbone.stem(x)``, or takes a container that can be gone through for
    something else than to call it, as in ``for block in self.blocks``. What happens under other names goes unseen.

    Args:
        module: The module.
        name: What it is called in the module that it is in.
        callers: Classes of the modules that it is in, as far as their forwards are Python.
    """
    uses = {use for caller in callers for use in _uses(caller)}  # type: ignore[arg-type]
    if any((name, part) in uses for part, _ in module.named_children()):
        return True
    return isinstance(module, nn.Sequential | nn.ModuleDict | nn.ModuleList) and (name, "") in uses


@lru_cache(maxsize=4096)
def _uses(kind: type[nn.Module]) -> frozenset[tuple[str, str]]:
    """Attributes that the code of a forward loads other than to call them or to ask whether they are None.

    Each comes with the attribute that is loaded from it, or with nothing.
    """
    return frozenset(use for code in codes_of_forward(kind) for use in _uses_in(code))


def _uses_in(code: types.CodeType) -> Iterator[tuple[str, str]]:
    steps = steps_of(code)
    for step, after, then in zip(steps, steps[1:], steps[2:], strict=False):
        if step.name != "LOAD_ATTR":
            continue
        name = str(step.values[0])
        if after.name in ("LOAD_ATTR", "LOAD_METHOD"):
            yield name, str(after.values[0])
        elif not (after.name.endswith(_NONE_TESTS) or then.name == "IS_OP"):
            yield name, ""
    for inner in inner_codes(code):
        yield from _uses_in(inner)
