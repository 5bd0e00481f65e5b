"""Rehearse a ``load_state_dict``: find out what PyTorch would say to it while nothing changes."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper_fx.errors import CheckpointError

_HEADER = "Error(s) in loading state_dict"
#: Of a module's attributes only these take part in loading; what else a replica has, it shares with the original.
_COPIED = ("_parameters", "_buffers", "_modules", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def hollow(module: nn.Module) -> nn.Module:
    """A replica of a module tree whose tensors have no data; it can be loaded into without an effect."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if name not in _COPIED and not isinstance(value, nn.Module):
                memo[id(value)] = value
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = _without_data(tensor)
    return copy.deepcopy(module, memo)


def rehearse(
    replica: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    *,
    after: Callable[..., None],
    strict: bool,
    metadata: Mapping[str, Any] | None,
    what: str,
) -> None:
    """Load a state dict into a hollow replica.

    Args:
        replica: What :func:`hollow` made of the module that is about to be loaded.
        state_dict: What it is about to be loaded with: the keys begin with ``prefix``.
        prefix: The module's place in what is loaded, with a dot at its end, or nothing.
        after: The hook that asks for this rehearsal: it and those before it have been called already.
        strict: Whether the keys must match.
        metadata: What ``state_dict()`` noted of the modules' versions, if that is known.
        what: Name of the module, for the message.

    Raises:
        CheckpointError: PyTorch would refuse it; the message holds PyTorch's own, with every key concerned.
    """
    hooks = replica._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        del hooks[key]
        if getattr(hook, "hook", None) is after:
            break
    for name in reversed(prefix.split(".")[:-1]):
        holder = nn.Module()
        holder.add_module(name, replica)
        replica = holder
    given: OrderedDict[str, Any] = OrderedDict(state_dict)
    if metadata is not None:
        given._metadata = metadata  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is copied into tensors without data
            nn.Module.load_state_dict(replica, given, strict=strict)
    except RuntimeError as error:
        if not str(error).startswith(_HEADER):
            raise
        details = str(error).partition("\n")[2]
        raise CheckpointError(
            f"the checkpoint does not fit this {what}, and nothing of it was loaded:\n{details}"
        ) from None


def _without_data(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
