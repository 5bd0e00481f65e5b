"""`zoo --compiled`: models that people train, with a live seed, under backend "esper" against eager."""

from __future__ import annotations

import copy
import gc
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import esper_fx
from benchmarks.architectures import Architecture, Inputs, architectures
from benchmarks.options import Options
from benchmarks.report import Bar, Report, Row
from benchmarks.zoo import MOST_POSITIONS, Miss, tensors
from esper_fx import KasminaSeed, MorphableModel, blueprints
from esper_fx.engine.build import Ambient
from esper_fx.engine.executable import Executable
from esper_fx.engine.plan import Layout
from esper_fx.engine.sized_program import SizedProgram

DIFFERENCE = Bar(at_most=1e-4, aim=1e-5)
NONE = Bar(at_most=0.0, aim=0.0)
#: Rounding errors are as large as this beside the largest gradient (or output) of a model; what is smaller is all noise.
FLOOR = 1e-3
#: The least relative change of the outputs by which a live seed shows that it counts.
LEAST_EFFECT = 1e-3
#: How many times parameters are changed a little, to see how far eager results jump by themselves.
NUDGES = 10
#: Images at once where there is batch normalisation.
BATCH = 16
CHOSEN: Mapping[str, Sequence[str]] = {
    "torchvision": ("resnet18", "mobilenet_v3_small", "densenet", "convnext", "swin", "vit"),
    "timm": ("resnet10t", "lcnet_050", "vit_tiny_patch16_224", "levit_128s", "mobilevit_xxs"),
    "transformers": (
        "BertModel",
        "GPT2LMHeadModel",
        "LlamaForCausalLM",
        "T5ForConditionalGeneration",
        "BartModel",
        "ViTModel",
        "ConvNextModel",
        "Wav2Vec2Model",
        "WhisperModel",
    ),
}
QUICK = ("vit", "lcnet_050", "T5ForConditionalGeneration")


@dataclass
class Outcome:
    """What became of one architecture.

    Attributes:
        library: Where it is from.
        name: Its name.
        grown: What was grown and where.
        whole: Worst relative difference between compiled and eager, with the plan ``whole``.
        blocks: The same with the plan ``blocks``; NaN where there is none.
        regions: How many regions the plan ``blocks`` has; 0 where there is none.
        recompiles: How often Dynamo compiled a frame with seeds anew.
        where: Which output or gradient differs most.
        arbiter: What float64 says, where that was asked.
        missed: Why there is no figure; empty if there is.
        seconds: How long it took.
    """

    library: str
    name: str
    grown: str = ""
    whole: float = math.nan
    blocks: float = math.nan
    regions: int = 0
    recompiles: int = 0
    where: str = ""
    arbiter: str = ""
    missed: str = ""
    seconds: float = 0.0

    @property
    def worst(self) -> float:
        """The larger of the two differences; NaN where something was missed."""
        if self.missed:
            return math.nan
        return self.whole if math.isnan(self.blocks) else max(self.whole, self.blocks)


def run(options: Options) -> Report:
    """All chosen architectures, or three with ``quick``."""
    report = Report("zoo-compiled")
    outcomes = []
    for number, architecture in enumerate(architectures()):
        wanted = QUICK if options.quick else CHOSEN[architecture.library]
        if architecture.name in wanted:
            outcomes.append(examine(architecture, options.seed + number))
            print(_line(outcomes[-1]), flush=True)
    for row in rows(outcomes):
        report.add(row)
    report.raw["architectures"] = [asdict(outcome) for outcome in outcomes]
    return report


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """The misses, the worst difference, and one row a model."""
    missed = [outcome for outcome in outcomes if outcome.missed]
    figures = [outcome.worst for outcome in outcomes if not outcome.missed]
    doubles = sum(outcome.arbiter.startswith("in float64") for outcome in outcomes)
    why = "; ".join(f"{outcome.name}: {outcome.missed}" for outcome in missed)[:400] or "none"
    summary = [
        Row("zoo --compiled: without a figure", float(len(missed)), f"of {len(outcomes)}", NONE, note=why),
        Row(
            "zoo --compiled: worst relative difference",
            max(figures, default=math.nan),
            "",
            DIFFERENCE,
            note=f"{doubles} compared in float64" if doubles else "",
        ),
    ]
    return summary + [_row(outcome) for outcome in outcomes]


def _row(outcome: Outcome) -> Row:
    notes = [outcome.grown, f"{outcome.regions} blocks" * bool(outcome.regions), outcome.where, outcome.arbiter]
    if outcome.recompiles:
        notes.append(f"{outcome.recompiles} recompiles")
    notes.append(outcome.missed)
    return Row(f"{outcome.library}/{outcome.name}", outcome.worst, "", DIFFERENCE, note="; ".join(filter(None, notes)))


def _line(outcome: Outcome) -> str:
    what = f"{outcome.library}/{outcome.name}"
    blocks = f"blocks {outcome.blocks:.1e}, " if outcome.regions else ""
    verdict = outcome.missed or f"whole {outcome.whole:.1e}, {blocks}{outcome.where} {outcome.arbiter}"
    return f"{what:<40} {outcome.grown:<48} {verdict} ({outcome.seconds:.1f} s)"


def examine(architecture: Architecture, seed: int) -> Outcome:
    """Compare one architecture compiled with itself run eagerly, the same for the same seed."""
    outcome = Outcome(architecture.library, architecture.name)
    started = perf_counter()
    torch.compiler.reset()
    try:
        with esper_fx.configure(workers=0, store=False):
            _examine(architecture, seed, outcome)
    except Exception as error:
        reason = str(error) if isinstance(error, Miss) else f"{type(error).__name__}: {error}"
        outcome.missed = " ".join(reason.split())[:200]
    outcome.seconds = perf_counter() - started
    gc.collect()
    return outcome


def _examine(architecture: Architecture, seed: int, outcome: Outcome) -> None:
    torch.manual_seed(seed)
    chance = random.Random(seed)
    net, inputs = architecture.build()
    if any(isinstance(module, _BatchNorm) for module in net.modules()):
        inputs = in_batches_of(BATCH, inputs)
    without_zeros(without_dropout(net)).train()
    model = esper_fx.morph(net, sites="auto", example_inputs=inputs)
    before = step(model, inputs, seed)
    if any(not torch.equal(found, before[name]) for name, found in step(model, inputs, seed + 1).items()):
        raise Miss("two eager calls differ: something in it is random")
    outcome.grown, expected = grow(model, inputs, seed, chance, before)
    exact = Exact(model, inputs, seed)
    found = Compiled(model, inputs, seed)
    outcome.regions = found.regions
    outcome.whole, outcome.where, outcome.arbiter = judge(found.whole, expected, exact)
    if found.blocks:
        outcome.blocks, where, arbiter = judge(found.blocks, expected, exact)
        if outcome.blocks > outcome.whole:
            outcome.where, outcome.arbiter = where, arbiter
    outcome.recompiles = model.stats().recompiles
    if outcome.worst > DIFFERENCE.at_most:
        compare_in_double(model, inputs, seed, expected, exact, outcome)


def grow(
    model: MorphableModel, inputs: Inputs, seed: int, chance: random.Random, before: Mapping[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    """Grow a body at a random site at which it changes the outputs; returns what grew where, and a step with it."""
    sites = list(model.seeds)
    while sites:
        grown = model.seeds[sites.pop(sites.index(chance.choice(sites)))]
        blueprint, weights = choose(grown, chance, seed)
        grown.germinate(blueprint, weights=weights)
        expected = step(model, inputs, seed)
        if difference(_outputs(expected), _outputs(before))[0] >= LEAST_EFFECT:
            return f"{blueprint} at {grown.name}", expected
        grown.prune()
    raise Miss(f"at no site did a body change the outputs by {LEAST_EFFECT:.1e}")


class Compiled:
    """What a model computes under backend "esper".

    Attributes:
        whole: A step with the plan ``whole``.
        blocks: A step with the plan ``blocks``; empty where there is none.
        regions: How many regions the plan ``blocks`` has.
    """

    def __init__(self, model: MorphableModel, inputs: Inputs, seed: int) -> None:
        fast: Any = torch.compile(model, backend="esper")
        self.whole = step(fast, inputs, seed)
        plans = model.stats().plans
        if not plans or set(plans) != {"whole"}:
            raise Miss(f"not compiled: its programs run as {', '.join(plans) or 'nothing'}")
        self.regions = run_in_blocks(model, lambda: step(fast, inputs, seed))
        self.blocks = step(fast, inputs, seed) if self.regions else {}


def compare_in_double(
    model: MorphableModel, inputs: Inputs, seed: int, expected: Mapping[str, Tensor], exact: Exact, outcome: Outcome
) -> None:
    """Compare compiled with eager in float64, where in float32 they differ by more than the bar.

    A gradient jumps where a value crosses a kink (of a ReLU, of a maximum), and a rounding error is enough for that. The
    outcome says by how much eager itself changes in float32, at most, when parameters change by about a millionth.
    """
    generator = torch.Generator().manual_seed(seed)
    own = 0.0
    for _ in range(NUDGES):
        nudged = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in nudged.parameters():
                parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))
        own = max(own, difference(step(nudged, inputs, seed), expected)[0])
    torch.compiler.reset()
    found = Compiled(exact.model, exact.inputs, seed)
    outcome.arbiter = (
        f"in float64; in float32 {outcome.worst:.1e} at {outcome.where}, where eager changes by up to {own:.1e} "
        "when parameters change by 1e-6"
    )
    outcome.whole, outcome.where = difference(found.whole, exact.found)
    if found.blocks:
        outcome.blocks, where = difference(found.blocks, exact.found)
        outcome.where = where if outcome.blocks > outcome.whole else outcome.where


def run_in_blocks(model: MorphableModel, call: Callable[[], object]) -> int:
    """Have all programs of a model run their plan ``blocks``, compiled here and now; returns the number of regions.

    The engine leaves that plan to worker processes, which stand back while a machine is busy with something else.
    """
    programs = list(model.growth.changes.programs)
    given: dict[SizedProgram, Sequence[Any]] = {}
    for program in programs:
        program.active = _noting(program.active, program, given)
    call()
    regions = 0
    for program, arguments in given.items():
        layout = Layout(program._module, arguments, Ambient.current(), blocks=True)
        if len(layout.plans) < 2:
            continue
        plan = layout.plans[1]
        live = {seed for seed in program.seeds if seed.live}
        variants = layout.variants(plan, program.assignment(live)) or []
        kernels = [program.service.obtain(variant.key, variant.compile_here) for variant in variants]
        program.active = Executable(plan, kernels, [seed if seed in live else None for seed in program.seeds])
        regions += len(plan.regions)
    return regions


def _noting(active: Any, program: SizedProgram, given: dict[SizedProgram, Sequence[Any]]) -> Callable[..., Any]:
    def run_and_note(arguments: Sequence[Any]) -> Any:
        given[program] = arguments
        return active(arguments)

    return run_and_note


def in_batches_of(size: int, inputs: Inputs) -> Inputs:
    """More random images.

    Batch normalisation of two values is a sign function, whose gradient is all rounding errors.
    """
    if isinstance(inputs, Mapping):
        return {name: torch.randn(size, *value.shape[1:]).to(value.dtype) for name, value in inputs.items()}
    return tuple(torch.randn(size, *value.shape[1:]).to(value.dtype) for value in inputs)


def without_dropout(net: nn.Module) -> nn.Module:
    """Set every probability of dropping something to zero, in place, so that a training step is not random."""
    for module in net.modules():
        if "Dropout" in type(module).__name__ or "StochasticDepth" in type(module).__name__:
            module.p = 0.0  # type: ignore[assignment]
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return net


def without_zeros(net: nn.Module) -> nn.Module:
    """Give parameters that begin as zero small random values, in place: behind them nothing would count."""
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.1)
    return net


def choose(seed: KasminaSeed, chance: random.Random, number: int) -> tuple[str, dict[str, Tensor]]:
    """A blueprint that fits a site, and weights for it that are not zero anywhere."""
    positions = math.prod(seed.site.shape) // seed.site.shape[0] // seed.site.features
    fitting = [name for name in seed.fits() if name != "sequence"]  # it needs to be told its parts
    name = chance.choice([name for name in fitting if name != "attention" or positions <= MOST_POSITIONS])
    body = blueprints.get(name).build(seed.site, {}, seed=number)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.1)
    return name, body.state_dict()


def step(net: nn.Module, inputs: Inputs, seed: int) -> dict[str, Tensor]:
    """Outputs and the gradients of all parameters, for a loss that every output counts in; nothing is updated."""
    torch.manual_seed(seed)
    net.zero_grad(set_to_none=True)
    outputs = tensors(net(**inputs) if isinstance(inputs, Mapping) else net(*inputs))
    loss = torch.stack([output.float().square().mean() for output in outputs if output.requires_grad]).sum()
    loss.backward()
    found = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
    named = ((name.removeprefix("_orig_mod."), parameter) for name, parameter in net.named_parameters())
    found |= {f"gradient of {name}": p.grad.clone() for name, p in named if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return found


class Exact:
    """What a model computes eagerly in float64; computed when it is asked for.

    Attributes:
        model: A copy of the model in float64.
        inputs: The inputs in float64.
    """

    def __init__(self, model: MorphableModel, inputs: Inputs, seed: int) -> None:
        self.model = copy.deepcopy(model).double()
        self.inputs = as_double(inputs)
        self._seed = seed

    @cached_property
    def found(self) -> dict[str, Tensor]:
        """Outputs and gradients."""
        return step(self.model, self.inputs, self._seed)


def judge(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], exact: Exact) -> tuple[float, str, str]:
    """Worst relative difference, where it is, and what float64 says.

    Where float32 run eagerly and compiled differ by more than the bar, the same in float64, eagerly, is taken for the
    truth: then the difference of the compiled model from that is the figure.
    """
    worst, where = difference(found, expected)
    if worst <= DIFFERENCE.at_most:
        return worst, where, ""
    error, where = difference(found, exact.found)
    own, _ = difference(expected, exact.found)
    return error, where, f"differs from eager by {worst:.1e}; from float64 by {error:.1e}, eager by {own:.1e}"


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest difference of two tensors beside the largest element, and which it is.

    A tensor whose elements are all tiny beside the others of its kind (a bias before a normalisation has no gradient but
    rounding errors) is measured by a thousandth of the largest.

    Raises:
        Miss: There are not the same tensors, or not of the same shape, or they are not finite at the same places.
    """
    if set(found) != set(expected):
        raise Miss(f"there is no {sorted(set(found) ^ set(expected))[0]} in one of the two")
    floors = {
        kind: FLOOR * max(_largest(tensor) for name, tensor in expected.items() if name.startswith(kind))
        for kind in {name.split()[0] for name in expected}
    }
    worst, where = 0.0, ""
    for name, tensor in found.items():
        other = expected[name]
        if tensor.shape != other.shape or not torch.equal(tensor.isfinite(), other.isfinite()):
            raise Miss(f"{name} has another shape, or is not finite at the same places")
        gap = _largest(tensor.double() - other.double())
        relative = gap / max(_largest(other), floors[name.split()[0]], torch.finfo(torch.float32).tiny)
        if relative > worst:
            worst, where = relative, name
    return worst, where


def _largest(tensor: Tensor) -> float:
    finite = tensor.double().nan_to_num(0.0, 0.0, 0.0)
    return float(finite.abs().max()) if finite.numel() else 0.0


def _outputs(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in found.items() if name.startswith("output")}


def as_double(value: Any) -> Any:
    """Inputs with floating tensors as float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: as_double(item) for name, item in value.items()}
    return tuple(as_double(item) for item in value) if isinstance(value, tuple | list) else value
