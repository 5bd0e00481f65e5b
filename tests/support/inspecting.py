"""Models to look into, and what looking must leave alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.lifecycle import Stage
from tests.support.growing import grow
from tests.support.models import transformer

#: Names that modules may have, and that a language may take for something else.
ODD_NAMES = ("a b", "x:y", "a/b", "größe", "<b>", "a&amp;b", "n#1", "文字", "-> {", "é" * 60)


class Odd(nn.Module):
    """Layers with odd names, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in ODD_NAMES})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


class Parts(nn.Module):
    """Plain Python around two parts that can be traced, of which one is called twice, and one that cannot be."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.twice = nn.Linear(4, 4)
        self.noisy = Noisy()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum() > 0:
            x = self.twice(self.twice(x))
        y: Tensor = self.noisy(x)
        return y


class Noisy(nn.Module):
    """Cannot be traced: it reads self.training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


def parts() -> esper_fx.MorphableModel:
    return esper_fx.morph(Parts(), sites=["first.0", "first", "twice", "noisy"], example_inputs=(torch.ones(2, 4),))


def odd() -> esper_fx.MorphableModel:
    return esper_fx.morph(Odd(), sites="layers.*", example_inputs=(torch.ones(2, 4),))


def small_transformer(depth: int = 3, sites: Any = ("blocks.*",)) -> esper_fx.MorphableModel:
    example = transformer(width=16, depth=depth, heads=2, tokens=8, batch=2, vocabulary=32)
    return esper_fx.morph(example.model, sites=list(sites), example_inputs=example.inputs)


def grown_transformer() -> esper_fx.MorphableModel:
    """One dormant seed, one that blends, one that was kept; the clock stands at 5."""
    model = small_transformer()
    grow(model, "blocks.1", "low_rank", rank=4, stage=Stage.BLENDING)
    grow(model, "blocks.2", "affine", stage=Stage.FOSSILIZED)
    while model.clock < 5:
        model.growth.tick()
    return model


def footprint(model: esper_fx.MorphableModel) -> dict[str, Any]:
    """All that is to be seen of a model and of what is global; equal where nothing has changed."""
    tensors = model.state_dict(keep_vars=True)
    return {
        "tensors": {name: (value.detach().numpy().tobytes(), value.requires_grad) for name, value in tensors.items()},
        "ledger": model.ledger.to_json(),
        "clock": model.clock,
        "stats": model.stats(),
        "pending": model.pending,
        "modes": [(name, module.training) for name, module in model.named_modules()],
        "classes": [type(module) for module in model.modules()],
        "graphs": {scope: str(graph) for scope, graph in model.graphs.items()},
        "random": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
    }


@contextlib.contextmanager
def looked_at(look: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Look again and again from another thread for the length of a block; yields what went wrong, which ends the looking."""
    problems: list[BaseException] = []
    over = threading.Event()

    def watch() -> None:
        try:
            while not over.is_set():
                look()
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield problems
    finally:
        over.set()
        thread.join()
