"""A training run that writes a checkpoint after every step and goes on from the last one: what test_resume.py kills.

Imported in child processes; ``train`` is what they run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import esper_fx
from tests.support.training import Training

Plan = Mapping[int, Sequence[tuple[Any, ...]]]

#: What happens before which step, and the steps at which some blend is under way for sure.
LONG: Plan = {
    10: [("germinate", "a", ("low_rank", {"rank": 2}))],
    20: [("blend", "a", 0.4, 60, "cosine")],
    90: [("fossilize", "a"), ("germinate", "b", ("bottleneck", {"width": 3}))],
    100: [("blend", "b", 0.7, 70, "linear")],
    120: [("germinate", "c", ("affine", {}))],
    130: [("blend", "c", -0.5, 20, "cosine")],
    190: [("prune", "b")],
}
LONG_BLENDS = (*range(22, 75), *range(102, 165))
LONG_STEPS = 240

SHORT: Plan = {
    4: [("germinate", "a", ("low_rank", {"rank": 2}))],
    8: [("blend", "a", 0.4, 24, "cosine")],
    36: [("prune", "a")],
}
SHORT_BLENDS = tuple(range(12, 28))
SHORT_STEPS = 44


def train(folder: Path, plan: Plan, steps: int, progress: Connection, kernels: Path | None) -> None:
    """Train to the end, from the folder's checkpoint if there is one; what was reached is in ``final`` then.

    Args:
        folder: Where checkpoints go.
        plan: What happens before which step.
        steps: Number of steps.
        progress: Is sent the number of every step that is done and saved.
        kernels: Where compiled kernels are kept; None trains without compilation.
    """
    torch.set_num_threads(1)
    if kernels is not None:
        esper_fx.configure(cache_dir=kernels, workers=1, worker_nice=0, blocks=False)
    path = folder / "checkpoint"
    checkpoint = torch.load(path, weights_only=True) if path.exists() else None
    run = Training("adamw with groups", compiled=kernels is not None, checkpoint=checkpoint, attach_first=False)
    for step in range(len(run.losses), steps):
        if step in plan:
            run.live(plan[step])
            assert run.model.settle(300)
        run.step()
        _replace(path, run.save())
        progress.send(step)
    _replace(folder / "final", run.save())


def _replace(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".temporary")
    torch.save(value, temporary)
    os.replace(temporary, path)
