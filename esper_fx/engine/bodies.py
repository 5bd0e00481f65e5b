"""The graphs of seeds' bodies, recorded once for all that are equal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esper_fx.engine.plan import Slot
from esper_fx.errors import BlueprintError
from esper_fx.passes.record import BodyGraph, body_signature, record

if TYPE_CHECKING:
    from esper_fx.seed import KasminaSeed

_records: dict[tuple[Any, ...], BodyGraph] = {}


def known_record(seed: KasminaSeed, slot: Slot) -> BodyGraph | None:
    """The graph of a seed's body for a slot if an equal body was recorded before."""
    body = seed.body
    given = None if body is None else slot.input_of(body)
    if body is None or given is None:
        return None
    known = seed.recorded.get((given, slot.training))
    if known is None:
        signature = body_signature(body)
        known = _records.get((signature, given, slot.training)) if signature is not None else None
        if known is not None:
            seed.recorded[given, slot.training] = known
    return known


def record_once(seed: KasminaSeed, slot: Slot) -> BodyGraph:
    """The graph of a seed's body for a slot, recorded once for all equal bodies."""
    known = known_record(seed, slot)
    if known is None:
        body = seed.body
        if body is None:
            raise RuntimeError(f"the seed at {seed.name!r} has lost its body meanwhile")
        given = slot.input_of(body)
        if given is None:
            raise BlueprintError(
                f"the body at site {seed.name!r} reads its module's input, which this program does not hand over"
            )
        known = record(body, given, training=slot.training)
        signature = body_signature(body)
        if signature is not None:
            _records[signature, given, slot.training] = known
        seed.recorded[given, slot.training] = known
    return known
