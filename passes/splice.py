"""Splice seed modules into a traced graph, each right after its site's value."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial

from torch import fx

from esper_fx.passes.pipeline import Draft


def splice(draft: Draft, *, target: Callable[[str], str], alpha: str, gate: str) -> bool:
    """Insert ``seed(value, alpha, gate)`` after every visit of every site; users of the value then read the seed.

    Where the site has a source, the seed is given that too: ``seed(value, alpha, gate, source)``.

    Idempotent: a value that its seed already follows is left alone. Where two sites share one node (a block and its last
    layer), the inner module's seed comes first.

    Args:
        draft: A draft whose sites are found.
        target: Gives the qualified name of a site's seed module.
        alpha: Qualified name of the state array ``alpha``, read as a graph constant.
        gate: Qualified name of the state array ``gate``.
    """
    graph = draft.graph
    assert graph is not None
    changed = False
    arrays: dict[str, fx.Node] = {n.target: n for n in graph.nodes if n.op == "get_attr" and n.target in (alpha, gate)}
    if draft.sites and not arrays:
        first = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(first):
            arrays = {name: graph.get_attr(name) for name in (alpha, gate)}
    for site in sorted(draft.sites, key=lambda name: (-name.count("."), name)):
        seed_name = target(site)
        draft.seeds[site] = seed_name
        sources = draft.sources.get(site, [None] * len(draft.sites[site]))
        for value, source in dict(zip(draft.sites[site], sources, strict=True)).items():
            anchor = _last_seed(value)
            if any(n.op == "call_module" and n.target == seed_name for n in _chain(value)):
                continue
            # The arrays are read after the last placeholder; a seed on a placeholder comes after them.
            with graph.inserting_after(arrays[gate] if anchor.op == "placeholder" else anchor):
                more = () if source is None else (_last_seed(source),)
                seed = graph.call_module(seed_name, (anchor, arrays[alpha], arrays[gate], *more))
            anchor.replace_all_uses_with(seed, delete_user_cb=partial(operator.is_not, seed))
            seed.meta.update({key: value.meta[key] for key in ("stack_trace", "nn_module_stack") if key in value.meta})
            seed.meta["esper_seed"] = site
            changed = True
    return changed


def _chain(value: fx.Node) -> list[fx.Node]:
    """The seeds that follow a value one after another."""
    chain: list[fx.Node] = []
    node = value
    while True:
        seeds = [user for user in node.users if "esper_seed" in user.meta and user.args[0] is node]
        if not seeds:
            return chain
        node = seeds[0]
        chain.append(node)


def _last_seed(value: fx.Node) -> fx.Node:
    return (_chain(value) or [value])[-1]
