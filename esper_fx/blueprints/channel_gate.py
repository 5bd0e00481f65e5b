"""A gate for every channel: squeeze-and-excite (Hu et al. 2018, equations 2 to 4) as a residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper_fx.blueprints._layers import check_positive, fits_features, zero_
from esper_fx.blueprints.registry import blueprint
from esper_fx.site import SiteSpec


class ChannelGate(nn.Module):
    """delta = x * tanh(s / 2), with s = up(relu(down(squeeze(x)))), so that x + delta = x * 2 sigmoid(s).

    The squeeze is the mean over positions for maps ``[N, C, *]``. For tokens ``[*, D]`` there is none: each token is
    gated by itself, so that a causal model stays causal.

    Attributes:
        positions: Number of dimensions that the squeeze averages over.
    """

    def __init__(self, features: int, hidden: int, positions: int) -> None:
        super().__init__()
        self.down = nn.Linear(features, hidden)
        self.up = zero_(nn.Linear(hidden, features))
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*, D]`` or ``[N, C, *]`` to a delta of the same shape."""
        squeezed = x.flatten(2).mean(2) if self.positions else x
        gate = torch.tanh(self.up(torch.relu(self.down(squeezed))) * 0.5)
        for _ in range(self.positions):
            gate = gate.unsqueeze(-1)
        return x * gate


@blueprint("channel_gate", fits=fits_features)
def channel_gate(site: SiteSpec, *, reduction: int = 16) -> nn.Module:
    """A gate between 0 and 2 on every feature, learnt from all of them.

    Args:
        site: Tokens or vectors ``[*, D]``, or a map ``[N, C, *]``.
        reduction: The features divided by it are the width in the middle. It is at least 8, or all features where
            there are fewer: one or two ReLUs may be dead for every input at birth, and then never learn.

    Raises:
        BlueprintError: If ``reduction`` is out of range.
    """
    check_positive("channel_gate", reduction=reduction)
    positions = site.ndim - 2 if site.is_channel_first else 0
    return ChannelGate(site.features, max(min(8, site.features), site.features // reduction), positions)
