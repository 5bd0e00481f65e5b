"""What the code of a model sees of it: the branch with the seeds is not among the parts that it goes through."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from esper_fx.morphing.branch import NAMESPACE
from esper_fx.morphing.original import original_kind
from esper_fx.passes.hazards import names_in_forward

#: A forward that names one of these may go through all parts of its model.
_ALL_PARTS = frozenset(
    f"{named}{parts}" for named in ("", "named_") for parts in ("children", "modules", "parameters", "buffers")
) | {"_modules", "_buffers", "_parameters", "state_dict"}


class Items:
    """A container's items: those that it had before it was morphed."""

    def __iter__(self) -> Iterator[Any]:
        return iter(_items(self) if isinstance(self, nn.ModuleDict) else _items(self).values())

    def __len__(self) -> int:
        return len(_items(self))

    def __getitem__(self, key: Any) -> Any:
        return without_branch(self)[key]  # type: ignore[arg-type, index]

    def __contains__(self, key: Any) -> bool:
        return key in iter(self)


class NamedItems(Items):
    """The same of a container whose items have names."""

    def keys(self) -> Any:
        """Their names."""
        return _items(self).keys()

    def values(self) -> Any:
        """The modules."""
        return _items(self).values()

    def items(self) -> Any:
        """Names and modules."""
        return _items(self).items()


def items_of(kind: type[nn.Module]) -> tuple[type, ...]:
    """What the class of a morphed container must derive from, before the container's class."""
    if issubclass(kind, nn.ModuleDict):
        return (NamedItems,)
    return (Items,) if issubclass(kind, nn.Sequential | nn.ModuleList) else ()


def goes_through_parts(module: nn.Module) -> bool:
    """Whether a module's forward may go through all its parts, instead of calling them by name."""
    return not _ALL_PARTS.isdisjoint(names_in_forward(type(module)))


def without_branch(model: nn.Module) -> nn.Module:
    """A module of the original's class that shares all of a model's attributes and parts but the branch."""
    bare: nn.Module = object.__new__(original_kind(model))
    vars(bare).update(vars(model), _modules=_items(model))
    return bare


def on_parts(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that sees a model without its branch; what it assigns to attributes is assigned to the model."""

    @functools.wraps(forward)
    def forward_without_branch(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bare = without_branch(self)
        try:
            return forward(bare, *args, **kwargs)
        finally:
            self._modules.update(vars(bare).pop("_modules"))
            vars(self).update(vars(bare))

    return forward_without_branch


def _items(model: Any) -> dict[str, nn.Module | None]:
    return {name: module for name, module in model._modules.items() if name != NAMESPACE}
