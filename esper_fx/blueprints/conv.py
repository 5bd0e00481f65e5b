"""A bottlenecked convolution: 1x1 down, k x k, 1x1 up (He et al. 2016, figure 5, right) as a residual."""

from __future__ import annotations

from torch import nn

from esper_fx.blueprints._layers import activation_module, check_kernel_size, check_positive, fits_map, same_conv, zero_
from esper_fx.blueprints.registry import blueprint
from esper_fx.site import SiteSpec


@blueprint("conv", fits=fits_map)
def conv(
    site: SiteSpec, *, width: int | None = None, kernel_size: int = 3, activation: str | None = "relu"
) -> nn.Module:
    """Three convolutions with biases; the map keeps its size.

    Args:
        site: A map ``[N, C, *]`` with one to three dimensions after the channels.
        width: Channels in the middle. Default: a quarter of the site's, at least 1.
        kernel_size: Size of the middle filters in each dimension, odd so that they have a centre.
        activation: After the first and the second convolution: None, "relu", "gelu" or "silu".

    Raises:
        BlueprintError: If a parameter is out of range.
    """
    if width is None:
        width = max(1, site.features // 4)
    check_positive("conv", width=width)
    check_kernel_size("conv", kernel_size)
    return nn.Sequential(
        same_conv(site, site.features, width, 1),
        activation_module("conv", activation),
        same_conv(site, width, width, kernel_size),
        activation_module("conv", activation),
        zero_(same_conv(site, width, site.features, 1)),
    )
