"""Tensors, modules and autograd as they run: what PyTorch knows of them and does not tell."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def storage_id(tensor: torch.Tensor) -> int:
    """What tells the memory of tensors apart while they live, also of tensors without data.

    What a transform of torch.func wraps around a tensor shares its memory. Any other tensor without memory stands for itself.
    """
    inner = tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(inner):
        inner = torch._C._functorch.get_unwrapped(inner)
    try:
        return int(inner.untyped_storage()._cdata)
    except NotImplementedError:
        return id(tensor)


def is_owned(tensor: Tensor) -> bool:
    """Whether Dynamo has found a tensor in a module, as its parameter or buffer."""
    return isinstance(tensor, nn.Parameter) or hasattr(tensor, "_dynamo_static_input_type")


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Keep fake tensors from logging an error for what their caller expects and handles."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def triton_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.triton_op` for an operator that changes no argument; says nothing where there is no triton.

    The operator is decomposed where a graph is functionalised, so that Inductor sees the kernels in it, or the ATen
    operators where the tensors are on a device without them.
    """

    def define(function: Callable[..., Any]) -> Any:
        log = logging.getLogger("torch._library.triton")
        disabled, log.disabled = log.disabled, True
        try:
            return torch.library.triton_op(name, function, mutates_args=())
        finally:
            log.disabled = disabled

    return define


def unwrapped(module: Any) -> Any:
    """The module that `torch.compile` and `DistributedDataParallel` were given, or the module itself where none was."""
    while isinstance(module, nn.Module):
        name = "module" if isinstance(module, nn.parallel.DistributedDataParallel) else "_orig_mod"
        if name not in module._modules:
            break
        module = module._modules[name]
    return module


def copy_each(values: list[Tensor], to: list[Tensor]) -> None:
    """Copy tensors to others of their shapes, dtype and device, in as few kernels as that takes."""
    torch._foreach_copy_(to, values)


def calling_wrapper() -> nn.parallel.DistributedDataParallel | None:
    """The `DistributedDataParallel` that calls its module now, or None."""
    wrapper: nn.parallel.DistributedDataParallel | None = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    return wrapper


def load_in_progress() -> tuple[bool, dict[str, Any] | None]:
    """``strict`` and the metadata of the ``load_state_dict`` that is under way on this thread.

    A module's hook is told neither: PyTorch hands every one ``strict=True`` and the metadata of its own module. Where that
    cannot be found out, ``strict`` is True and the metadata None.
    """
    code = inspect.unwrap(nn.Module.load_state_dict).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return True, None
    metadata = frame.f_locals.get("metadata")
    if metadata is not None:  # PyTorch notes assign=True in it, for good
        metadata = {
            path: {key: value for key, value in entry.items() if key != "assign_to_params_buffers"}
            for path, entry in metadata.items()
        }
    return bool(frame.f_locals.get("strict", True)), metadata


def in_transform() -> bool:
    """Whether the calling thread is within a transform of torch.func, such as grad or vmap."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def backward_pass() -> int:
    """The number of the backward pass that the calling thread is in the middle of; -1: it is in none."""
    return int(torch._C._current_graph_task_id())


def in_backward() -> bool:
    """Whether the calling thread is in the middle of a backward pass."""
    return backward_pass() != -1


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Have something called when the backward pass that the calling thread is in the middle of has all gradients."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def may_be_repeated() -> bool:
    """Whether a forward pass is repeated, by checkpointing in the backward pass, or may be: hooks take what it saves."""
    return in_backward() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def saved_tensors_kept() -> contextlib.AbstractContextManager[Any]:
    """Keep what is computed meanwhile, on stand-ins for tensors, from hooks on saved tensors, such as checkpointing's."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return contextlib.nullcontext() if hooks is None else torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(tensor: Any) -> Any:
    return tensor
