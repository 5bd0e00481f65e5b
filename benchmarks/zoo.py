"""Morph the models that people train, find sites by themselves, grow, prune, go back: all to the bit."""

from __future__ import annotations

import copy
import gc
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import esper_fx
from benchmarks.architectures import Architecture, Inputs, architectures
from benchmarks.options import Options
from benchmarks.report import Bar, Report, Row

MORPHED = Bar(at_most=0.02, aim=0.0)
NONE = Bar(at_most=0.0, aim=0.0)
#: Attention among more positions than this takes long.
MOST_POSITIONS = 300


@dataclass
class Outcome:
    """What became of one architecture.

    Attributes:
        library: Where it is from.
        name: Its name.
        sites: How many sites there are.
        grown: What was grown and where.
        missed: The first thing that was not as it must be, and why; empty if all was.
        stage: The check that failed: ``morph``, ``dormant``, ``prune`` or ``unmorph``; empty if none did.
        seconds: How long it took.
    """

    library: str
    name: str
    sites: int = 0
    grown: str = ""
    missed: str = ""
    stage: str = ""
    seconds: float = 0.0


class Miss(Exception):
    """A check that failed: the stage, and why."""


def run(options: Options) -> Report:
    """All architectures, or every fifth with ``quick``; with ``compiled`` what `zoo_compiled` does instead."""
    if options.compiled:
        from benchmarks import zoo_compiled

        return zoo_compiled.run(options)
    report = Report("zoo")
    chosen = list(architectures())[:: 5 if options.quick else 1]
    outcomes = []
    for number, architecture in enumerate(chosen):
        outcomes.append(examine(architecture, options.seed + number))
        print(_line(outcomes[-1]), flush=True)
    for row in rows(outcomes):
        report.add(row)
    report.raw["architectures"] = [asdict(outcome) for outcome in outcomes]
    return report


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """The figures: shares of the architectures that missed, and the reasons."""
    stages = Counter(outcome.stage for outcome in outcomes)
    libraries = Counter(outcome.library for outcome in outcomes)
    morphed = len(outcomes) - stages["morph"]

    def why(stage: str) -> str:
        return "; ".join(f"{o.name}: {o.missed}" for o in outcomes if o.stage == stage)[:400] or "none"

    counted = ", ".join(f"{count} {library}" for library, count in libraries.items())
    return [
        Row("zoo: architectures", float(len(outcomes)), "", note=counted),
        Row("zoo: not morphed with 2 sites", stages["morph"] / len(outcomes), "share", MORPHED, note=why("morph")),
        Row(
            "zoo: not bitwise equal while dormant", float(stages["dormant"]), f"of {morphed}", NONE, note=why("dormant")
        ),
        Row("zoo: not bitwise back after a prune", float(stages["prune"]), f"of {morphed}", NONE, note=why("prune")),
        Row("zoo: not equal after unmorph", float(stages["unmorph"]), f"of {morphed}", NONE, note=why("unmorph")),
    ]


def _line(outcome: Outcome) -> str:
    verdict = f"{outcome.stage}: {outcome.missed}" if outcome.stage else "as it must be"
    what = f"{outcome.library}/{outcome.name}"
    return f"{what:<48} {outcome.sites:>3} sites  {outcome.grown:<60} {verdict} ({outcome.seconds:.1f} s)"


def examine(architecture: Architecture, seed: int) -> Outcome:
    """Run all checks on one architecture, the same for the same seed."""
    outcome = Outcome(architecture.library, architecture.name)
    started = perf_counter()
    stage = "morph"

    def now(name: str) -> None:
        nonlocal stage
        stage = name

    try:
        _examine(architecture, seed, outcome, now)
    except Exception as error:
        outcome.stage = stage
        reason = str(error) if isinstance(error, Miss) else f"{type(error).__name__}: {error}"
        outcome.missed = " ".join(reason.split())[:200]
    outcome.seconds = perf_counter() - started
    gc.collect()
    return outcome


def _examine(architecture: Architecture, seed: int, outcome: Outcome, stage: Callable[[str], None]) -> None:
    torch.manual_seed(seed)
    chance = random.Random(seed)
    net, inputs = architecture.build()
    net.train()
    control = Side(copy.deepcopy(net), inputs)
    model = esper_fx.morph(copy.deepcopy(net), sites="auto", example_inputs=inputs)
    del net
    outcome.sites = len(model.seeds)
    if outcome.sites < 2:
        raise Miss(f"only {outcome.sites} sites")
    subject = Side(model, inputs)
    esper_fx.attach(subject.optimizer, model)

    stage("dormant")
    same(subject.step(seed), control.step(seed), "a training step")
    same(subject.look(seed), control.look(seed), "evaluation")

    stage("prune")
    grown = model.seeds[chance.choice(list(model.seeds))]
    positions = math.prod(grown.site.shape) // grown.site.shape[0] // grown.site.features
    fitting = [name for name in grown.fits() if name != "sequence"]  # it needs to be told its parts
    blueprint = chance.choice([name for name in fitting if name != "attention" or positions <= MOST_POSITIONS])
    outcome.grown = f"{blueprint} at {grown.site.name}"
    grown.germinate(blueprint)
    same(subject.step(seed + 1), control.step(seed + 1), "a training step while a seed incubates")
    grown.prune()
    same(subject.step(seed + 2), control.step(seed + 2), "a training step after the prune")
    same(subject.look(seed), control.look(seed), "evaluation after the prune")

    stage("unmorph")
    plain = Side(esper_fx.unmorph(model), inputs)
    same(plain.look(seed), control.look(seed), "evaluation of the plain model")
    same(plain.step(seed + 3), control.step(seed + 3), "a training step of the plain model")


class Side:
    """A model with an optimizer and inputs: one side of a comparison."""

    def __init__(self, net: nn.Module, inputs: Inputs) -> None:
        self.net = net
        self.inputs = inputs
        self.optimizer = torch.optim.SGD(self._own().values(), lr=1e-3)

    def _own(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.net.named_parameters() if not name.startswith("esper.")}

    def call(self, seed: int) -> list[Tensor]:
        """The floating tensors that the model returns, with random numbers from ``seed``."""
        torch.manual_seed(seed)
        given = self.inputs
        return tensors(self.net(**given) if isinstance(given, Mapping) else self.net(*given))

    def step(self, seed: int) -> dict[str, Tensor]:
        """A training step: outputs, gradients, and parameters and buffers after it."""
        self.net.train()
        outputs = self.call(seed)
        loss = torch.stack([output.float().square().mean() for output in outputs if output.requires_grad]).sum()
        loss.backward()
        own = self._own()
        found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        found |= {f"gradient of {name}": p.grad.clone() for name, p in own.items() if p.grad is not None}
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        found |= {f"parameter {name}": parameter.detach().clone() for name, parameter in own.items()}
        buffers = {name: b for name, b in self.net.named_buffers() if not name.startswith("esper.")}
        return found | {f"buffer {name}": buffer.clone() for name, buffer in buffers.items()}

    def look(self, seed: int) -> dict[str, Tensor]:
        """What the model returns in evaluation mode."""
        self.net.eval()
        with torch.no_grad():
            return {f"output {i}": output for i, output in enumerate(self.call(seed))}


def tensors(value: Any) -> list[Tensor]:
    """All floating tensors in a nest of tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Raise Miss unless all tensors are equal to the bit."""
    if list(found) != list(expected):
        odd = sorted(set(found) ^ set(expected))
        raise Miss(f"{what}: {', '.join(odd[:3]) or 'the order'} differs")
    for name, tensor in found.items():
        other = expected[name]
        if tensor.dtype != other.dtype or not torch.equal(tensor.nan_to_num(7.0), other.nan_to_num(7.0)):
            raise Miss(f"{what}: {name} differs")
