"""Find the sources of sites: what the module whose output a site is has read, where a body may read that instead."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from esper_fx.passes.names import within
from esper_fx.passes.pipeline import Draft
from esper_fx.site import is_linear_kind


def find_sources(draft: Draft, *, modules: Mapping[str, nn.Module], scope: str = "") -> bool:
    """Fill ``draft.sources`` for the sites that are outputs of linear maps and convolutions.

    A site has a source only if every visit has one, so that a body reads the same kind of value everywhere.

    Args:
        draft: A draft whose sites are found.
        modules: The model's modules by qualified name.
        scope: Qualified name of the draft's root within the model; site names begin with it.
    """
    found: dict[str, list[fx.Node]] = {}
    for site, visits in draft.sites.items():
        local = within(site, scope)
        # A node that a predicate has chosen may be called like a module whose output it is not.
        if is_linear_kind(modules.get(site)) and draft.outputs.get(local) == visits:
            sources = [node for node in draft.inputs.get(local, ()) if node is not None]
            if len(sources) == len(visits):
                found[site] = sources
    changed = found != draft.sources
    draft.sources = found
    return changed
