"""Self-attention over tokens (Vaswani et al. 2017) as a residual, normalised before (Xiong et al. 2020)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from esper_fx.blueprints._layers import check_positive, fits_map, zero_
from esper_fx.blueprints.registry import blueprint
from esper_fx.errors import BlueprintError
from esper_fx.site import SiteSpec


class Attention(nn.Module):
    """delta = out(softmax(q kᵀ / √head_width) v) with q, k, v linear in the normalised tokens.

    Attributes:
        heads: Number of heads.
        causal: Whether a token sees only itself and those before it.
        positions_last: Whether ``x`` is a map ``[N, C, *]``, whose positions are the tokens.
    """

    def __init__(self, features: int, width: int, heads: int, *, causal: bool, positions_last: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * width)
        self.out = zero_(nn.Linear(width, features))
        self.heads = heads
        self.causal = causal
        self.positions_last = positions_last

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*, T, D]`` or ``[N, C, *]`` to a delta of the same shape."""
        tokens = x.flatten(2).transpose(1, 2) if self.positions_last else x
        heads = self.qkv(self.norm(tokens)).unflatten(-1, (3, self.heads, -1))
        parts = heads.unbind(-3)
        query, key, value = (parts[index].transpose(-2, -3) for index in range(3))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        delta: Tensor = self.out(mixed.transpose(-2, -3).flatten(-2))
        return delta.transpose(1, 2).reshape(x.shape) if self.positions_last else delta


def _fits(site: SiteSpec) -> str | None:
    if site.is_channel_first:
        return fits_map(site)
    if not site.dtype.is_floating_point:
        return f"its dtype is {site.dtype}, expected a floating one"
    if site.ndim < 3 or site.feature_dim != site.ndim - 1:
        return (
            f"its shape is {list(site.shape)} with features in dimension {site.feature_dim}, "
            "expected tokens [*, T, D] or a map [N, C, *]"
        )
    return None


@blueprint("attention", fits=_fits)
def attention(site: SiteSpec, *, heads: int = 4, width: int | None = None, causal: bool | None = None) -> nn.Module:
    """Multi-head self-attention among the tokens of a sequence, or the positions of a map.

    Args:
        site: Tokens ``[*, T, D]``, or a map ``[N, C, *]``.
        heads: Number of heads.
        width: Features of all heads together, a multiple of ``heads``. Default: a quarter of the site's features,
            rounded up to that.
        causal: Whether a token sees only itself and those before it. Default: True for tokens, since attending ahead
            would spoil a causal model and looking back only spoils none; False for maps.

    Raises:
        BlueprintError: If a parameter is out of range.
    """
    check_positive("attention", heads=heads)
    if width is None:
        width = -(-max(1, site.features // 4) // heads) * heads
    check_positive("attention", width=width)
    if width % heads:
        raise BlueprintError(f"width={width!r} for blueprint 'attention': expected a multiple of heads={heads!r}")
    if causal is None:
        causal = not site.is_channel_first
    return Attention(site.features, width, heads, causal=causal, positions_last=site.is_channel_first)
