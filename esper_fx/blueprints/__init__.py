"""Blueprints: recipes for the module a seed can become; each builds a body that maps ``x`` to a delta, zero at birth.

One file a builtin, the registry, and the check of a built body. May import torch, `esper_fx.site`, `esper_fx.errors`.
"""

from esper_fx.blueprints import bottleneck, channel_gate, depthwise_conv, low_rank  # noqa: F401  (registers them)
from esper_fx.blueprints.registry import Blueprint, blueprint, get, names
from esper_fx.blueprints.validate import validate_body

__all__ = ["Blueprint", "blueprint", "get", "names", "validate_body"]
