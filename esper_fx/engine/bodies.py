"""The graphs of seeds' bodies, recorded once for all that are equal."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from esper_fx.engine.plan import Slot
from esper_fx.errors import BlueprintError
from esper_fx.passes.carry_sizes import SizesError
from esper_fx.passes.metas import TensorMeta
from esper_fx.passes.record import BodyGraph, body_signature, record, tensor_metas

if TYPE_CHECKING:
    from esper_fx.seed import KasminaSeed

_records: dict[tuple[Any, ...], BodyGraph] = {}


class BodyGoneError(Exception):
    """Another thread has taken a body out meanwhile: what was to be got ready for it is not wanted any more."""


class BodySizesError(SizesError):
    """A body can be recorded for fixed sizes only."""


class Recorded:
    """What a body was recorded as; for that body only, and while its tensors are of the kinds they were."""

    def __init__(self, body: nn.Module, graph: BodyGraph) -> None:
        self.graph = graph
        self._body = weakref.ref(body)

    def fits(self, body: nn.Module) -> bool:
        """Whether it is still what this body would be recorded as."""
        return self._body() is body and self.graph.tensors == tensor_metas(body)


def known_record(seed: KasminaSeed, slot: Slot) -> BodyGraph | None:
    """The graph of a seed's body for a slot if an equal body was recorded before."""
    recorded, body = seed.recorded, seed.body  # in this order: a body that is put in meanwhile brings its own
    given = None if body is None else slot.input_of(body)
    if body is None or given is None:
        return None
    known = recorded.get((given, slot.training))
    if known is not None and known.fits(body):
        return known.graph
    signature = body_signature(body)
    graph = _records.get((signature, given, slot.training)) if signature is not None else None
    if graph is not None:
        recorded[given, slot.training] = Recorded(body, graph)
    return graph


def record_once(seed: KasminaSeed, slot: Slot) -> BodyGraph:
    """The graph of a seed's body for a slot, recorded once for all equal bodies.

    Raises:
        BlueprintError: It cannot be recorded.
        BodyGoneError: There is none any more.
        BodySizesError: It can be, but not for all sizes at once.
    """
    known = known_record(seed, slot)
    if known is not None:
        return known
    recorded, body = seed.recorded, seed.body
    if body is None:
        raise BodyGoneError(f"the seed at {seed.name!r} has lost its body meanwhile")
    given = slot.input_of(body)
    if given is None:
        raise BlueprintError(
            f"the body at site {seed.name!r} reads its module's input, which this program does not hand over"
        )
    signature = body_signature(body)
    graph = _record(body, given, training=slot.training)
    if signature is not None:
        _records[signature, given, slot.training] = graph
    recorded[given, slot.training] = Recorded(body, graph)
    return graph


def _record(body: nn.Module, given: TensorMeta, *, training: bool) -> BodyGraph:
    try:
        return record(body, given, training=training)
    except BlueprintError as error:
        if given.names:
            record(body, given.fixed(), training=training)
            raise BodySizesError(str(error)) from error
        raise
