"""Drawings as SVG to put into a page: a model's graph, and what happened to its seeds over time.

Colours of text, lines and boxes are the page's (``--ink``, ``--line``, ``--box``); those of the stages are the drawing's,
as styles and not attributes, which the page's would overrule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from esper_fx.inspect.appearance import STAGE_COLOURS, label
from esper_fx.inspect.layout import lay_out
from esper_fx.inspect.names import shortened, visible, width
from esper_fx.lifecycle import GrowthEvent, Stage

if TYPE_CHECKING:
    import networkx as nx

_CHARACTER, _LINE, _MARGIN = 6.7, 13.0, 10.0
_LAYER = 76.0
_TIMELINE, _ROW, _NAMES = 640.0, 20.0, 24


def graph_svg(graph: nx.MultiDiGraph) -> str:
    """A drawing of a graph that :func:`esper_fx.inspect.graph` has made with modules for detail."""
    texts = {node: label(attributes) for node, attributes in graph.nodes(data=True)}
    widths = {node: max(map(width, lines)) * _CHARACTER + 2 * _MARGIN for node, lines in texts.items()}
    drawing = lay_out(graph, widths, _LAYER)
    heights = {node: len(lines) * _LINE + _MARGIN for node, lines in texts.items()}
    shapes = [
        _edge(route, heights[source] / 2, heights[target] / 2) for (source, target), route in drawing.routes.items()
    ]
    for node, attributes in graph.nodes(data=True):
        shapes.append(_box(node, attributes, texts[node], drawing.places[node], (widths[node], heights[node])))
    arrow = '<marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    arrow += '<path d="M0 0 8 4 0 8z" fill="var(--line)"/></marker>'
    return _svg(drawing.width, drawing.height, [f"<defs>{arrow}</defs>", *shapes], "how values flow through the model")


def timeline_svg(events: Iterable[GrowthEvent], clock: int) -> str:
    """Every site that something has happened to as a bar, coloured by the stages it was in; "" where nothing has."""
    lives: dict[str, list[GrowthEvent]] = {}
    for event in events:
        lives.setdefault(event.site, []).append(event)
    if not lives:
        return ""
    left = _NAMES * _CHARACTER
    scale = _TIMELINE / max(clock, *(event.step for life in lives.values() for event in life), 1)
    shapes = []
    for row, (site, life) in enumerate(lives.items()):
        y = row * _ROW
        shapes.append(_text(left - 8, y + 14, shortened(visible(site), _NAMES - 2), "end"))
        for event, end in zip(life, [*(later.step for later in life[1:]), clock], strict=True):
            if event.to != Stage.DORMANT:
                size = max((end - event.step) * scale, 1.5)
                note = f"{event.to.name} from step {event.step:,} to {end:,}"
                shapes.append(
                    f'<rect x="{left + event.step * scale:.1f}" y="{y + 3:.1f}" width="{size:.1f}" height="{_ROW - 6:.1f}" '
                    f'style="fill:{STAGE_COLOURS[event.to.name]}"><title>{escape(note)}</title></rect>'
                )
    bottom = len(lives) * _ROW
    shapes.append(f'<path class="edge" d="M{left:.1f} {bottom:.1f}h{_TIMELINE:.1f}"/>')
    shapes += [_text(left, bottom + 16, "0", "start"), _text(left + _TIMELINE, bottom + 16, f"{clock:,}", "end")]
    return _svg(left + _TIMELINE, bottom + 20, shapes, "stages of the seeds over training steps")


def legend(stages: Iterable[str]) -> str:
    """The colours of these stages, as HTML."""
    return " ".join(
        f'<span class="stage" style="background:{STAGE_COLOURS[stage]}">{escape(stage)}</span>' for stage in stages
    )


def _svg(width: float, height: float, shapes: Iterable[str], description: str) -> str:
    box = f"{-_MARGIN:.0f} {-_MARGIN:.0f} {width + 2 * _MARGIN:.0f} {height + 2 * _MARGIN:.0f}"
    size = f'width="{width + 2 * _MARGIN:.0f}" height="{height + 2 * _MARGIN:.0f}"'
    return f'<svg viewBox="{box}" {size} role="img" aria-label="{escape(description)}">{"".join(shapes)}</svg>'


def _box(
    node: str,
    attributes: Mapping[str, Any],
    lines: Sequence[str],
    place: tuple[float, float],
    size: tuple[float, float],
) -> str:
    (x, y), (width, height) = place, size
    kind = attributes["kind"]
    fill = f' style="fill:{STAGE_COLOURS[attributes["stage"]]}"' if kind == "seed" else ""
    top = y - len(lines) * _LINE / 2 + 10
    text = "".join(_text(x, top + number * _LINE, line, "middle") for number, line in enumerate(lines))
    return (
        f'<g class="{escape(kind)}"><title>{escape(visible(node))}</title><rect x="{x - width / 2:.1f}" '
        f'y="{y - height / 2:.1f}" width="{width:.1f}" height="{height:.1f}" rx="5"{fill}/>{text}</g>'
    )


def _edge(route: Sequence[tuple[float, float]], below: float, above: float) -> str:
    """A curve that leaves and reaches every point upright."""
    (x, y), (last_x, last_y) = route[0], route[-1]
    points = [(x, y + below), *route[1:-1], (last_x, last_y - above)]
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x1, y1), (x2, y2) in zip(points, points[1:], strict=False):
        middle = (y1 + y2) / 2
        path += f"C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {y2:.1f}"
    return f'<path class="edge" d="{path}" marker-end="url(#arrow)"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
