"""What a program runs in the steps that are measured: what it runs anyway, with probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from esper_fx.engine.bodies import BodyGoneError
from esper_fx.engine.executable import Executable, Prepared
from esper_fx.engine.pins import Pins
from esper_fx.engine.probes import ProbedKernel, Sampler
from esper_fx.engine.region import Variant
from esper_fx.engine.service import Service
from esper_fx.passes.metas import examples

if TYPE_CHECKING:
    from esper_fx.engine.sized_program import SizedProgram
    from esper_fx.seed import KasminaSeed


class Measuring:
    """The part of a program with fixed sizes that measures."""

    def __init__(self, service: Service) -> None:
        self._prepared: tuple[Sampler, Prepared] | None = None  # and who takes what it measures
        self._pins = Pins(service)

    def executable(self, program: SizedProgram, args: Sequence[Any]) -> Executable | None:
        """What measures and otherwise is what runs now; None where there are no kernels for that, or for these inputs."""
        running = program.running
        prepared = None if running is None else self._prepared_for(program, running.bodies)
        return prepared.executable if prepared is not None and prepared.executable.takes(args) else None

    def prepare(self, program: SizedProgram, live: set[KasminaSeed]) -> list[Variant]:
        """Get that ready for these bodies, by the plan of which least has to be compiled. Not for the training thread.

        Returns:
            The variants that still lack a kernel, each with a ``future`` or an ``error``.
        """
        sampler = _sampler(program)
        if sampler is None:
            return []
        try:
            missing = self._prepare(program, live, sampler)
        except BodyGoneError:  # what is wanted now is asked for in another round
            return []
        if _sampler(program) is not sampler:  # closed meanwhile, perhaps before there was this to drop
            self.drop()
        return missing

    def _prepare(self, program: SizedProgram, live: set[KasminaSeed], sampler: Sampler) -> list[Variant]:
        layout, bodies = program.layout, program.bodies(live)
        if layout is None or not layout.plans or self._prepared_for(program, bodies) is not None:
            return []
        plan, assignment = layout.plans[-1], program.assignment(live)
        places = zip(program.seeds, layout.slots, strict=True)
        probes = layout.probes(
            plan, sampler.directions, [seed.sketched_dim(examples(slot.value.shape)) for seed, slot in places]
        )
        variants = layout.variants(plan, assignment, probes=probes) or []
        self._pins.replace(variants)
        missing = [variant for variant in variants if not program.has_kernel(variant)]
        for variant in missing:
            variant.request(program.service, priority=20, retry=False)
        missing = [variant for variant in missing if not program.has_kernel(variant)]
        kernels = [program.kernel(variant) for variant in variants]
        if missing or None in kernels:
            return missing
        for number, (variant, region, own) in enumerate(zip(variants, plan.regions, probes, strict=True)):
            if own is not None:
                sites = [layout.slots[slot].site for slot in region.slots]
                place = len(region.inputs)
                kernels[number] = ProbedKernel(
                    kernels[number], own, variant.leaves, variant.rows, place, sites, sampler
                )
        seeds = [seed if seed in live else None for seed in program.seeds]
        executable = Executable(plan, kernels, seeds, assignment, layout.shown)
        self._prepared = sampler, Prepared(plan.name, bodies, tuple(variants), executable, complete=True)
        return []

    def drop(self) -> None:
        """Forget it."""
        self._prepared = None
        self._pins.replace([])

    def _prepared_for(self, program: SizedProgram, bodies: Sequence[nn.Module | None]) -> Prepared | None:
        prepared = self._prepared
        current = prepared is not None and prepared[0] is _sampler(program) and prepared[1].has(bodies)
        return prepared[1] if current and prepared is not None else None


def _sampler(program: SizedProgram) -> Sampler | None:
    """Who watches the program's model; with several models in it, it could not be told whose step it is."""
    return program.growths[0].sampler if len(program.growths) == 1 else None
