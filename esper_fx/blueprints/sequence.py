"""A chain of blueprints, each on top of what those before it have changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from esper_fx.blueprints import registry
from esper_fx.checks import shown
from esper_fx.errors import BlueprintError
from esper_fx.ops import reads_source
from esper_fx.site import SiteSpec


class Chain(nn.Module):
    """The change that a chain of residual bodies makes: h₀ = x, hᵢ = hᵢ₋₁ + bodyᵢ(hᵢ₋₁), delta = hₙ − x."""

    def __init__(self, bodies: Sequence[nn.Module]) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` to a delta of the same shape."""
        first, *others = self.bodies
        delta: Tensor = first(x)
        # The sum of the changes, not hₙ − x: a small change of a large x would lose its digits.
        for body in others:
            delta = delta + body(x + delta)
        return delta


@registry.blueprint("sequence")
def sequence(site: SiteSpec, *, parts: Sequence[str | Sequence[Any]]) -> nn.Module:
    """Several blueprints in a row at one site, as one body.

    Args:
        site: Fits if it fits every part.
        parts: For each the name of a blueprint, or ``(name, {parameter: value})``.

    Raises:
        BlueprintError: If there are no parts, or one of them is malformed, does not fit or is refused its parameters.
        UnknownBlueprintError: If no blueprint has a part's name.
    """
    if isinstance(parts, str) or not isinstance(parts, Sequence) or not parts:
        raise BlueprintError(
            f"parts={shown(parts)} for blueprint 'sequence': expected a list of names or (name, parameters), at least one"
        )
    return Chain([_build(site, part) for part in parts])


def _build(site: SiteSpec, part: str | Sequence[Any]) -> nn.Module:
    name, config = (part, {}) if isinstance(part, str) else _pair(part)
    kind = registry.get(name)
    reason = kind.fits(site)
    if reason is not None:
        raise BlueprintError(f"blueprint {name!r}, a part of 'sequence', does not fit site {site.name!r}: {reason}")
    body = kind.function(site, **kind.bind(config))
    if reads_source(body):
        raise BlueprintError(
            f"blueprint {name!r}, a part of 'sequence', reads the input of the module at site {site.name!r}: a part reads what "
            "the parts before it have made of the value there"
        )
    return body


def _pair(part: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(part, Sequence) and len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], Mapping):
        return part[0], part[1]
    raise BlueprintError(
        f"part {shown(part)} of blueprint 'sequence': expected a blueprint's name, or (name, {{parameter: value}})"
    )
