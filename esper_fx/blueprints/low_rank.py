"""A residual of low rank: what LoRA adds to a linear map (Hu et al. 2021), with an optional nonlinearity."""

from __future__ import annotations

from torch import nn

from esper_fx.blueprints._layers import TwoLayers, activation_module, check_positive, fits_features, pointwise, zero_
from esper_fx.blueprints.registry import blueprint
from esper_fx.site import SiteSpec


@blueprint("low_rank", fits=fits_features)
def low_rank(site: SiteSpec, *, rank: int = 8, activation: str | None = None) -> nn.Module:
    """A linear map of rank at most ``rank`` over the features.

    Args:
        site: Tokens or vectors ``[*, D]``, or a map ``[N, C, *]``.
        rank: Width in the middle.
        activation: Between the two layers: None, "relu", "gelu" or "silu".

    Raises:
        BlueprintError: If ``rank`` or ``activation`` is out of range.
    """
    check_positive("low_rank", rank=rank)
    return TwoLayers(
        down=pointwise(site, site.features, rank, bias=False),
        activation=activation_module("low_rank", activation),
        up=zero_(pointwise(site, rank, site.features, bias=False)),
    )
