"""A depthwise convolution: every channel of a 2-d map gets a filter of its own."""

from __future__ import annotations

from torch import nn

from esper_fx.blueprints._layers import check_positive, zero_
from esper_fx.blueprints.registry import blueprint
from esper_fx.errors import BlueprintError
from esper_fx.site import SiteSpec


def _fits(site: SiteSpec) -> str | None:
    if not site.dtype.is_floating_point:
        return f"its dtype is {site.dtype}, expected a floating one"
    if not (site.is_channel_first and site.ndim == 4):
        return f"its shape is {list(site.shape)} with features in dimension {site.feature_dim}, expected [N, C, H, W]"
    return None


@blueprint("depthwise_conv", fits=_fits)
def depthwise_conv(site: SiteSpec, *, kernel_size: int = 3) -> nn.Module:
    """One convolution with a bias and as many groups as channels; the map keeps its size.

    Args:
        site: A map ``[N, C, H, W]``.
        kernel_size: Height and width of the filters, odd so that they have a centre.

    Raises:
        BlueprintError: If ``kernel_size`` is out of range.
    """
    check_positive("depthwise_conv", kernel_size=kernel_size)
    if kernel_size % 2 == 0:
        raise BlueprintError(f"kernel_size={kernel_size!r} for blueprint 'depthwise_conv': expected an odd number")
    # Its only layer is its last: zero it, and it learns from the first step.
    return zero_(nn.Conv2d(site.features, site.features, kernel_size, padding="same", groups=site.features))
