"""Growing in one of several processes is possible, and what it takes is said."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn

import esper_fx
from esper_fx import growth

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("processes", [1, 2])
def test_it_is_said_once_that_nothing_averages_the_gradients_of_what_has_grown(
    processes: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    growth._warn_once.cache_clear()
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: processes)
    x = torch.zeros(2, 4)
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), sites="*", example_inputs=(x,))
    for seed in model.seeds.values():
        seed.germinate("affine")
    model(x)
    assert all(seed.live for seed in model.seeds.values())
    said = [record.getMessage() for record in caplog.records if "DistributedDataParallel" in record.getMessage()]
    assert len(said) == processes - 1
