"""The user's word on which dimension holds features, in a compiled model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import esper_fx
from esper_fx.errors import SiteError


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_what_does_not_fit_is_an_error_and_no_program_that_runs_eagerly() -> None:
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), sites="0", feature_dim=3)
    fast = torch.compile(model, backend="esper")
    with pytest.raises(SiteError, match=r"feature_dim=3 does not fit site '0'"):
        fast(torch.randn(2, 4))


def test_it_is_known_after_a_compiled_call() -> None:
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), sites="0", feature_dim=-2)
    torch.compile(model, backend="esper")(torch.randn(2, 3, 4))
    assert model.seeds["0"].site.feature_dim == 1
    assert model.seeds["0"].site.features == 3
