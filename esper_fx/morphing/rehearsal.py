"""Call a copy of a model to learn what flows through it, without a trace left in the model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from esper_fx._torch import FakeTensor, FakeTensorMode, pytree, quiet_fakes
from esper_fx.checks import cause, shown
from esper_fx.errors import MorphError, SiteError
from esper_fx.passes.effects import Variables

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Inputs = Sequence[Any] | Mapping[str, Any]


def check_inputs(example_inputs: Any) -> None:
    """Refuse what cannot be the arguments of a call.

    Raises:
        MorphError: It is neither a sequence of arguments nor a mapping of keyword arguments.
    """
    if isinstance(example_inputs, Tensor):
        raise MorphError("example_inputs must be a tuple of arguments, such as (x,), not one tensor")
    kind = str if isinstance(example_inputs, Mapping) else object
    usable = isinstance(example_inputs, Mapping | Sequence) and not isinstance(example_inputs, str | bytes)
    if not usable or not all(isinstance(item, kind) for item in example_inputs):
        raise MorphError(
            f"example_inputs must be a tuple of arguments, such as (x,), or a dict of keyword arguments by name, not "
            f"{shown(example_inputs)}"
        )


def rehearse(
    net: nn.Module, example_inputs: Inputs, watch: Callable[[nn.Module, Callable[[], Any]], Result], name: str
) -> Result:
    """Call a copy of ``net`` once, in the mode it is in, and return what ``watch(copy, call)`` makes of it.

    The copy has fake tensors, so that nothing is computed. Where that does not work, because what the model does depends
    on values, it is called for real: without gradients, with buffers and a random state of its own.

    Args:
        net: The model.
        example_inputs: A tuple of arguments, or a dict of keyword arguments.
        watch: Must call ``call`` once.
        name: What to call the model in messages.

    Raises:
        MorphError: The inputs do not fit the model.
    """
    try:
        return _on_fakes(net, example_inputs, watch)
    except SiteError:
        raise
    except Exception as error:
        logger.info("%s cannot run on fake tensors, so it is called for real: %s", name, error)
    try:
        return _for_real(net, example_inputs, watch)
    except SiteError:
        raise
    except Exception as error:
        raise MorphError(f"example_inputs do not fit {name}: {cause(error)}") from error


def _on_fakes(net: nn.Module, inputs: Inputs, watch: Callable[[nn.Module, Callable[[], Any]], Result]) -> Result:
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def is_fake(value: Any) -> bool:
        return type(value) is FakeTensor and value.fake_mode is mode

    variables = Variables(net)
    own = dict.fromkeys((*net.parameters(), *net.buffers(), *_loose_tensors(net)))
    copied = copy.deepcopy(net, {id(tensor): mode.from_tensor(tensor) for tensor in own})
    fakes = pytree.tree_map_only(Tensor, mode.from_tensor, inputs)
    try:
        with quiet_fakes(), mode, torch.no_grad():
            return watch(copied, lambda: _call(copied, fakes))
    finally:  # what the code keeps outside the copy, such as masks by their size, outlives it
        variables.take_back(is_fake)


def _for_real(net: nn.Module, inputs: Inputs, watch: Callable[[nn.Module, Callable[[], Any]], Result]) -> Result:
    memo = {id(parameter): parameter for parameter in net.parameters()}
    computed = [tensor for tensor in _loose_tensors(net) if not tensor.is_leaf]  # copy.deepcopy refuses these
    copied = copy.deepcopy(net, {**{id(tensor): tensor.detach().clone() for tensor in computed}, **memo})
    values = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), inputs)
    devices = sorted({t.device.index or 0 for t in net.parameters() if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        return watch(copied, lambda: _call(copied, values))


def _loose_tensors(net: nn.Module) -> list[Tensor]:
    """Tensors that are plain attributes of modules: a copy on fake tensors must not write into them."""
    return [value for module in net.modules() for value in vars(module).values() if isinstance(value, Tensor)]


def _call(net: nn.Module, inputs: Inputs) -> Any:
    return net(**inputs) if isinstance(inputs, Mapping) else net(*inputs)
