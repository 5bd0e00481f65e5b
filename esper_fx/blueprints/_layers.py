"""Pieces that the builtin blueprints share: layers that mix features only, activations, and checks."""

from __future__ import annotations

from torch import Tensor, nn

from esper_fx.checks import shown
from esper_fx.errors import BlueprintError
from esper_fx.site import SiteSpec

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
_CONVOLUTIONS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class TwoLayers(nn.Module):
    """delta = up(activation(down(x))), over the features at every position."""

    def __init__(self, down: nn.Module, activation: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down = down
        self.activation = activation
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*, D]`` or ``[N, C, *]`` to a delta of the same shape."""
        delta: Tensor = self.up(self.activation(self.down(x)))
        return delta


def fits_features(site: SiteSpec) -> str | None:
    """Why `pointwise` cannot work at this site, or None if it can."""
    if not site.dtype.is_floating_point:
        return f"its dtype is {site.dtype}, expected a floating one"
    if site.is_channel_first:
        return None if site.ndim in _CONVOLUTIONS else f"it is a map with {site.ndim} dimensions, expected 3 to 5"
    if site.feature_dim != site.ndim - 1:
        return f"its features are dimension {site.feature_dim} of {site.ndim}, expected 1 or the last one"
    return None


def fits_map(site: SiteSpec) -> str | None:
    """Why `same_conv` cannot work at this site, or None if it can."""
    if not site.dtype.is_floating_point:
        return f"its dtype is {site.dtype}, expected a floating one"
    if not (site.is_channel_first and site.ndim in _CONVOLUTIONS):
        return (
            f"its shape is {list(site.shape)} with features in dimension {site.feature_dim}, "
            "expected a map [N, C, *] with 3 to 5 dimensions"
        )
    return None


def same_conv(site: SiteSpec, inputs: int, outputs: int, kernel_size: int, *, groups: int = 1) -> nn.Module:
    """A convolution with a bias over all dimensions after the channels; a map ``[N, C, *]`` keeps its size."""
    return _CONVOLUTIONS[site.ndim](inputs, outputs, kernel_size, padding="same", groups=groups)


def check_kernel_size(blueprint: str, kernel_size: int) -> None:
    """Refuse anything but odd whole numbers from 1.

    Raises:
        BlueprintError: Naming the value.
    """
    check_positive(blueprint, kernel_size=kernel_size)
    if kernel_size % 2 == 0:
        raise BlueprintError(f"kernel_size={kernel_size!r} for blueprint {blueprint!r}: expected an odd number")


def pointwise(site: SiteSpec, inputs: int, outputs: int, *, bias: bool) -> nn.Module:
    """A linear map of the feature dimension: `nn.Linear` on ``[*, D]``, a 1x1 convolution on ``[N, C, *]``."""
    if site.is_channel_first:
        return _CONVOLUTIONS[site.ndim](inputs, outputs, kernel_size=1, bias=bias)
    return nn.Linear(inputs, outputs, bias=bias)


def source_layers(blueprint: str, site: SiteSpec, rank: int) -> tuple[nn.Module, nn.Module]:
    """LoRA's two layers without biases: from the input of the module at a site to ``rank`` features, and to the site's.

    A first convolution with ``padding="same"`` is not dilated, because PEFT's is not; otherwise its map would not fit.

    Raises:
        BlueprintError: The site has no source, or ``rank`` is no multiple of a convolution's groups.
    """
    source = site.source
    if source is None:
        raise BlueprintError(
            f"reads='input' for blueprint {blueprint!r} does not fit site {site.name!r}: it is not the output of an nn.Linear, "
            "nn.Conv1d, nn.Conv2d, nn.Conv3d or Conv1D whose input is known. Use reads='output', or another site"
        )
    if source.convolution is None:
        return nn.Linear(source.features, rank, bias=False), nn.Linear(rank, site.features, bias=False)
    moves = source.convolution
    if rank % moves.groups:
        raise BlueprintError(
            f"rank={rank!r} for blueprint {blueprint!r} at site {site.name!r}: expected a multiple of the {moves.groups} "
            "groups of the convolution there"
        )
    layer = _CONVOLUTIONS[len(moves.kernel_size) + 2]
    down = layer(
        source.features,
        rank,
        moves.kernel_size,
        stride=moves.stride,
        padding=moves.padding,
        dilation=1 if moves.padding == "same" else moves.dilation,
        bias=False,
    )
    return down, layer(rank, site.features, 1, groups=moves.groups, bias=False)


def zero_(layer: nn.Module) -> nn.Module:
    """Set all parameters of a layer to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def activation_module(blueprint: str, name: str | None) -> nn.Module:
    """The activation of that name; None is the identity.

    Raises:
        BlueprintError: If there is no such activation.
    """
    if name is None:
        return nn.Identity()
    if not isinstance(name, str) or name not in ACTIVATIONS:
        options = ", ".join(repr(option) for option in ACTIVATIONS)
        raise BlueprintError(f"activation={shown(name)} for blueprint {blueprint!r}: expected None, {options}")
    return ACTIVATIONS[name]()


def check_positive(blueprint: str, **values: int) -> None:
    """Refuse anything but whole numbers from 1.

    Raises:
        BlueprintError: Naming the parameter and its value.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BlueprintError(f"{name}={shown(value)} for blueprint {blueprint!r}: expected a whole number from 1")
