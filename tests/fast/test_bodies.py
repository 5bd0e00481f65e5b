"""What a body was recorded as counts for that body only, and while its tensors are of the kinds they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import esper_fx
from esper_fx.engine import bodies
from esper_fx.engine.plan import Slot
from esper_fx.passes.metas import TensorMeta
from esper_fx.seed import KasminaSeed

X = torch.zeros(2, 4)
SLOT = Slot(0, 0, TensorMeta.of(X), True)


def _seed() -> KasminaSeed:
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), sites="1", example_inputs=(X,))
    seed = model.seeds["1"]
    seed.germinate("low_rank", rank=2)
    model(X)
    assert seed.live
    return seed


def test_a_body_is_recorded_once() -> None:
    seed = _seed()
    graph = bodies.record_once(seed, SLOT)
    assert bodies.record_once(seed, SLOT) is graph is bodies.known_record(seed, SLOT)


@pytest.mark.parametrize(
    "change",
    [lambda body: body.requires_grad_(False), lambda body: body.to(torch.bfloat16)],
    ids=["frozen", "another dtype"],
)
def test_a_body_whose_tensors_have_changed_is_recorded_anew(change: Any) -> None:
    seed = _seed()
    before = bodies.record_once(seed, SLOT)
    change(seed.body)
    slot = Slot(0, 0, TensorMeta.of(X, requires_grad=False), True)
    if seed.body is not None and next(seed.body.parameters()).dtype == torch.bfloat16:
        slot = Slot(0, 0, TensorMeta.of(X.bfloat16()), True)
    after = bodies.record_once(seed, slot)
    assert after.tensors != before.tensors
    assert after.identity != before.identity
    assert seed.body is not None
    assert after.tensors == tuple(TensorMeta.of(value) for value in seed.body.parameters())


def test_a_body_that_is_put_in_while_another_is_recorded_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = _seed()
    assert seed.body is not None
    other = nn.Linear(4, 4, bias=False)
    record = bodies.record

    def slow_record(*args: Any, **options: Any) -> Any:
        graph = record(*args, **options)
        seed.set_body(other, "low_rank", {})
        return graph

    monkeypatch.setattr(bodies, "record", slow_record)
    monkeypatch.setattr(bodies, "_records", {})
    bodies.record_once(seed, SLOT)
    monkeypatch.setattr(bodies, "record", record)
    assert bodies.known_record(seed, SLOT) is None
    assert bodies.record_once(seed, SLOT).names == ("weight",)
