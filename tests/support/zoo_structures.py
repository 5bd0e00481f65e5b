"""Models that hold their parameters, buffers, hooks and parts in every way that PyTorch has. They map [B, D] to [B, D]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint


class Tied(nn.Module):
    """Two layers with one weight, one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.again = self.embed
        self.head = nn.Linear(4, 4)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(self.embed(x))))  # type: ignore[no-any-return]


class Repeated(nn.Module):
    """One block, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.block(x)
        return x


def chain(middle: nn.Module) -> nn.Module:
    """A module between two linear layers."""
    return nn.Sequential(nn.Linear(4, 4), middle, nn.Linear(4, 4))


class Scaled(nn.Module):
    """A module with a parameter of its own that is parametrized, and a part inside."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale)  # type: ignore[no-any-return]


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


def parametrized() -> nn.Module:
    """A user's module with a parametrized parameter."""
    net = Scaled()
    parametrize.register_parametrization(net, "scale", Positive())
    return chain(net)


def _halve(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output * 0.5


def _shift(_module: nn.Module, inputs: Any) -> Any:
    return (inputs[0] + 1, *inputs[1:])


def _double_gradient(_module: nn.Module, grad_inputs: Any, _grad_outputs: Any) -> Any:
    return tuple(None if grad is None else grad * 2 for grad in grad_inputs)


def hooked(*, root: bool) -> nn.Module:
    """Hooks before and after the forward and the backward of a part, or of the model itself."""
    net = chain(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    module = net if root else net[1]
    module.register_forward_hook(_halve)
    module.register_forward_pre_hook(_shift)
    module.register_full_backward_hook(_double_gradient)
    return net


class Averages(nn.Module):
    """Keeps a running mean in a buffer, by changing it in place, and counts its calls in another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)  # type: ignore[operator]
        self.calls.add_(1)  # type: ignore[operator]
        return x - self.mean


class Replaces(nn.Module):
    """Puts a new tensor in its buffer's place at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
        return self.inner(x - self.mean)  # type: ignore[no-any-return]


class Containers(nn.Module):
    """Containers within containers."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(4, 4), "b": chain(nn.Tanh())}) for _ in range(2)])
        self.head = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleDict)
            for name in stage:
                x = x + stage[name](x)
        return self.head(x)  # type: ignore[no-any-return]


class Recomputes(nn.Module):
    """Recomputes two of its blocks in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(chain(nn.Tanh()) for _ in range(3))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:2]:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.blocks[2](x)  # type: ignore[no-any-return]


class MixedPrecision(nn.Module):
    """A part in bfloat16 between two in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.middle = chain(nn.Tanh()).bfloat16()
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).bfloat16()).float())  # type: ignore[no-any-return]
