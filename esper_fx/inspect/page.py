"""A report on a model: one HTML page that needs nothing else, neither other files nor scripts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from html import escape

from torch import nn

from esper_fx.checks import path_of
from esper_fx.errors import InspectionError, ReportFileError
from esper_fx.files import write_whole
from esper_fx.inspect.collect import summary
from esper_fx.inspect.names import visible
from esper_fx.inspect.network import graph
from esper_fx.inspect.records import ProgramSummary, Summary
from esper_fx.inspect.svg import graph_svg, legend, timeline_svg
from esper_fx.inspect.text import SEED_COLUMNS, head, seed_row
from esper_fx.lifecycle import GrowthEvent
from esper_fx.model import MorphableModel, morphed
from esper_fx.passes.pipeline import PassRecord


def report(model: nn.Module, path: str | os.PathLike[str] | None = None, *, title: str = "esper_fx report") -> str:
    """What is to be said of a model, as an HTML page: its seeds, its graph, what has happened, what its programs run.

    Like :func:`summary` it compiles nothing and changes nothing, and may be called from any thread.

    Args:
        model: A morphed model, or what `torch.compile` has made of one.
        path: A file to write the page to as well, so that whoever reads it meanwhile finds all of it, or what was there.
        title: Title of the page.

    Returns:
        The page.

    Raises:
        InspectionError: The model is not morphed, or ``path`` is no path.
        ReportFileError: The file cannot be written.
    """
    found = morphed(model, "report", InspectionError)
    page = _page(found, title)
    if path is not None:
        write_whole(path_of(path, "the path of a report", InspectionError), page, "the report", ReportFileError)
    return page


def _page(model: MorphableModel, title: str) -> str:
    now = summary(model)
    events = list(model.ledger)
    sections = [
        _section("Summary", *(f"<p>{_text(line)}</p>" for line in head(now))),
        _section(
            "Seeds", f"<p>{legend(now.stages)}</p>", _table(SEED_COLUMNS, map(seed_row, now.seeds)), *_errors(now)
        ),
        _section("Graph", f'<div class="wide">{graph_svg(graph(model))}</div>'),
        _section("Ledger", *_ledger(events, now.clock)),
        _section("Programs", *_programs(now.programs)),
        _section("Engine", _table(("what", "so far"), _engine(now))),
        _section("Passes", _folded("what each pass did", _passes(model.pass_records))),
        _section("Tracing", _folded("every module of the original", _tracing(model))),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{_text(title)}</h1>\n{''.join(sections)}</body></html>\n"
    )


def _errors(now: Summary) -> Iterator[str]:
    for seed in now.seeds:
        if seed.error is not None:
            yield f"<p>{_text(seed.site)} failed: {_text(seed.error)}</p>"


def _ledger(events: Sequence[GrowthEvent], clock: int) -> Iterator[str]:
    if not events:
        yield "<p>Nothing has happened yet.</p>"
        return
    yield f'<div class="wide">{timeline_svg(events, clock)}</div>'
    yield f"<p>{legend(dict.fromkeys(event.to.name for event in events))}</p>"
    yield _table(
        ("step", "site", "from", "to", "blueprint", "why"),
        ((f"{e.step:,}", e.site, e.frm.name, e.to.name, e.blueprint or "-", e.why) for e in events),
    )


def _programs(programs: Sequence[ProgramSummary]) -> Iterator[str]:
    if not programs:
        yield "<p>No compiled program: the model has run eagerly so far.</p>"
    for number, program in enumerate(programs, 1):
        rest = "" if program.complete else "; kernels of other plans are on their way"
        yield f"<h3>Program {number}: plan {_text(program.plan)}{rest}</h3>"
        rows = [
            (str(place), region.kernel, str(region.nodes), ", ".join(region.live), ", ".join(region.dormant))
            for place, region in enumerate(program.regions)
        ]
        yield _table(("region", "kernel", "nodes", "live seeds", "dormant seeds"), rows)


def _engine(now: Summary) -> Iterator[tuple[str, str]]:
    counts = asdict(now.engine)
    counts |= {f"cache {name}": value for name, value in (counts.pop("cache") or {}).items()}
    for name, value in counts.items():
        text = ", ".join(value) if isinstance(value, tuple) else f"{value:,.4g}" if isinstance(value, float) else value
        yield name.replace("_", " "), str(text)


def _passes(records: Sequence[PassRecord]) -> str:
    rows = [
        (
            record.name,
            f"{record.seconds * 1e3:.2f} ms",
            str(record.nodes_before),
            str(record.nodes_after),
            str(record.changed),
        )
        for record in records
    ]
    return _table(("pass", "took", "nodes before", "nodes after", "changed"), rows)


def _tracing(model: MorphableModel) -> str:
    rows = ((entry.name or "(the model)", entry.kind, entry.how, entry.why) for entry in model.trace_report())
    return _table(("module", "class", "how", "why"), rows)


def _section(heading: str, *parts: str) -> str:
    return f"<section><h2>{heading}</h2>{''.join(parts)}</section>\n"


def _folded(heading: str, content: str) -> str:
    return f"<details><summary>{heading}</summary>{content}</details>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{_text(cell)}</th>' for cell in header)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _text(text: str) -> str:
    return escape(visible(text))


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --box: #f4f4f4; --line: #888888; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --box: #262626; --line: #8a8a8a; } }
body { font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2em auto;
  max-width: 75em; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; } h3 { font-size: 1em; } p { margin: .3em 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font: 12px/1.4 ui-monospace, monospace; }
th, td { text-align: left; padding: .15em .8em .15em 0; border-bottom: 1px solid var(--box); white-space: nowrap; }
.stage { color: #111111; padding: .1em .6em; border-radius: .6em; font-size: 12px; }
svg text { font: 11px ui-monospace, monospace; fill: var(--ink); }
svg rect { stroke: var(--line); fill: var(--box); }
svg .seed text { fill: #111111; }
svg .edge { fill: none; stroke: var(--line); }
"""
