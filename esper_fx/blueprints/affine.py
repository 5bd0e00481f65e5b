"""Scale and shift of every feature (FiLM's modulation without a condition, Perez et al. 2018) as a residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper_fx.blueprints.registry import blueprint
from esper_fx.site import SiteSpec


class Affine(nn.Module):
    """delta = scale * x + shift, so that x + delta = (1 + scale) * x + shift.

    Attributes:
        scale: ``[D]``, zero at birth.
        shift: ``[D]``, zero at birth.
        feature_dim: The dimension of ``x`` that they run along, counted from the end: negative.
    """

    def __init__(self, features: int, feature_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(features))
        self.shift = nn.Parameter(torch.zeros(features))
        self.feature_dim = feature_dim

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` to a delta of the same shape."""
        shape = (-1,) + (1,) * (-1 - self.feature_dim)
        return x * self.scale.view(shape) + self.shift.view(shape)


def _fits(site: SiteSpec) -> str | None:
    return None if site.dtype.is_floating_point else f"its dtype is {site.dtype}, expected a floating one"


@blueprint("affine", fits=_fits)
def affine(site: SiteSpec) -> nn.Module:
    """A factor and an offset for every feature.

    Args:
        site: Any value with a feature dimension.
    """
    return Affine(site.features, site.feature_dim - site.ndim)
