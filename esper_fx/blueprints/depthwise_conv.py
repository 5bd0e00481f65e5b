"""A depthwise convolution: every channel of a map gets a filter of its own."""

from __future__ import annotations

from torch import nn

from esper_fx.blueprints._layers import check_kernel_size, fits_map, same_conv, zero_
from esper_fx.blueprints.registry import blueprint
from esper_fx.site import SiteSpec


@blueprint("depthwise_conv", fits=fits_map)
def depthwise_conv(site: SiteSpec, *, kernel_size: int = 3) -> nn.Module:
    """One convolution with a bias and as many groups as channels; the map keeps its size.

    Args:
        site: A map ``[N, C, *]`` with one to three dimensions after the channels.
        kernel_size: Size of the filters in each dimension, odd so that they have a centre.

    Raises:
        BlueprintError: If ``kernel_size`` is out of range.
    """
    check_kernel_size("depthwise_conv", kernel_size)
    # Its only layer is its last: zero it, and it learns from the first step.
    return zero_(same_conv(site, site.features, site.features, kernel_size, groups=site.features))
