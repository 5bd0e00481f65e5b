"""A gated perceptron: SwiGLU (Shazeer 2020, equation 6) as a residual."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from esper_fx.blueprints._layers import check_positive, fits_features, pointwise, zero_
from esper_fx.blueprints.registry import blueprint
from esper_fx.site import SiteSpec


class GatedMLP(nn.Module):
    """delta = down(silu(gate(x)) * up(x)), over the features at every position."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.up = up
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*, D]`` or ``[N, C, *]`` to a delta of the same shape."""
        delta: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return delta


@blueprint("gated_mlp", fits=fits_features)
def gated_mlp(site: SiteSpec, *, width: int | None = None) -> nn.Module:
    """A perceptron whose hidden features are gated by others, without biases.

    Args:
        site: Tokens or vectors ``[*, D]``, or a map ``[N, C, *]``.
        width: Number of hidden features. Default: half of the site's features, at least 1.

    Raises:
        BlueprintError: If ``width`` is out of range.
    """
    if width is None:
        width = max(1, site.features // 2)
    check_positive("gated_mlp", width=width)
    return GatedMLP(
        gate=pointwise(site, site.features, width, bias=False),
        up=pointwise(site, site.features, width, bias=False),
        down=zero_(pointwise(site, width, site.features, bias=False)),
    )
