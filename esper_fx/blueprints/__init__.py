"""Blueprints: recipes for the module a seed can become; each builds a body that maps ``x`` to a delta, zero at birth.

One file a builtin, the registry, and the check of a built body. May import torch, `esper_fx.site`, `esper_fx.errors`.
"""

from esper_fx.blueprints import (  # noqa: F401  (registers them)
    affine,
    attention,
    bottleneck,
    channel_gate,
    conv,
    depthwise_conv,
    gated_mlp,
    low_rank,
    sequence,
)
from esper_fx.blueprints.cost import Cost
from esper_fx.blueprints.registry import Blueprint, blueprint, get, names
from esper_fx.blueprints.validate import validate_body

__all__ = ["Blueprint", "Cost", "blueprint", "get", "names", "validate_body"]
