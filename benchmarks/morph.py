"""How long morphing takes: against a plain symbolic trace of the same model, and as the model grows."""

from __future__ import annotations

from time import perf_counter

import torch
from torch import Tensor, fx, nn

import esper_fx
from benchmarks.harness import interleave
from benchmarks.options import Options
from benchmarks.report import Bar, Report, Row

AGAINST_TRACE = Bar(at_most=2.0, aim=1.5)
LINEAR = Bar(at_most=1.5, aim=1.2)
SMALL, MIDDLE, LARGE = 100, 1_000, 3_000
PARTS = 5


class Block(nn.Module):
    """A residual block of five modules, itself counted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.act = nn.GELU()
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))  # type: ignore[no-any-return]


def network(modules: int, width: int = 8) -> nn.Module:
    """A residual network with so many modules."""
    return nn.Sequential(*[Block(width) for _ in range(modules // PARTS)])


def run(options: Options) -> Report:
    """Plain tracing and morphing of 1,000 modules take turns, and so does morphing of 100 and of 3,000 modules."""
    report = Report("morph")
    rounds = 5 if options.quick else 30
    nets = {modules: network(modules) for modules in (SMALL, MIDDLE, LARGE)}
    x = torch.randn(2, 8)

    def morph(modules: int) -> None:
        esper_fx.morph(nets[modules], sites="*")

    samples = interleave(
        {"trace": lambda: fx.symbolic_trace(nets[MIDDLE]), "morph": lambda: morph(MIDDLE)},
        rounds=rounds,
        seed=options.seed,
    )
    spread = samples.ratio("morph", "trace")
    report.add(
        Row(
            f"morph: {MIDDLE:,} modules, {MIDDLE // PARTS} sites / plain symbolic_trace",
            spread.p50,
            "×",
            AGAINST_TRACE,
            spread=spread,
        )
    )
    sizes = interleave(
        {"small": lambda: morph(SMALL), "large": lambda: morph(LARGE)}, rounds=max(5, rounds // 3), seed=options.seed
    )
    growth = sizes.ratio("large", "small").scaled(SMALL / LARGE)
    report.add(
        Row(
            f"morph: time a module at {LARGE:,} modules / at {SMALL}",
            growth.p50,
            "×",
            LINEAR,
            spread=growth,
            note="1 where time grows linearly",
        )
    )
    started = perf_counter()
    model = esper_fx.morph(nets[MIDDLE], sites="auto", example_inputs=(x,))
    report.add(
        Row(
            f'morph: {MIDDLE:,} modules, sites="auto", with example inputs',
            perf_counter() - started,
            "s",
            note=f"{len(model.seeds)} sites; it runs on tensors without data twice",
        )
    )
    report.raw["seconds"] = {"trace and morph": dict(samples.seconds), "sizes": dict(sizes.seconds)}
    return report
