"""Runs whose models have grown, their checkpoints, and loads that must be refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.errors import CheckpointError
from tests.support.training import Training, assert_same, carried

MANIFEST = "esper._extra_state"


def grown() -> Training:
    """A run in the middle of its life: a blend, an incubation and an embargo are under way."""
    run = Training()
    run.live(
        [
            ("germinate", "c", ("affine", {})),
            ("germinate", "a", ("low_rank", {"rank": 2})),
            ("train", 2),
            ("blend", "a", 0.25, 10, "cosine"),
            ("germinate", "b", ("sequence", {"parts": ["affine", ("low_rank", {"rank": 1})]})),
            ("train", 2),
            ("prune", "c"),
            ("train", 1),
        ]
    )
    assert [seed.stage.name for seed in run.model.seeds.values()] == ["BLENDING", "INCUBATING", "EMBARGOED"]
    return run


def grown_otherwise() -> Training:
    run = Training(seed=1)
    run.live(
        [("germinate", "c", ("low_rank", {"rank": 2})), ("germinate", "b", ("bottleneck", {"width": 2})), ("train", 2)]
    )
    return run


def checkpoint_of(model: nn.Module) -> dict[str, Any]:
    """The state dict as it comes back from a file, metadata of PyTorch included."""
    loaded: dict[str, Any] = carried(model.state_dict())
    return loaded


def computed(model: esper_fx.MorphableModel, x: Tensor) -> Tensor:
    """What a model computes in evaluation; its clock does not tick meanwhile."""
    attachment = model.growth.attachment
    if attachment is None or attachment.optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # it has to live for the clock to wait for its steps
        esper_fx.attach(optimizer, model)
    y: Tensor = model.eval()(x)
    return y


def identities(run: Training) -> list[Any]:
    """Who everything is: a load that is refused must not even replace an object by its equal."""
    held = [[id(p) for p in group["params"]] for group in run.optimizer.param_groups]
    return [held, *((id(s.body), id(s.error), id(s._spec)) for s in run.model.seeds.values()), id(run.model.ledger)]


def refused(run: Training, state_dict: dict[str, Any], wording: str, *, strict: bool = True) -> str:
    """Load into the run's model, which must be refused with this wording and change nothing; returns the message."""
    before, who = run.facts(), identities(run)
    with pytest.raises(CheckpointError, match=wording) as caught:
        run.model.load_state_dict(state_dict, strict=strict)
    assert isinstance(caught.value, RuntimeError)
    assert_same(run.facts(), before)
    assert identities(run) == who
    return str(caught.value)
