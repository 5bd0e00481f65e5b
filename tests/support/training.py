"""A small model in training and everything that a user saves of it: what the tests of checkpoints run."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import esper_fx
from esper_fx.lifecycle import Stage

SITES = ("a", "b", "c")
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("low_rank", {"rank": 2}),
    ("bottleneck", {"width": 3}),
    ("affine", {}),
    ("sequence", {"parts": ["affine", ("low_rank", {"rank": 1})]}),
)


class Net(nn.Module):
    """Vectors [B, 4] -> [B, 3]; dropout draws random numbers, the norm has buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.b = nn.Tanh()
        self.drop = nn.Dropout(0.25)
        self.c = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.drop(self.b(self.norm(self.a(x)))))
        return y


def new_model(seed: int = 0) -> esper_fx.MorphableModel:
    """The network with random parameters, morphed at all its sites."""
    torch.manual_seed(seed)
    return esper_fx.morph(Net(), sites=list(SITES), example_inputs=(torch.zeros(8, 4),))


def _by_rank(model: nn.Module) -> Optimizer:
    parameters = list(model.parameters())
    matrices, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    return AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(model.parameters(), lr=0.05, momentum=0.9),
    "adam": lambda model: Adam(model.parameters(), lr=0.01),
    "adamw with groups": _by_rank,
    "adam with names": lambda model: Adam(model.named_parameters(), lr=0.01),
}


class Training:
    """A training run.

    Args:
        optimizer: Name of one of ``OPTIMIZERS``.
        own_group: Whether the seeds' parameters get a group of their own.
        compiled: Whether the model is compiled with our backend.
        checkpoint: What to resume from.
        attach_first: Whether the optimizer is made and attached before the model is loaded.
        seed: Seed of the initial parameters.
    """

    def __init__(
        self,
        optimizer: str = "adam",
        *,
        own_group: bool = False,
        compiled: bool = False,
        checkpoint: Mapping[str, Any] | None = None,
        attach_first: bool = True,
        seed: int = 0,
    ) -> None:
        self.model = new_model(seed)
        self.fast: nn.Module = torch.compile(self.model, backend="esper") if compiled else self.model  # type: ignore[assignment]
        if checkpoint is not None and not attach_first:
            self.model.load_state_dict(checkpoint["model"])
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        esper_fx.attach(self.optimizer, self.model, **({"lr": 0.02} if own_group else {}))
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=100)
        self.losses: list[float] = []
        if checkpoint is not None:
            self.load(checkpoint, model=attach_first)

    def save(self) -> dict[str, Any]:
        """All that the run depends on; it holds the run's own tensors."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.get_rng_state(),
            "losses": list(self.losses),
        }

    def load(self, checkpoint: Mapping[str, Any], *, model: bool = True) -> None:
        """Go on from there."""
        if model:
            self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        self.losses = list(checkpoint["losses"])
        torch.set_rng_state(checkpoint["random"])

    def step(self) -> float:
        """One training step on random data; returns the loss."""
        x = torch.randn(8, 4)
        loss = (self.fast(x) - x[:, :3].sin()).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append(loss.item())
        return self.losses[-1]

    def live(self, actions: Sequence[tuple[Any, ...]]) -> None:
        """Do these one after another, and leave out what the seed's stage does not allow."""
        for verb, *details in actions:
            if verb == "train":
                for _ in range(details[0]):
                    self.step()
                continue
            seed = self.model.seeds[details[0]]
            if verb == "germinate" and seed.stage == Stage.DORMANT:
                blueprint, config = details[1]
                seed.germinate(blueprint, **config)
            elif verb == "blend" and seed.stage in (Stage.INCUBATING, Stage.ACTIVE):
                seed.blend(to=details[1], steps=details[2], schedule=details[3])
            elif verb == "fossilize" and seed.stage == Stage.ACTIVE:
                seed.fossilize()
            elif verb == "prune" and seed.stage in (Stage.INCUBATING, Stage.BLENDING, Stage.ACTIVE):
                seed.prune()

    def facts(self) -> dict[str, Any]:
        """Copies of all that may be compared."""
        return copied({**self.save(), **growth_of(self.model)})


def growth_of(model: esper_fx.MorphableModel) -> dict[str, Any]:
    """What is known of a model's growth besides its tensors."""
    return {
        "seeds": {
            name: (seed.stage.name, seed.live, seed.blueprint, seed.config, seed.training)
            for name, seed in model.seeds.items()
        },
        "rows": [list(model.state.rows(seed.index).items()) for seed in model.seeds.values()],
        "ledger": list(model.ledger),
        "clock": model.clock,
        "morphology": model.morphology,
        "next body": model.growth.model_seed,
    }


def copied(value: Any) -> Any:
    """A copy of nested containers and tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value


def carried(value: Any) -> Any:
    """The value after it has been saved and loaded as a user should: with ``weights_only=True``."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(actual: Any, expected: Any, where: str = "") -> None:
    """Assert that nested containers are equal, tensors to the bit."""
    assert type(actual) is type(expected), where
    if isinstance(expected, Tensor):
        assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device), where
        mine, theirs = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (actual, expected))
        assert torch.equal(mine, theirs), where
    elif isinstance(expected, dict):
        assert sorted(map(str, actual)) == sorted(map(str, expected)), where
        for key, value in expected.items():
            assert_same(actual[key], value, f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for number, value in enumerate(expected):
            assert_same(actual[number], value, f"{where}/{number}")
    elif isinstance(expected, float):
        assert actual.hex() == expected.hex(), where
    else:
        assert actual == expected, where
