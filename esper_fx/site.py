"""What is known of a site: the value in the graph where a seed may sit, and where that value comes from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class ConvolutionSpec:
    """How a convolution moves over its input; as `torch.nn` spells it, one number for every dimension after the channels."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class SourceSpec:
    """The source of a site's value: the input of the linear map or convolution whose output the site is.

    Attributes:
        shape: Shape of that input when it was seen first. The feature dimension is fixed; others may vary.
        feature_dim: Non-negative index of the dimension that holds its features: 1 for convolutions, else the last one.
        convolution: How the module moves over its input, or None where it maps features only.
        fan_in_fan_out: Whether the module keeps its weight as ``[in, out]``.
    """

    shape: tuple[int, ...]
    feature_dim: int
    convolution: ConvolutionSpec | None = None
    fan_in_fan_out: bool = False

    @property
    def features(self) -> int:
        """Size of the feature dimension."""
        return self.shape[self.feature_dim]


@dataclass(frozen=True)
class SiteSpec:
    """A site's name and the tensor that flows through it.

    Attributes:
        name: Qualified name of the module whose output the site is, or the graph node's name.
        shape: Shape of the value when it was seen first. The feature dimension is fixed; others may vary from call to call.
        dtype: Floating dtype of the value.
        device: Device of the value.
        feature_dim: Non-negative index of the dimension that holds features: 1 for channel-first maps ``[N, C, *]``,
            the last one for tokens ``[B, T, D]`` and vectors ``[N, D]``. `morph` takes ``feature_dim`` to say otherwise.
        source: What the module read to make the value, where the site is the output of a linear map or a convolution
            (:func:`is_linear_kind`); else None.
        odd: Shape of a later value that has another number of features: no body fits both. None where all have as many.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    feature_dim: int
    source: SourceSpec | None = None
    odd: tuple[int, ...] | None = None

    def has_features_of(self, shape: tuple[int, ...]) -> bool:
        """Whether a value of this shape has as many features; with other dimensions, the last one stays the last."""
        return self.feature_dim_of(shape) is not None

    def feature_dim_of(self, shape: tuple[int, ...]) -> int | None:
        """Which dimension of a value of this shape holds the features; None where it has not as many of them."""
        last = self.feature_dim == self.ndim - 1
        dim = len(shape) - 1 if last else self.feature_dim
        return dim if 0 <= dim < len(shape) and shape[dim] == self.features else None

    @property
    def ndim(self) -> int:
        """Number of dimensions of the value."""
        return len(self.shape)

    @property
    def features(self) -> int:
        """Size of the feature dimension."""
        return self.shape[self.feature_dim]

    @property
    def is_channel_first(self) -> bool:
        """Whether the value is a map ``[N, C, *]`` with at least one dimension after the features."""
        return self.feature_dim == 1 and self.ndim >= 3


def is_transposed_linear(module: object) -> bool:
    """Whether a module is a linear map with a weight ``[in, out]``, such as GPT-2's in transformers, known by its shape."""
    # Not the attribute: where it is parametrized, reading it computes it, and may change buffers.
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        return False
    weight = module._parameters.get("weight")
    named = any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
    return named and isinstance(weight, torch.Tensor) and weight.ndim == 2 and getattr(module, "nf", None) is not None


def is_linear_kind(module: object) -> bool:
    """Whether a module maps its one input linearly, so that a body at its output may read that input instead."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_transposed_linear(module)


def convolution_spec(module: object) -> ConvolutionSpec | None:
    """How a module moves over its input, or None where it is no convolution."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    padding = module.padding if isinstance(module.padding, str) else tuple(module.padding)
    return ConvolutionSpec(
        tuple(module.kernel_size), tuple(module.stride), padding, tuple(module.dilation), module.groups
    )
