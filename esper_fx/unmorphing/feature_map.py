"""Read off a body that it maps features linearly, the same at every position, and apply that map to columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper_fx.blueprints._layers import TwoLayers
from esper_fx.blueprints.affine import Affine
from esper_fx.blueprints.low_rank import LowRank
from esper_fx.blueprints.sequence import Chain
from esper_fx.passes.trace import has_own_call

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class NotFoldable(Exception):
    """Why a body stays a module, in words."""


@dataclass(frozen=True)
class FeatureMap:
    """A map of features, the same at every position: ``x`` to ``M x + c``.

    Attributes:
        axis: The dimension of ``x`` that it runs along, counted from the end: negative. None where it is any.
        apply: Maps columns ``[D, n]``, float64, to ``M columns``, and adds ``c`` if the second argument is true.
    """

    axis: int | None
    apply: Callable[[Tensor, bool], Tensor]

    def blocks(self, features: int, groups: int) -> Tensor:
        """``M`` as one block a group, ``[groups, features / groups, features / groups]``.

        Raises:
            NotFoldable: It has other elements that are not zero.
        """
        matrix = self.apply(torch.eye(features, dtype=torch.float64), False)
        parts = matrix.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
        inside = torch.eye(groups, dtype=torch.bool)[:, None, :, None]
        if bool(parts.masked_fill(inside, 0.0).count_nonzero()):
            raise NotFoldable(f"its body mixes features across the {groups} groups of the convolution")
        return torch.stack([parts[group, :, group] for group in range(groups)])


def feature_map(module: nn.Module) -> FeatureMap:
    """What a body does to the features at every position.

    Only classes are looked at, exactly: a class that derives from one of them may compute something else.

    Raises:
        NotFoldable: It does something that is not linear, or that mixes positions, or that cannot be read off it.
    """
    kind = type(module)
    if has_own_call(module):
        raise NotFoldable(f"its body has hooks on a {kind.__name__}")
    if kind is nn.Identity:
        return FeatureMap(None, lambda columns, shifted: columns)
    if kind is nn.Linear or kind in CONVOLUTIONS:
        return _layer(module)
    if isinstance(module, Affine) and kind is Affine:
        scale, shift = as_double(module.scale)[:, None], as_double(module.shift)[:, None]
        return FeatureMap(module.feature_dim, lambda columns, shifted: columns * scale + (shift if shifted else 0.0))
    if isinstance(module, TwoLayers) and kind is TwoLayers:
        return _one_after_another([module.down, module.activation, module.up])
    if isinstance(module, LowRank) and kind is LowRank and not module.reads_source:
        layers = _one_after_another([module.dropout, module.down, module.activation, module.up])
        factor = module.scale.item()
        return FeatureMap(layers.axis, lambda columns, shifted: layers.apply(columns, shifted) * factor)
    if kind is nn.Sequential:
        return _one_after_another(list(module.children()))
    if isinstance(module, Chain) and kind is Chain:
        return _on_top_of_each_other(list(module.bodies))
    raise NotFoldable(f"its body has a {kind.__name__}, which is not known to be linear")


def feature_axis(layer: nn.Module) -> int:
    """The dimension of a layer's output that holds its features, counted from the end."""
    return -1 - len(layer.kernel_size) if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) else -1


def as_double(tensor: Tensor) -> Tensor:
    """A weight in float64 on the CPU, because not every accelerator has float64.

    Raises:
        NotFoldable: It is not an ordinary tensor of floating-point values.
    """
    if tensor.is_meta or not tensor.is_floating_point() or type(tensor) not in (Tensor, nn.Parameter):
        raise NotFoldable(f"a weight is a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}")
    return tensor.detach().to("cpu", torch.float64)


def _layer(layer: nn.Module) -> FeatureMap:
    """A linear layer, or a convolution of single positions."""
    assert isinstance(layer, (nn.Linear, *CONVOLUTIONS))
    groups = 1
    if not isinstance(layer, nn.Linear):
        single = all(size == 1 for size in (*layer.kernel_size, *layer.stride))
        if not single or (not isinstance(layer.padding, str) and any(layer.padding)):
            raise NotFoldable(f"its body has a {type(layer).__name__} that mixes positions")
        groups = layer.groups
    weight = as_double(layer.weight).flatten(1).unflatten(0, (groups, -1))
    bias = None if layer.bias is None else as_double(layer.bias)[:, None]

    def apply(columns: Tensor, shifted: bool) -> Tensor:
        result = torch.bmm(weight, columns.unflatten(0, (groups, -1))).flatten(0, 1)
        return result if bias is None or not shifted else result + bias

    return FeatureMap(feature_axis(layer), apply)


def _one_after_another(modules: Sequence[nn.Module]) -> FeatureMap:
    maps = [feature_map(module) for module in modules]

    def apply(columns: Tensor, shifted: bool) -> Tensor:
        for item in maps:
            columns = item.apply(columns, shifted)
        return columns

    return FeatureMap(_common_axis(maps), apply)


def _on_top_of_each_other(modules: Sequence[nn.Module]) -> FeatureMap:
    """The change that residual bodies in a row make, as the blueprint `sequence` defines it."""
    maps = [feature_map(module) for module in modules]

    def apply(columns: Tensor, shifted: bool) -> Tensor:
        delta = torch.zeros_like(columns)
        for item in maps:
            delta = delta + item.apply(columns + delta, shifted)
        return delta

    return FeatureMap(_common_axis(maps), apply)


def _common_axis(maps: Sequence[FeatureMap]) -> int | None:
    axes = {item.axis for item in maps if item.axis is not None}
    if len(axes) > 1:
        raise NotFoldable("the layers of its body run along different dimensions")
    return next(iter(axes), None)
