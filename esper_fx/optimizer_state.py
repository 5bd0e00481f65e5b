"""An optimizer's saved state, matched to its parameters by their names in the model.

PyTorch matches by position. Parameters of grown modules join in the order of their germinations, and leave; after a restart
they join in the order of their sites, or sit in the optimizer from the start. Their names stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from esper_fx.errors import OptimizerError

NAMES = "esper_names"
"""Key in a saved parameter group: the names of its parameters, in order."""

SHAPES = "esper_shapes"
"""Key in a saved parameter group: their shapes."""


def add_names(optimizer: Optimizer, state_dict: dict[str, Any], models: Sequence[nn.Module]) -> None:
    """Note names and shapes of the parameters in what ``optimizer.state_dict()`` returns."""
    names = _names(optimizer, models)
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        saved[NAMES] = [names[id(parameter)] for parameter in group["params"]]
        saved[SHAPES] = [list(parameter.shape) for parameter in group["params"]]


def match_names(optimizer: Optimizer, state_dict: dict[str, Any], models: Sequence[nn.Module]) -> dict[str, Any] | None:
    """Put the parameters of an optimizer into the groups and the order of a saved state.

    Args:
        optimizer: The optimizer that is about to be loaded.
        state_dict: The saved state.
        models: The models that give parameters their names, in the order in which they were attached.

    Returns:
        What PyTorch may now load by position, or None if the state was saved without names.

    Raises:
        OptimizerError: The state is of other parameters; nothing has changed.
    """
    groups = state_dict["param_groups"]
    if not any(NAMES in group for group in groups):
        return None
    names = _names(optimizer, models)
    held = {names[id(parameter)]: parameter for group in optimizer.param_groups for parameter in group["params"]}
    _check(optimizer, groups, held)
    spelled = _own_names(optimizer)
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group["params"][:] = [held[name] for name in saved[NAMES]]
        if "param_names" in group:
            group["param_names"][:] = [
                spelled.get(id(parameter), names[id(parameter)]) for parameter in group["params"]
            ]
    plain = [{key: value for key, value in saved.items() if key not in (NAMES, SHAPES)} for saved in groups]
    return {**state_dict, "param_groups": plain}


def match_what_was_loaded(optimizer: Optimizer, models: Sequence[nn.Module]) -> None:
    """An optimizer was loaded before it was attached, and so by position: move the state to the parameters it is of.

    Raises:
        OptimizerError: The state is of other parameters; nothing has changed.
    """
    if not any(NAMES in group for group in optimizer.param_groups):
        return
    fitted = match_names(optimizer, optimizer.state_dict(), models)
    if fitted is not None:
        optimizer.load_state_dict(fitted)


def _check(optimizer: Optimizer, saved: list[dict[str, Any]], held: Mapping[str, Tensor]) -> None:
    kind = type(optimizer).__name__
    problems = []
    if len(saved) != len(optimizer.param_groups):
        problems.append(f"it has {len(saved)} parameter groups, this {kind} has {len(optimizer.param_groups)}")
    if any(len(group.get(NAMES, ())) != len(group["params"]) for group in saved):
        problems.append("it does not name all its parameters")
    there = {
        name: shape for group in saved for name, shape in zip(group.get(NAMES, ()), group.get(SHAPES, ()), strict=False)
    }
    if missing := [name for name in held if name not in there]:
        problems.append(f"it lacks {_list(missing)}")
    if unexpected := [name for name in there if name not in held]:
        problems.append(f"it has {_list(unexpected)}, which this {kind} does not hold")
    for name, parameter in held.items():
        if name in there and list(parameter.shape) != list(there[name]):
            problems.append(f"{name} has shape {list(there[name])} in it, {list(parameter.shape)} here")
    if problems:
        raise OptimizerError(
            f"the optimizer's saved state is of other parameters, and nothing of it was loaded: {'; '.join(problems)}. "
            "Load the model first, so that it has the same modules, and attach() the optimizer before it is loaded"
        )


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def _names(optimizer: Optimizer, models: Sequence[nn.Module]) -> dict[int, str]:
    """The name of every parameter, by identity; what is of no model has its number among those."""
    names: dict[int, str] = {}
    for number, model in enumerate(models):
        for name, parameter in model.named_parameters():
            names.setdefault(id(parameter), name if number == 0 else f"{name} of model {number}")
    foreign = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
    return names | {id(parameter): f"parameter {number} of no model" for number, parameter in enumerate(foreign)}


def _own_names(optimizer: Optimizer) -> dict[int, str]:
    """The names that an optimizer made from ``named_parameters()`` keeps itself, by identity of the parameter."""
    return {
        id(parameter): name
        for group in optimizer.param_groups
        for parameter, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }
