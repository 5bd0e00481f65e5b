"""What is known of a site: the value in the graph where a seed may sit."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SiteSpec:
    """A site's name and the tensor that flows through it.

    Attributes:
        name: Qualified name of the module whose output the site is, or the graph node's name.
        shape: Shape of the value when it was seen first. The feature dimension is fixed; others may vary from call to call.
        dtype: Floating dtype of the value.
        device: Device of the value.
        feature_dim: Non-negative index of the dimension that holds features: 1 for channel-first maps ``[N, C, *]``,
            the last one for tokens ``[B, T, D]`` and vectors ``[N, D]``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    feature_dim: int

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
