"""Modules whose output a seed may sit at while its body reads their input, and LoRA at them written with hooks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Conv1D(nn.Module):
    """A linear map that keeps its weight as [in, out], shaped like the one GPT-2 has in transformers."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.nx = nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.2)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        size = x.size()[:-1] + (self.nf,)  # noqa: RUF005  (a size that is traced cannot be unpacked)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Named(nn.Linear):
    """A linear map of the user's own, which is traced."""

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


class Mixed(nn.Module):
    """Every linear kind of module on tokens: leaves, one called by keyword, a transposed one, one's own, a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.keyword = nn.Linear(8, 8)
        self.transposed = Conv1D(8, 8)
        self.own = Named(8, 8)
        self.shared = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = x + self.transposed(torch.tanh(self.keyword(input=x)))
        x = self.shared(self.own(x)) + self.shared(x.sin())
        return self.head(x)


class Convolutional(nn.Module):
    """Convolutions that move in every way, on maps [N, 4, 9, 9]."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=2)
        self.same = nn.Conv2d(8, 6, 3, padding="same", dilation=2)
        self.pointwise = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.strided(x))))
        x = self.pointwise(torch.tanh(self.same(x)))
        return self.head(x.mean(dim=(2, 3)))


@dataclass(frozen=True)
class Matrices:
    """LoRA at one module: what its two layers hold and the factor on their result."""

    down: Tensor
    up: Tensor
    scale: float

    def double(self) -> Matrices:
        """The same in float64."""
        return Matrices(self.down.double(), self.up.double(), self.scale)


def matrices(module: nn.Module, rank: int, scale: float = 1.0, seed: int = 0) -> Matrices:
    """Random LoRA for a linear kind of module."""
    generator = torch.Generator().manual_seed(seed)
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        ones = (1,) * (weight.ndim - 2)
        down = (rank, module.in_channels, *weight.shape[2:])
        up = (module.out_channels, rank // module.groups, *ones)
    else:
        outputs, inputs = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
        down, up = (rank, inputs), (outputs, rank)
    return Matrices(torch.randn(down, generator=generator) * 0.3, torch.randn(up, generator=generator) * 0.3, scale)


def apply(module: nn.Module, lora: Matrices, x: Tensor) -> Tensor:
    """scale * up(down(x)), as the module moves."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return lora.scale * (x @ lora.down.T @ lora.up.T)
    convolve = _CONVOLUTIONS[lora.down.ndim]
    dilation = 1 if module.padding == "same" else module.dilation
    middle = convolve(x, lora.down, None, module.stride, module.padding, dilation)
    return lora.scale * convolve(middle, lora.up, None, groups=module.groups)


def with_lora(net: nn.Module, loras: Mapping[str, Matrices]) -> nn.Module:
    """A copy of a network whose modules of these names add LoRA to what they return."""
    twin = copy.deepcopy(net)
    for name, lora in loras.items():

        def add(
            module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor, lora=lora
        ) -> Tensor:  # type: ignore[no-untyped-def]
            return output + apply(module, lora, next(iter((*args, *kwargs.values()))))

        twin.get_submodule(name).register_forward_hook(add, with_kwargs=True)
    return twin
