"""What a summary holds: plain data, no tensors and no modules, a picture of one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from esper_fx.lineage import json_value
from esper_fx.stats import EngineStats


@dataclass(frozen=True)
class SeedSummary:
    """One seed.

    Attributes:
        site: Its site.
        stage: Name of its stage.
        since: The clock when it entered that stage.
        live: Whether its body takes part in the computation.
        blueprint: Name of its body's blueprint, or None.
        config: Parameters of the blueprint, as JSON types.
        alpha: The factor on what the body returns.
        gate: 1 where gradient passes through the body into the host, 0 where it does not.
        health: The last measured health, None where none was measured.
        parameters: Number of scalars in the body's parameters.
        trainable: How many of these get gradients.
        shape: Shape of the value when it was seen first; None, as the next two, where nothing is known of the site yet.
        dtype: Its dtype, such as ``float32``.
        feature_dim: Index of the dimension that holds features.
        germinations: How often the site has germinated.
        errors: How often it has failed.
        error: Why it failed last, or None.
    """

    site: str
    stage: str
    since: int
    live: bool
    blueprint: str | None
    config: Mapping[str, Any]
    alpha: float
    gate: float
    health: float | None
    parameters: int
    trainable: int
    shape: tuple[int, ...] | None
    dtype: str | None
    feature_dim: int | None
    germinations: int
    errors: int
    error: str | None


@dataclass(frozen=True)
class PendingChange:
    """A change of the morphology that is asked for and not live yet.

    Attributes:
        site: Its site.
        change: ``comes`` where a body comes, ``goes`` where it goes.
        stage: Name of the stage that follows.
        ready: Whether the next step boundary decides it.
        error: Why its kernels cannot be had, or None.
    """

    site: str
    change: str
    stage: str
    ready: bool
    error: str | None


@dataclass(frozen=True)
class RegionSummary:
    """One region of a compiled program.

    Attributes:
        kernel: The digest of its kernel's key.
        nodes: Number of nodes in the graph that was compiled, inputs and output included.
        live: Sites of the model whose bodies are in it.
        dormant: Its other sites of the model.
    """

    kernel: str
    nodes: int
    live: tuple[str, ...]
    dormant: tuple[str, ...]


@dataclass(frozen=True)
class ProgramSummary:
    """One compiled program.

    Attributes:
        plan: The plan in use: ``whole``, ``blocks`` or ``eager``.
        complete: Whether nothing is left to get ready for what runs now.
        sites: Sites of the model in it.
        regions: What it runs, in order; nothing where it runs eagerly.
    """

    plan: str
    complete: bool
    sites: tuple[str, ...]
    regions: tuple[RegionSummary, ...]


@dataclass(frozen=True)
class Summary:
    """A morphed model at one moment; ``str()`` of it is a table for people.

    Attributes:
        model: Name of the original's class.
        clock: Training steps seen.
        parameters: Number of scalars in the original's parameters.
        grown: Number of scalars in the parameters of all bodies.
        stages: How many seeds are in each stage that has any.
        morphology: Site to blueprint of the live seeds.
        seeds: The seeds, in the order of ``model.seeds``.
        pending: What is on its way, in order.
        settled: Whether nothing is on its way, neither a change nor kernels of a better plan.
        programs: The compiled programs, in the order of their first calls.
        engine: What the engine has done.
    """

    model: str
    clock: int
    parameters: int
    grown: int
    stages: Mapping[str, int]
    morphology: Mapping[str, str]
    seeds: tuple[SeedSummary, ...]
    pending: tuple[PendingChange, ...]
    settled: bool
    programs: tuple[ProgramSummary, ...]
    engine: EngineStats

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON types only: what any strict JSON writer takes."""
        return dict(json_value(asdict(self)))

    def __str__(self) -> str:
        from esper_fx.inspect.text import summary_text

        return summary_text(self)
