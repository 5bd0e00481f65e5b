"""A bottleneck adapter: down, nonlinearity, up, with biases (Houlsby et al. 2019)."""

from __future__ import annotations

from torch import nn

from esper_fx.blueprints._layers import TwoLayers, activation_module, check_positive, fits_features, pointwise, zero_
from esper_fx.blueprints.registry import blueprint
from esper_fx.site import SiteSpec


@blueprint("bottleneck", fits=fits_features)
def bottleneck(site: SiteSpec, *, width: int | None = None, activation: str | None = "gelu") -> nn.Module:
    """A two-layer perceptron over the features, applied at every position.

    Args:
        site: Tokens or vectors ``[*, D]``, or a map ``[N, C, *]``.
        width: Width in the middle. Default: a quarter of the site's features, at least 1.
        activation: Between the two layers: None, "relu", "gelu" or "silu".

    Raises:
        BlueprintError: If ``width`` or ``activation`` is out of range.
    """
    if width is None:
        width = max(1, site.features // 4)
    check_positive("bottleneck", width=width)
    return TwoLayers(
        down=pointwise(site, site.features, width, bias=True),
        activation=activation_module("bottleneck", activation),
        up=zero_(pointwise(site, width, site.features, bias=True)),
    )
