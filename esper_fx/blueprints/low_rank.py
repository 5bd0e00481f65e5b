"""A residual of low rank: what LoRA adds to a linear map (Hu et al. 2021), with an optional nonlinearity."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from esper_fx.blueprints._layers import (
    TwoLayers,
    activation_module,
    check_positive,
    fits_features,
    pointwise,
    source_layers,
    zero_,
)
from esper_fx.blueprints.registry import blueprint
from esper_fx.checks import shown
from esper_fx.errors import BlueprintError
from esper_fx.site import SiteSpec


class LowRank(TwoLayers):
    """delta = scale · up(activation(down(dropout(x)))), where x is the value at the site or that value's source.

    The scale is a buffer, float32, and not a constant of the graph: bodies that differ in it alone share their kernels. It
    is no part of the state_dict, because the body's configuration says it.
    """

    scale: Tensor

    def __init__(
        self, down: nn.Module, activation: nn.Module, up: nn.Module, *, scale: float, dropout: float, reads_source: bool
    ) -> None:
        super().__init__(down, activation, up)
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32), persistent=False)
        self.reads_source = reads_source

    def forward(self, x: Tensor) -> Tensor:
        """Map what is read to a delta of the value at the site."""
        delta: Tensor = self.up(self.activation(self.down(self.dropout(x)))) * self.scale
        return delta

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRank:
        """Follow moves to other devices with the scale, but not to other dtypes, which would round it."""
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not scale.is_meta:
            self.scale = scale.to(self.scale.device)
        return self


@blueprint("low_rank", fits=fits_features)
def low_rank(
    site: SiteSpec,
    *,
    rank: int = 8,
    activation: str | None = None,
    reads: str = "output",
    scale: float = 1.0,
    dropout: float = 0.0,
) -> nn.Module:
    """A linear map of rank at most ``rank`` over the features.

    With ``reads="input"`` it is LoRA: it reads what the linear map or convolution at the site reads, not what that returns.
    At a convolution the first layer moves as the host does (its kernel size, stride, padding and dilation, over all channels)
    and the second is a 1x1 convolution with the host's groups.

    Args:
        site: Tokens or vectors ``[*, D]``, or a map ``[N, C, *]``; with ``reads="input"`` the output of an `nn.Linear`, an
            `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, or a ``Conv1D`` as GPT-2 has it.
        rank: Width in the middle; a multiple of a convolution's groups.
        activation: Between the two layers: None, "relu", "gelu" or "silu".
        reads: "output", the value at the site, or "input", the input of the module at the site.
        scale: Factor on the result. LoRA calls it lora_alpha / rank.
        dropout: Probability that a feature of what is read is dropped in training.

    Raises:
        BlueprintError: If a parameter is out of range, or ``reads="input"`` where the site has no source.
    """
    check_positive("low_rank", rank=rank)
    _check_real("scale", scale, -math.inf, math.inf)
    _check_real("dropout", dropout, 0.0, 1.0)
    middle = activation_module("low_rank", activation)
    if reads == "output":
        down, up = (pointwise(site, *pair, bias=False) for pair in ((site.features, rank), (rank, site.features)))
    elif reads == "input":
        down, up = source_layers("low_rank", site, rank)
    else:
        raise BlueprintError(f"reads={shown(reads)} for blueprint 'low_rank': expected 'output' or 'input'")
    if reads == "output" and scale == 1.0 and not dropout:
        return TwoLayers(down, middle, zero_(up))
    return LowRank(down, middle, zero_(up), scale=float(scale), dropout=float(dropout), reads_source=reads == "input")


def _check_real(name: str, value: float, low: float, high: float) -> None:
    """Refuse anything but numbers strictly below ``high`` and not below ``low``.

    Raises:
        BlueprintError: Naming the parameter and its value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not (low <= value < high) or math.isinf(value):
        bounds = "a finite number" if math.isinf(high) else f"a number from {low:g} to below {high:g}"
        raise BlueprintError(f"{name}={shown(value)} for blueprint 'low_rank': expected {bounds}")
