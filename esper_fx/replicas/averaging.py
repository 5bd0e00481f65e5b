"""Bodies in several processes: they begin with the same values, and their gradients are averaged."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from esper_fx import _torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from esper_fx.growth import Growth
    from esper_fx.seed import KasminaSeed


class Averaging:
    """Keeps the bodies of a model alike in the processes that train replicas of it.

    Gradients are averaged at the end of a backward pass, as `DistributedDataParallel` does with those of the modules that it
    knows, and in the same backward passes. What tells of one are hooks on the model's outputs and on the parameters of bodies.

    Args:
        growth: That of the model.
        group: What averages gradients on accelerators.
        voters: What takes tensors on CPUs to the others, as not every process group does.
    """

    def __init__(self, growth: Growth, group: ProcessGroup | None, voters: ProcessGroup) -> None:
        self._growth = growth
        self._group = group
        self._voters = voters
        self._size = distributed.get_world_size(group)
        self._lock = threading.Lock()
        self._backward: int | None = None  # the backward pass that was noticed last
        self._wrapped = False  # whether DistributedDataParallel has called the model
        self._averages = True  # whether the next backward pass does
        self._watched: Any = _torch.WeakIdKeyDictionary()
        self.share(seed.body for seed in growth.by_index if seed.body is not None)
        self.watch()

    @torch.no_grad()
    def share(self, bodies: Iterable[nn.Module]) -> None:
        """Give bodies the values that they have in the first process."""
        self._broadcast([tensor for body in bodies for tensor in (*body.parameters(), *body.buffers())])

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Give live bodies the buffers that they have in the first process."""
        self._broadcast([buffer for seed in self._live() if seed.body is not None for buffer in seed.body.buffers()])

    def _broadcast(self, tensors: list[Tensor]) -> None:
        for some in _by_kind(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in some])
            distributed.broadcast(flat, group=self._group_of(flat), group_src=0)
            _scatter(flat, some)

    def _group_of(self, tensor: Tensor) -> ProcessGroup | None:
        return self._voters if tensor.device.type == "cpu" else self._group

    def begin_forward(self) -> None:
        """The model is about to be called."""
        if torch.is_grad_enabled():
            wrapper = _torch.calling_wrapper()
            self._wrapped = self._wrapped or wrapper is not None
            self._averages = not self._wrapped if wrapper is None else wrapper.require_backward_grad_sync

    def end_forward(self, outputs: Any) -> None:
        """The model has returned these: a backward pass that begins at one of them may reach no body."""
        for output in _torch.pytree.tree_leaves(outputs):
            if isinstance(output, Tensor) and output.grad_fn is not None:
                output.register_hook(self._notice)

    def watch(self) -> None:
        """Notice backward passes through live bodies: with another backend nothing else tells of one."""
        for parameter in self._parameters():
            if parameter not in self._watched:
                self._watched[parameter] = parameter.register_post_accumulate_grad_hook(self._notice)

    def _live(self) -> list[KasminaSeed]:
        return [seed for seed in self._growth.by_index if seed.live]

    def _parameters(self) -> list[nn.Parameter]:
        bodies = [seed.body for seed in self._live() if seed.body is not None]
        found = dict.fromkeys(parameter for body in bodies for parameter in body.parameters())
        return [parameter for parameter in found if parameter.requires_grad]

    def _notice(self, _: Tensor) -> None:
        """A backward pass runs through the model: average the gradients of all bodies when it is over."""
        replicas = self._growth.replicas
        if replicas is None or replicas.averaging is not self or not self._averages:
            return
        with self._lock:
            backward = _torch.backward_pass()
            if backward == self._backward:
                return
            self._backward = backward
        _torch.at_end_of_backward(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        """Average the gradients over the processes. What was averaged before stays as it is, so they may accumulate."""
        for some in _by_kind(self._parameters()):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
            used = some[0].new_ones(len(some))
            for number, parameter in enumerate(some):
                if parameter.grad is None:
                    used[number] = 0
            flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), used]).div_(self._size)
            distributed.all_reduce(flat, group=self._group_of(flat))
            _scatter(flat, gradients)
            if any(p.grad is None for p in some):  # only then, as it waits for the device
                for parameter, gradient, share in zip(some, gradients, flat[-len(some) :].tolist(), strict=True):
                    if share > 0:
                        parameter.grad = gradient


def _by_kind(tensors: Iterable[Any]) -> list[list[Any]]:
    """Tensors of one dtype and device each, in their order."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Any]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())


def _scatter(flat: Tensor, tensors: list[Tensor]) -> None:
    """Write what lies one after the other in ``flat`` to tensors, in their order."""
    parts = flat[: sum(tensor.numel() for tensor in tensors)].split([tensor.numel() for tensor in tensors])
    _torch.copy_each([part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)], tensors)
