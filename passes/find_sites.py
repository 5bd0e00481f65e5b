"""Find the values in a traced graph where seeds may sit."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from torch import fx, nn

from esper_fx.checks import shown
from esper_fx.errors import SiteError
from esper_fx.passes.names import join
from esper_fx.passes.pipeline import Draft

Selector = str | re.Pattern[str] | type[nn.Module]
Sites = Selector | Callable[[fx.Node], bool] | Iterable[Selector]


def glob_matches(pattern: str, name: str) -> bool:
    """Match a dotted name: ``*`` and ``?`` stay within one level, ``**`` crosses levels."""
    return _expression(pattern).fullmatch(name) is not None


@lru_cache
def _expression(glob: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*|\?)", glob)
    wildcard = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return re.compile("".join(wildcard.get(part, re.escape(part)) for part in parts))


def checked(sites: Any) -> Sites:
    """What a caller gives as sites; several as a list.

    Raises:
        SiteError: It is nothing that selects, or one of several is not.
    """
    if callable(sites) and not isinstance(sites, type | nn.Module):
        return sites
    if not isinstance(sites, tuple) and _is_selector(sites):
        return sites if isinstance(sites, str | type | re.Pattern) else [sites]
    given = f"sites={shown(sites)}"
    if isinstance(sites, Iterable) and not isinstance(sites, bytes | nn.Module):
        several = list(sites)
        wrong = [item for item in several if not _is_selector(item)]
        if not wrong:
            return several
        given = f"{shown(wrong[0])} in sites={shown(several)}"
    raise SiteError(
        f"{given} is nothing that selects: expected a name or a glob such as 'layers.*', a compiled regular expression, a "
        "module type, a list of these, or a predicate over graph nodes; sites='auto' finds some by itself"
    )


def _is_selector(value: Any) -> bool:
    if isinstance(value, re.Pattern):
        return isinstance(value.pattern, str)
    try:
        return isinstance(value, str) or isinstance(None, value) is not None
    except TypeError:  # neither a type nor a union of types
        return False


def find_sites(draft: Draft, *, sites: Sites, modules: Mapping[str, nn.Module], scope: str = "") -> bool:
    """Fill ``draft.sites`` with the nodes that ``sites`` selects.

    A module that is called several times is one site with several visits: its seed follows every one of them.

    Args:
        draft: A traced draft.
        sites: A glob over qualified module names, a regular expression that matches a whole name, a module type,
            several of these, or a predicate over graph nodes.
        modules: The model's modules by qualified name.
        scope: Qualified name of the draft's root within the model; site names begin with it.

    Raises:
        SiteError: A selected module returns neither one tensor nor a tuple that begins with one.
    """
    assert draft.graph is not None
    found: dict[str, list[fx.Node]] = {}
    if callable(sites) and not isinstance(sites, type):
        named: dict[str, fx.Node] = {}
        for node in draft.graph.nodes:
            if node.op in ("placeholder", "output", "get_attr") or "esper_seed" in node.meta:
                continue  # a seed that was spliced in before is no site
            if sites(node):
                named[_node_site_name(node, draft, named)] = node
        found = {join(scope, name): [node] for name, node in named.items()}
    else:
        patterns = _patterns(sites)
        for local, visits in draft.outputs.items():
            name = join(scope, local)
            if name and selects(patterns, name, modules.get(name)):
                found[name] = [_visit_node(name, value) for value in visits]
    changed = found != draft.sites
    draft.sites = found
    return changed


def chosen(sites: Sites, modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """The names of the modules that ``sites`` selects; none where it is a predicate over graph nodes."""
    if callable(sites) and not isinstance(sites, type):
        return frozenset()
    patterns = _patterns(sites)
    return frozenset(name for name, module in modules.items() if name and selects(patterns, name, module))


def _patterns(sites: Any) -> list[Selector]:
    return [sites] if isinstance(sites, str | type | re.Pattern) else list(sites)


def selects(patterns: Iterable[Selector], name: str, module: nn.Module | None) -> bool:
    """Whether any of the globs, regular expressions or module types selects the module called ``name``."""
    return any(_selects(pattern, name, module) for pattern in patterns)


def _selects(pattern: Selector, name: str, module: nn.Module | None) -> bool:
    if isinstance(pattern, str):
        return glob_matches(pattern, name)
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    return isinstance(module, pattern)


def unmatched(sites: Sites, found: Iterable[str]) -> list[str | re.Pattern[str]]:
    """Those of several globs and regular expressions that have selected none of the sites that were found."""
    names = list(found)
    several = [] if callable(sites) or isinstance(sites, str | re.Pattern) else sites
    patterns = [pattern for pattern in several if isinstance(pattern, str | re.Pattern)]
    return [pattern for pattern in patterns if not any(_selects(pattern, name, None) for name in names)]


def no_match_message(sites: Any, names: Iterable[str]) -> str:
    """Say that nothing was selected, with the names that come nearest."""
    candidates = sorted(set(names))
    wanted = sites.pattern if isinstance(sites, re.Pattern) else str(sites)
    nearest = difflib.get_close_matches(wanted, candidates, n=5, cutoff=0.0)
    return (
        f"sites={shown(sites)} selects no module of this model. Nearest names: {', '.join(nearest) or 'none'}. "
        "'*' stays within one level of the dotted name, '**' crosses levels."
    )


def _visit_node(name: str, value: Any) -> fx.Node:
    first = value[0] if isinstance(value, tuple | list) and value else value
    if isinstance(first, fx.Node):
        return first
    kind = type(value).__name__.removeprefix("immutable_")
    raise SiteError(
        f"site {name!r} returns a {kind}, but a seed needs one floating tensor, or a tuple that begins with one. "
        "Choose a submodule that returns a tensor."
    )


def _node_site_name(node: fx.Node, draft: Draft, taken: Iterable[str]) -> str:
    """A leaf module's only call is named after the module; any other node has a name of its own."""
    only_call = node.op == "call_module" and len(draft.outputs.get(str(node.target), ())) == 1
    name = str(node.target) if only_call else node.name
    while name in taken:
        name += "_"
    return name
