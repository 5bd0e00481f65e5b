"""How nodes look in drawings: their texts, and the colours of the stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esper_fx.inspect.names import shortened, visible
from esper_fx.lifecycle import Stage

#: Background of a seed in each stage, dark enough to see on white and light enough for black text.
STAGE_COLOURS: Mapping[str, str] = {
    Stage.DORMANT.name: "#d9d9d9",
    Stage.GERMINATING.name: "#fff3b0",
    Stage.INCUBATING.name: "#cdb4f6",
    Stage.BLENDING.name: "#9ad1f5",
    Stage.ACTIVE.name: "#94e0a0",
    Stage.FOSSILIZED.name: "#d8b48a",
    Stage.EMBARGOED.name: "#f7c59f",
    Stage.ERROR.name: "#ff9a9a",
}

#: Columns of the widest text in a node.
_COLUMNS = 32


def label(attributes: Mapping[str, Any]) -> list[str]:
    """The lines of text in a node, from its attributes in :func:`esper_fx.inspect.graph`."""
    return [shortened(visible(line), _COLUMNS) for line in _lines(attributes) if line]


def _lines(attributes: Mapping[str, Any]) -> list[str]:
    kind, target = attributes["kind"], str(attributes["target"])
    if kind == "seed":
        blueprint = attributes["blueprint"]
        body = f"{blueprint}, alpha {attributes['alpha']:.3g}" if blueprint is not None else ""
        return [str(attributes["site"]), str(attributes["stage"]), body]
    if kind == "module":
        return [target, str(attributes["type"])]
    if kind == "operation" and ", " not in target:
        return [target.rpartition(".")[2]]
    return [target]
