"""Collect a summary: read what a model is doing now, from any thread, without a hand in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from esper_fx.errors import InspectionError, SiteError
from esper_fx.inspect.records import PendingChange, ProgramSummary, RegionSummary, SeedSummary, Summary
from esper_fx.lifecycle import Stage
from esper_fx.lineage import json_value
from esper_fx.model import MorphableModel, morphed
from esper_fx.morphing.branch import NAMESPACE
from esper_fx.morphing.original import original_kind
from esper_fx.stats import engine_stats, programs_of

if TYPE_CHECKING:
    from esper_fx.engine.sized_program import SizedProgram
    from esper_fx.growth import Growth
    from esper_fx.seed import KasminaSeed

#: Seconds to wait for the seeds to be between two transitions. A model that hangs in one can still be looked into.
PATIENCE_S = 0.2


def summary(model: nn.Module) -> Summary:
    """What a model is doing now: its seeds, what is on its way, and what its compiled programs run.

    It compiles nothing and changes nothing, and may be called from any thread in the middle of training: the seeds are
    held for as long as it takes to copy their state, which is microseconds.

    Args:
        model: A morphed model, or what `torch.compile` has made of one.

    Raises:
        InspectionError: It is neither.
    """
    found = morphed(model, "summary", InspectionError)
    growth = found.growth
    seeds = tuple(seed_summaries(growth))
    return Summary(
        model=original_kind(found).__name__,
        clock=growth.clock,
        parameters=sum(parameter.numel() for parameter in _original_parameters(found)),
        grown=sum(seed.parameters for seed in seeds),
        stages=_count_stages(seeds),
        morphology={seed.site: seed.blueprint for seed in seeds if seed.live and seed.blueprint is not None},
        seeds=seeds,
        pending=tuple(_pending(growth)),
        settled=not found.pending,
        programs=tuple(_program(program, growth) for program in programs_of(growth)),
        engine=engine_stats(growth),
    )


def seed_summaries(growth: Growth) -> Iterator[SeedSummary]:
    """All seeds of a model as they are now, in the order of their rows in the state arrays."""
    with growth.lock.within(PATIENCE_S):
        state = growth.state.columns()
        parts = [(seed, seed.live, seed.body, seed.blueprint, seed.config, seed.error) for seed in growth.by_index]
    for i, part in enumerate(parts):
        yield _seed({field: values[i] for field, values in state.items()}, *part)


def _seed(
    state: Mapping[str, int | float],
    seed: KasminaSeed,
    live: bool,
    body: nn.Module | None,
    blueprint: str | None,
    config: Mapping[str, Any],
    error: BaseException | None,
) -> SeedSummary:
    sizes = [] if body is None else [(p.numel(), p.requires_grad) for p in body.parameters()]
    try:
        site = seed.site
    except SiteError:  # nothing has flowed through it yet
        site = None
    return SeedSummary(
        site=seed.name,
        stage=Stage(int(state["stage"])).name,
        since=int(state["stage_since"]),
        live=live,
        blueprint=blueprint,
        config=json_value(config),
        alpha=state["alpha"],
        gate=state["gate"],
        health=state["health"] if math.isfinite(state["health"]) else None,
        parameters=sum(size for size, _ in sizes),
        trainable=sum(size for size, trained in sizes if trained),
        shape=None if site is None else tuple(map(int, site.shape)),
        dtype=None if site is None else str(site.dtype).removeprefix("torch."),
        feature_dim=None if site is None else site.feature_dim,
        germinations=int(state["germinations"]),
        errors=int(state["error_count"]),
        error=_reason(error),
    )


def _reason(error: BaseException | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"


def _original_parameters(model: MorphableModel) -> Iterator[nn.Parameter]:
    return (value for name, value in model.named_parameters() if not name.startswith(f"{NAMESPACE}."))


def _count_stages(seeds: tuple[SeedSummary, ...]) -> dict[str, int]:
    counts = Counter(seed.stage for seed in seeds)
    return {stage.name: counts[stage.name] for stage in Stage if counts[stage.name]}


def _pending(growth: Growth) -> Iterator[PendingChange]:
    for change, move in growth.changes.on_their_way():
        what = "goes" if move.germination is None else "comes"
        yield PendingChange(move.seed.name, what, move.target.name, change.ready, _reason(change.error))


def _program(program: SizedProgram, growth: Growth) -> ProgramSummary:
    running, layout, seeds = program.running, program.layout, list(program.seeds)
    sites = tuple(seed.name for seed in seeds if seed.growth is growth)
    if running is None or layout is None:
        return ProgramSummary("eager", program.complete, sites, ())
    plan = next(plan for plan in layout.plans if plan.name == running.plan)
    regions = []
    for region, variant in zip(plan.regions, running.variants, strict=True):
        own = [(seeds[slot].name, running.bodies[slot]) for slot in region.slots if seeds[slot].growth is growth]
        live = tuple(site for site, body in own if body is not None)
        dormant = tuple(site for site, body in own if body is None)
        regions.append(RegionSummary(variant.key.digest, len(variant.module.graph.nodes), live, dormant))
    return ProgramSummary(running.plan, running.complete, sites, tuple(regions))
