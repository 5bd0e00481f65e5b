"""Batches of ever other sizes: a step of a morphed model against plain torch.compile, and what growth costs among them."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import esper_fx
from benchmarks import training
from benchmarks.harness import interleave, median
from benchmarks.options import Options
from benchmarks.report import Bar, Report, Row
from tests.support import models

STEP = Bar(at_most=1.03, aim=1.005)
NONE = Bar(at_most=0)
#: PyTorch convolves 16 maps and more in another way than fewer: that is another kernel, with plain torch.compile too.
BATCHES = range(4, 16)
TOKENS = range(16, 65)


def run(options: Options) -> Report:
    """Both sides are compiled with ``dynamic=True`` and get the same batches, each of another size than the one before.

    Transformers get other numbers of sequences and of tokens, CNNs other numbers of images. Once both are in steady state a
    module is grown in the middle, and steps are taken until it is live and the best plan runs.
    """
    report = Report("sizes")
    rounds, steps = (20, 20) if options.quick else (300, 100)
    for name in options.models:
        case = _case(name, options.seed)
        with training.empty_store():
            esper = training.esper_loop(case)
            esper.forward = torch.compile(esper.net, backend="esper", dynamic=True)
            plain = training.plain_loop(case)
            plain.forward = torch.compile(plain.net, dynamic=True)
            sides = {
                side: _stepping(name, loop, options.seed) for side, loop in {"plain": plain, "esper": esper}.items()
            }
            training.settle(esper)
            timed = interleave(sides, rounds=rounds, budget_s=60, warmup=8)
            before = esper.net.stats()
            event = _grow(esper, sides["esper"], training.MIDDLE[name], steps)
            after = esper.net.stats()
        ratio = timed.ratio("esper", "plain")
        note = f"{len(esper.net.seeds)} dormant seeds; plain {timed.side('plain').p50 * 1e3:.2f} ms"
        report.add(Row(f"{name}: training step, sizes vary, dormant / plain", ratio.p50, "×", STEP, ratio, note))
        longest = max(event["steps_s"]) / median(event["before_s"])
        quiet = max(event["before_s"]) / median(event["before_s"])
        note = f"live after {event['live_s']:.1f} s; longest quiet step {quiet:.1f}, sizes differ"
        report.add(Row(f"{name}: longest step while it grows / median before", longest, "×", None, None, note))
        compiled = after.foreground_compiles - before.foreground_compiles + after.recompiles - before.recompiles
        report.add(Row(f"{name}: compilations that a step waited for", compiled, "", NONE, None, "Dynamo's and ours"))
        report.raw[name] = {"step_s": timed.seconds, "event": event, "stats": training.stats_dict(esper)}
    return report


def _case(name: str, seed: int) -> models.Example:
    case = training.case(name, seed)
    if isinstance(case.model, models.Transformer):  # all positions alike: any number of tokens will do
        case.model.position_embedding = nn.Parameter(case.model.position_embedding.detach()[:1].clone())
    return case._replace(loss=_loss)


def _loss(outputs: Tensor) -> Tensor:
    return outputs.square().mean()


def _stepping(name: str, loop: training.Loop, seed: int) -> Callable[[], None]:
    batches = _batches(name, copy.deepcopy(loop.inputs[0]), seed)

    def step() -> None:
        loop.inputs = (next(batches),)
        loop.step()

    return step


def _batches(name: str, example: Tensor, seed: int) -> Iterator[Tensor]:
    """Equal seeds give equal batches."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in itertools.count():
        batch = draw.choice(BATCHES)
        if example.is_floating_point():
            yield torch.randn(batch, *example.shape[1:], generator=generator)
        else:
            yield torch.randint(int(example.max()), (batch, draw.choice(TOKENS)), generator=generator)


def _grow(loop: training.Loop, step: Callable[[], None], site: str, quiet: int) -> dict[str, Any]:
    """Grow a module while training goes on: seconds of the steps before, and of those until the best plan runs again."""
    before = [_seconds(step) for _ in range(quiet)]
    seed: esper_fx.KasminaSeed = loop.net.seeds[site]
    started, steps, live = perf_counter(), [], None
    seed.germinate("low_rank", rank=8)
    while live is None or loop.net.pending:
        steps.append(_seconds(step))
        if live is None and seed.live:
            live = perf_counter() - started
        if perf_counter() - started > training.SETTLE_S:
            raise RuntimeError(f"after {training.SETTLE_S:.0f} s the model is not on its best plan: {loop.net.stats()}")
    return {"before_s": before, "steps_s": steps, "live_s": live}


def _seconds(step: Callable[[], None]) -> float:
    started = perf_counter()
    step()
    return perf_counter() - started
