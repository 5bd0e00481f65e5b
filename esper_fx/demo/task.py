"""What a demo trains: a network, its data, and the two growths it tries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Labelled = tuple[Tensor, Tensor]
"""Inputs and the class of each: [B, ...] and int64 [B], or token ids and the token that follows each, both [B, T]."""

_EVALUATED_AT_ONCE = 256


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Trial:
    """One growth to try: a blueprint with its parameters, at a site."""

    site: str
    blueprint: str
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A network and its data.

    Attributes:
        title: What is learned, in a few words.
        score: What `accuracy` is measured on, for the report.
        net: The network before it is morphed.
        sites: Where seeds are planted.
        trials: The two growths; one will be kept and one pruned.
        learning_rate: Of AdamW.
        steps: Training steps planned unless the user says otherwise.
        sample: Draws a training batch; every batch has the same shape.
        validation: Decides which growth is kept.
        test: Seen by nothing but the report.
    """

    title: str
    score: str
    net: nn.Module
    sites: str
    trials: tuple[Trial, Trial]
    learning_rate: float
    steps: int
    sample: Callable[[torch.Generator], Labelled]
    validation: Labelled
    test: Labelled


def loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean cross-entropy in nats: logits [..., classes] and int64 [...] -> scalar."""
    return F.cross_entropy(logits.flatten(0, -2), classes.flatten())


@torch.no_grad()
def accuracy(model: nn.Module, data: Labelled) -> float:
    """Share of right answers, 0 to 1.

    Runs the model itself, in eager mode: the compiled one would be compiled anew for this batch size and for no_grad.
    """
    right = 0
    for start in range(0, len(data[0]), _EVALUATED_AT_ONCE):
        inputs, classes = (part[start : start + _EVALUATED_AT_ONCE] for part in data)
        right += int((model(inputs).argmax(-1) == classes).sum())
    return right / data[1].numel()


def parameter_count(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
