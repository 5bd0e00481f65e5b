"""What live seeds cost: a step with 4 of them against a hand-written model of the same modules, torch.compiled."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from benchmarks import training
from benchmarks.harness import interleave
from benchmarks.options import Options
from benchmarks.report import Bar, Report, Row
from tests.support.models import Example

BAR = Bar(at_most=1.03, aim=1.0)
SITES = ("blocks.0", "blocks.1", "blocks.3", "blocks.4")
LOW_RANK: tuple[str, dict[str, Any]] = ("low_rank", {"rank": 8})
MIXED: tuple[tuple[str, dict[str, Any]], ...] = (
    LOW_RANK,
    ("bottleneck", {}),
    ("channel_gate", {}),
    ("low_rank", {"rank": 4, "activation": "gelu"}),
)
# Two float32 programs that fuse differently round differently; a wrong wire is off by far more.
TOLERANCE = 1e-4


def run(options: Options) -> Report:
    """For each model, four equal seeds and four different ones; equal outputs and gradients are checked first."""
    report = Report("active")
    rounds = 20 if options.quick else 300
    mixtures = {"4 × low_rank": dict.fromkeys(SITES, LOW_RANK), "4 kinds": dict(zip(SITES, MIXED, strict=True))}
    for name in options.models:
        for kind, grow in mixtures.items():
            torch.compiler.reset()
            case = training.case(name, options.seed)
            with training.empty_store():
                esper = training.esper_loop(case)
                training.settle(esper)
                training.make_active(esper, grow)
                static = by_hand(case, esper, tuple(grow))
                error = largest_difference(esper, static)
                if error > TOLERANCE:
                    raise RuntimeError(
                        f"{name}, {kind}: the two sides differ by {error:.2e} relative; expected {TOLERANCE:g}"
                    )
                samples = interleave({"esper": esper.step, "static": static.step}, rounds=rounds, budget_s=40, warmup=8)
                still_best = training.on_best_plan(esper)
            ratio = samples.ratio("esper", "static")
            note = f"static {samples.side('static').p50 * 1e3:.2f} ms; loss and gradients equal within {error:.0e}"
            note += "" if still_best else "; NOT on plan whole"
            report.add(Row(f"{name}: training step, {kind} / static", ratio.p50, "×", BAR, ratio, note))
            report.raw[f"{name}, {kind}"] = {
                "step_s": samples.seconds,
                "stats": training.stats_dict(esper),
                "error": error,
            }
    return report


def by_hand(case: Example, esper: training.Loop, sites: tuple[str, ...]) -> training.Loop:
    """The model that someone would write who knew the outcome: the same parameters, the bodies wired in by hand."""
    net = copy.deepcopy(case.model)
    state = esper.net.state_dict()
    net.load_state_dict({name: state[name] for name in net.state_dict()})
    for site in sites:
        training.grow_by_hand(net, site, copy.deepcopy(esper.net.seeds[site].body))
    return training.plain_loop(case, net)


def largest_difference(esper: training.Loop, static: training.Loop) -> float:
    """Largest relative difference of the loss and of any gradient, each by its own largest magnitude."""
    losses = (esper.gradients().detach(), static.gradients().detach())
    pairs = [losses]
    hand = {_plain_name(name): parameter for name, parameter in static.net.named_parameters()}
    for name, parameter in esper.net.named_parameters():
        if name in hand:
            pairs.append((_gradient(name, parameter), _gradient(name, hand[name])))
    for site, seed in esper.net.seeds.items():
        for name, parameter in [] if seed.body is None else seed.body.named_parameters():
            by_name = _gradient(f"{site}.body.{name}", hand[f"{site}.body.{name}"])
            if not by_name.any():
                raise RuntimeError(f"parameter {site}.body.{name} does nothing, so equal outputs would prove nothing")
            pairs.append((_gradient(f"{site}.body.{name}", parameter), by_name))
    if len(pairs) < 2:
        raise RuntimeError("no parameter of the morphed model carries the name it has in the original")
    for loop in (esper, static):
        loop.optimizer.zero_grad(set_to_none=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs)


def _plain_name(name: str) -> str:
    """A parameter's name before it was wrapped by ``Grown``."""
    return name.replace(".inner.", ".")


def _gradient(name: str, parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError(f"parameter {name} got no gradient")
    return parameter.grad
