"""A summary as text for people: tables of fixed width that fit a terminal of 120 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from esper_fx import blueprints
from esper_fx.inspect.names import shortened, visible, width
from esper_fx.inspect.records import ProgramSummary, SeedSummary, Summary
from esper_fx.lineage import json_value

COLUMNS = 120
_GAP = "  "
#: A column is made no narrower than this to make a table fit.
_LEAST = 8

SEED_COLUMNS = (
    "site",
    "stage",
    "since",
    "blueprint",
    "alpha",
    "gate",
    "health",
    "parameters",
    "value",
    "births",
    "errors",
)
_REGIONS = ("region", "kernel", "nodes", "live seeds", "dormant seeds")
_NUMBERS = frozenset({"since", "alpha", "gate", "health", "parameters", "births", "errors", "region", "nodes"})


def summary_text(summary: Summary) -> str:
    """The whole summary, no line wider than 120 columns."""
    lines = [*head(summary), "", *table(SEED_COLUMNS, [seed_row(seed) for seed in summary.seeds])]
    for seed in summary.seeds:
        if seed.error is not None:
            lines.append(f"{visible(seed.site)} failed: {visible(seed.error)}")
    for number, program in enumerate(summary.programs, 1):
        lines += ["", *_program(number, program)]
    return "\n".join(shortened(line, COLUMNS).rstrip() for line in lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows under a header, in columns; the widest columns give way until all fit, shortened in the middle."""
    cells = [list(header), *([visible(cell) for cell in row] for row in rows)]
    widths = [max(width(row[column]) for row in cells) for column in range(len(header))]
    while sum(widths) + len(_GAP) * (len(widths) - 1) > COLUMNS and max(widths) > _LEAST:
        widths[widths.index(max(widths))] -= 1
    return [
        _GAP.join(_cell(text, size, name in _NUMBERS) for text, size, name in zip(row, widths, header, strict=True))
        for row in cells
    ]


def _cell(text: str, size: int, right: bool) -> str:
    text = shortened(text, size)
    padding = " " * (size - width(text))
    return padding + text if right else text + padding


def head(summary: Summary) -> Iterator[str]:
    """The lines that say the most important."""
    live = len(summary.morphology)
    yield (
        f"{visible(summary.model)}: {summary.parameters:,} parameters, {summary.grown:,} grown; "
        f"{live} of {len(summary.seeds)} seeds live; clock {summary.clock:,}"
    )
    yield "stages: " + (", ".join(f"{count} {stage}" for stage, count in summary.stages.items()) or "no seeds")
    coming = [f"{change.site} {change.change}{' (ready)' * change.ready}" for change in summary.pending]
    better = ["kernels of a better plan"] if not summary.settled and not coming else []
    yield "on its way: " + visible(", ".join(coming + better) or "nothing")
    engine = summary.engine
    yield (
        f"engine: {engine.swaps} swaps, {engine.kernels_compiled} kernels compiled beside training "
        f"({engine.compile_seconds:.1f} s), {engine.foreground_compiles} in first calls, {engine.kernels_loaded} loaded, "
        f"{engine.recompiles} recompiles"
    )


def seed_row(seed: SeedSummary) -> list[str]:
    """What is to be said of a seed, in the columns of ``SEED_COLUMNS``."""
    return [
        seed.site,
        seed.stage,
        f"{seed.since:,}",
        _blueprint(seed),
        f"{seed.alpha:.4g}",
        f"{seed.gate:.4g}",
        "-" if seed.health is None else f"{seed.health:.4g}",
        _parameters(seed),
        value_text(seed),
        str(seed.germinations),
        str(seed.errors),
    ]


def _blueprint(seed: SeedSummary) -> str:
    """The blueprint, with those of its parameters that are not the defaults."""
    if seed.blueprint is None:
        return "-"
    known = blueprints.get(seed.blueprint).parameters if seed.blueprint in blueprints.names() else {}
    defaults = {name: json_value(parameter.default) for name, parameter in known.items()}
    given = [
        f"{name}={value}" for name, value in seed.config.items() if name not in defaults or value != defaults[name]
    ]
    return f"{seed.blueprint}({', '.join(given)})" if given else seed.blueprint


def _parameters(seed: SeedSummary) -> str:
    if not seed.parameters:
        return "-"
    if seed.trainable == seed.parameters:
        return f"{seed.parameters:,}"
    return f"{seed.parameters:,} ({seed.trainable:,} trained)" if seed.trainable else f"{seed.parameters:,} frozen"


def value_text(seed: SeedSummary) -> str:
    """What flows through a seed's site, such as ``8x64x[256] float32``; features in brackets."""
    if seed.shape is None:
        return "not known yet"
    sizes = [f"[{size}]" if dim == seed.feature_dim else str(size) for dim, size in enumerate(seed.shape)]
    return f"{'x'.join(sizes)} {seed.dtype}"


def _program(number: int, program: ProgramSummary) -> Iterator[str]:
    rest = "" if program.complete else ", kernels of other plans on their way"
    yield f"program {number}: plan {program.plan}, {_count(program.regions, 'region')}, {_count(program.sites, 'seed')}{rest}"
    if program.regions:
        rows = [
            (str(place), region.kernel[:12], str(region.nodes), _sites(region.live), _sites(region.dormant))
            for place, region in enumerate(program.regions)
        ]
        yield from table(_REGIONS, rows)


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _sites(sites: Sequence[str]) -> str:
    return ", ".join(sites) or "-"
