"""Lineage: what grew where, when and why, as JSON, of a model that still grows or of what unmorph made of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from esper_fx._torch import unwrapped
from esper_fx.checks import path_of
from esper_fx.errors import ArgumentError, LineageError, MorphError
from esper_fx.files import write_whole
from esper_fx.lifecycle import GrowthEvent, Stage
from esper_fx.morphing.original import original_kind

if TYPE_CHECKING:
    from esper_fx.growth import Growth

FORMAT = "esper_fx lineage 1"
ATTRIBUTE = "lineage"


@dataclass(frozen=True)
class SeedSnapshot:
    """What a seed was at one moment.

    Attributes:
        site: Its site.
        stage: Its stage.
        alpha: The factor on what its body returns.
        live: Whether its body takes part in the computation.
        body: The body itself, not a copy, or None.
        blueprint: Name of the body's blueprint, or None.
        config: Parameters of the blueprint.
        events: What has happened to it.
        container: The class of the tuple or list whose first item flows through the site; None where it is a tensor.
        seen: Whether that is known, because something has flowed.
    """

    site: str
    stage: Stage
    alpha: float
    live: bool
    body: nn.Module | None
    blueprint: str | None
    config: Mapping[str, Any]
    events: tuple[GrowthEvent, ...]
    container: type | None = None
    seen: bool = True

    @property
    def kept(self) -> bool:
        """Whether its body takes part in what the model computes."""
        return self.live and self.body is not None and self.alpha != 0


def snapshot(growth: Growth) -> list[SeedSnapshot]:
    """All seeds of a model as they are now, in the order of their rows in the state arrays."""
    with growth.lock:
        events = list(growth.ledger)
        return [
            SeedSnapshot(
                seed.name,
                seed.stage,
                seed.alpha,
                seed.live,
                seed.body,
                seed.blueprint,
                dict(seed.config),
                tuple(event for event in events if event.site == seed.name),
                seed.container,
                seed.seen,
            )
            for seed in growth.by_index
        ]


def describe(
    model: nn.Module,
    seeds: list[SeedSnapshot],
    clock: int,
    outcomes: Mapping[str, str],
    reasons: Mapping[str, str],
) -> dict[str, Any]:
    """The lineage: JSON types only.

    Args:
        model: The morphed model.
        seeds: Its seeds.
        clock: Its clock.
        outcomes: What became of a seed, by site, where that is known.
        reasons: Why a seed was not folded, by site, where that was asked for.
    """
    from esper_fx import __version__

    changed = [seed for seed in seeds if seed.events or seed.blueprint is not None]
    result = {
        "format": FORMAT,
        "esper_fx": __version__,
        "torch": torch.__version__,
        "model": original_kind(model).__name__,
        "clock": clock,
        "sites": [_site(seed, outcomes.get(seed.site) or _outcome(seed), reasons.get(seed.site)) for seed in changed],
    }
    earlier = vars(model).get(ATTRIBUTE)
    return {**result, "earlier": earlier} if is_lineage(earlier) else result


def is_lineage(value: Any) -> bool:
    """Whether a value is a lineage as this module writes them."""
    return isinstance(value, dict) and value.get("format") == FORMAT


def write_lineage(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Write what grew in a model, where, when and why, as JSON: the `lineage.json` beside a saved model.

    One entry a site that has ever changed: ``site``, ``blueprint``, ``config``, ``parameters`` (how many trainable
    scalars its body has), ``stage``, ``alpha``, ``events`` (``step``, ``from``, ``to``, ``why``, ``blueprint``),
    ``outcome``, and ``not_folded``, the reason why a body that was to be folded was kept as a module. ``earlier`` is the
    lineage of the model that was morphed, if that had grown before. Of a body that was pruned nothing but its events is
    known.

    Args:
        path: The file to write.
        model: A morphed model, compiled or not, or what `unmorph` made of one.

    Raises:
        MorphError: The model is neither.
        LineageError: The file cannot be written; an OSError. One that was there is as before.
        ArgumentError: ``path`` is no path.
    """
    target = path_of(path, "the path of a lineage", ArgumentError)
    text = json.dumps(lineage_of(model), indent=2, allow_nan=False)
    write_whole(target, f"{text}\n", "the lineage", LineageError)


def lineage_of(model: nn.Module) -> dict[str, Any]:
    """The lineage of a morphed model as it is now, or of what `unmorph` has made.

    Raises:
        MorphError: The model is neither.
    """
    from esper_fx.model import MorphableModel

    model = unwrapped(model)
    if isinstance(model, MorphableModel):
        growth = model.growth
        return describe(model, snapshot(growth), growth.clock, {}, {})
    found: Any = getattr(model, ATTRIBUTE, None)
    if not is_lineage(found):
        raise MorphError(
            f"{type(model).__name__} has no lineage: expected a model that esper_fx.morph or esper_fx.unmorph has made"
        )
    return dict(found)


def _site(seed: SeedSnapshot, outcome: str, reason: str | None) -> dict[str, Any]:
    blueprint = seed.blueprint or next((e.blueprint for e in reversed(seed.events) if e.blueprint is not None), None)
    body = seed.body
    result = {
        "site": seed.site,
        "blueprint": blueprint,
        "config": None if body is None else {name: json_value(value) for name, value in seed.config.items()},
        "parameters": None if body is None else sum(p.numel() for p in body.parameters() if p.requires_grad),
        "stage": seed.stage.name,
        "alpha": seed.alpha,
        "events": [
            {"step": e.step, "from": e.frm.name, "to": e.to.name, "why": e.why, "blueprint": e.blueprint}
            for e in seed.events
        ],
        "outcome": outcome,
    }
    return result if reason is None else {**result, "not_folded": reason}


def _outcome(seed: SeedSnapshot) -> str:
    """What there is to say of a seed that no plain model holds."""
    if seed.kept:
        return "live"
    if seed.stage == Stage.GERMINATING:
        return "dropped: still germinating"
    if seed.live and seed.stage not in (Stage.EMBARGOED, Stage.ERROR):
        return "dropped: its alpha is 0"
    since = next((i for i, e in reversed(list(enumerate(seed.events))) if e.to == Stage.GERMINATING), 0)
    failed = any(event.to == Stage.ERROR for event in seed.events[since:])
    return "failed" if failed else "pruned"


def json_value(value: Any) -> Any:
    """A value as JSON types; what they cannot hold, in words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return str(value)
