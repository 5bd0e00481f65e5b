"""Divide a model into scopes, and draft the spliced graph of each."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import nn

from esper_fx.morphing.branch import NAMESPACE, mangled
from esper_fx.passes.check import check
from esper_fx.passes.find_sites import Sites, chosen, find_sites
from esper_fx.passes.find_sources import find_sources
from esper_fx.passes.names import above, join
from esper_fx.passes.pipeline import Draft, PassRecord, Pipeline
from esper_fx.passes.reach import is_reached_into
from esper_fx.passes.splice import splice
from esper_fx.passes.trace import TraceError, has_forward, trace

logger = logging.getLogger(__name__)

_ALPHA = f"{NAMESPACE}.state.alpha"
_GATE = f"{NAMESPACE}.state.gate"


class Scoping:
    """Divides a model into scopes: the largest modules that can be traced, and single modules that stay Python.

    Attributes:
        drafts: The scopes by path. One that stays Python has no graph, and its own path as its only site.
        records: What the passes did.
        modules: All modules, by qualified name.
        reasons: Why a module could not be traced, by path.
    """

    def __init__(self, root: nn.Module, sites: Sites, opened: Collection[str] = ()) -> None:
        self.drafts: dict[str, Draft] = {}
        self.records: list[PassRecord] = []
        self.reasons: dict[str, str] = {}
        self._sites = sites
        self._opened = opened
        self.modules = dict(root.named_modules())
        self._names = {id(module): name for name, module in self.modules.items()}
        self._chosen = chosen(sites, self.modules)
        self._above_chosen = {outer for name in self._chosen for outer in above(name)}
        self._seen: set[int] = set()
        self._divide(root, "", ())

    def _divide(self, module: nn.Module, path: str, callers: tuple[type[nn.Module], ...]) -> None:
        if id(module) in self._seen or self._names.get(id(module)) != path:
            return  # it is called by another name as well, and was looked at under that
        self._seen.add(id(module))
        draft = Draft(module)
        try:
            outside = path in self._opened or is_reached_into(module, path.rpartition(".")[2], callers)
            if outside and has_forward(module):
                raise TraceError(f"parts of {type(module).__name__} are called by code outside of it")
            self.records += morph_pipeline(self._sites, self.modules, path).run(draft)
        except TraceError as error:
            logger.info("%s stays plain Python: %s", path or "the model's own forward", error)
            self.reasons[path] = str(error)
            if path in self._chosen and has_forward(module):
                self.drafts[path] = Draft(module, sites={path: []})
            self._divide_children(module, path, callers)
        else:
            self.drafts[path] = draft
            assert draft.graph is not None
            seeds = set(draft.seeds.values())
            for node in draft.graph.nodes:
                if node.op == "call_module" and node.target not in seeds:
                    self._open(join(path, str(node.target)))

    def _divide_children(self, module: nn.Module, path: str, callers: tuple[type[nn.Module], ...]) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            return  # what is in it has no Python to call a seed
        for name, child in module.named_children():
            self._divide(child, join(path, name), (*callers, type(module)))

    def _open(self, leaf: str) -> None:
        """Look into a module that a graph calls as a whole, if a site was asked for in there."""
        if leaf in self._above_chosen:
            outer = (self.modules[name] for name in above(leaf))
            self._divide_children(self.modules[leaf], leaf, tuple(type(module) for module in outer))


def morph_pipeline(sites: Sites, modules: Mapping[str, nn.Module], scope: str = "") -> Pipeline:
    """The passes that make a morphed graph, in order; ``check`` runs after each."""
    return Pipeline(
        [
            ("trace", trace),
            ("find_sites", partial(find_sites, sites=sites, modules=modules, scope=scope)),
            ("find_sources", partial(find_sources, modules=modules, scope=scope)),
            ("splice", partial(splice, target=_seed_target, alpha=_ALPHA, gate=_GATE)),
        ],
        check,
    )


def _seed_target(site: str) -> str:
    return f"{NAMESPACE}.seeds.{mangled(site)}"
