"""morph: trace a model, splice dormant seeds into its graph, and hand back a model that can grow."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from esper_fx._torch import DataDependentOutputException, FakeTensorMode, pytree
from esper_fx.branch import NAMESPACE, Branch, mangled
from esper_fx.checkpoint import watch_loading
from esper_fx.errors import MorphError, SiteError
from esper_fx.growth import Growth, Morphology
from esper_fx.lifecycle import Ledger
from esper_fx.passes.check import check
from esper_fx.passes.find_sites import Sites, find_sites, no_match_message
from esper_fx.passes.pipeline import Draft, PassRecord, Pipeline
from esper_fx.passes.splice import splice
from esper_fx.passes.trace import TraceError, trace
from esper_fx.passes.trace_report import TraceReport, class_names, trace_report
from esper_fx.seed import KasminaSeed
from esper_fx.state import KasminaStateLayout
from esper_fx.stats import EngineStats, engine_stats

logger = logging.getLogger(__name__)

_ALPHA = f"{NAMESPACE}.state.alpha"
_GATE = f"{NAMESPACE}.state.gate"


class MorphableModel(nn.Module):
    """A model whose graph carries seeds. Made by :func:`morph`; never instantiated by hand.

    It is of the original's class as well (except where that is a container), so its methods and attributes are there;
    its forward is the spliced graph. Its own attributes are the ones below.
    """

    growth: Growth
    pass_records: list[PassRecord]
    graphs: dict[str, fx.Graph]
    _trace_report: TraceReport

    @property
    def seeds(self) -> Mapping[str, KasminaSeed]:
        """The seeds by site."""
        return self.growth.seeds

    @property
    def state(self) -> KasminaStateLayout:
        """The state arrays of all seeds."""
        return self.growth.state

    @property
    def morphology(self) -> Morphology:
        """Which seeds have a live body, and which; hashable."""
        return self.growth.morphology

    @property
    def ledger(self) -> Ledger:
        """What has happened to the seeds, in order."""
        return self.growth.ledger

    @property
    def clock(self) -> int:
        """Training steps seen: steps of the attached optimizer, else forward calls."""
        return self.growth.clock

    @property
    def pending(self) -> bool:
        """Whether a change or a better plan is on its way."""
        return self.growth.changes.pending

    @property
    def graph(self) -> fx.Graph:
        """The spliced graph of the forward.

        Raises:
            MorphError: The model's own forward is plain Python, because it cannot be traced; see ``graphs``.
        """
        if "" not in self.graphs:
            raise MorphError(f"the forward of {type(self).__name__} is plain Python; see graphs for its parts")
        return self.graphs[""]

    def trace_report(self) -> TraceReport:
        """For every module of the original: traced, a leaf of a graph, or kept as plain Python, and why."""
        return self._trace_report

    def settle(self, timeout: float | None = None) -> bool:
        """Block until no background work is left and the best plan runs; call it between steps.

        Returns:
            False if ``timeout`` seconds passed first.
        """
        return self.growth.changes.settle(timeout)

    def stats(self) -> EngineStats:
        """What the engine has done for this model."""
        return engine_stats(self.growth)

    def reset_stats(self) -> None:
        """Begin to count anew what :meth:`stats` counts for this model; the caches' own statistics go on."""
        self.growth.changes.reset_stats()


def morph(
    net: nn.Module,
    sites: Sites,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> MorphableModel:
    """Return a model that computes what ``net`` computes and can grow at ``sites``.

    The result shares the parameters and buffers of ``net``, under the same names, and leaves ``net`` itself as it is.

    Args:
        net: The model. A part that cannot be traced symbolically stays plain Python and its children are traced.
        sites: A glob over qualified module names (``*`` within one level, ``**`` across levels), a compiled regular
            expression that matches a whole name, a module type, a list of these, or a predicate over graph nodes.
        example_inputs: Arguments of ``net`` (a tuple, or a dict of keyword arguments), from which shapes are learnt; no
            computation is done. Without them a site is known after the first call.
        seed: Where the initial values of grown modules come from, together with site and number of germination.

    Raises:
        MorphError: ``net`` is morphed already, nothing in it can be traced, or ``example_inputs`` do not fit it.
        SiteError: No site was found, or a site's value is not one floating tensor.
    """
    if not isinstance(net, nn.Module):
        raise MorphError(f"morph() needs an nn.Module, not a {type(net).__name__}")
    if isinstance(net, MorphableModel) or any(isinstance(m, KasminaSeed) for m in net.modules()):
        raise MorphError(f"{type(net).__name__} is morphed already; morph the original instead")
    taken = [name for name in (NAMESPACE, *_RESERVED) if hasattr(net, name)]
    if taken:
        raise MorphError(f"{type(net).__name__} has attributes of its own called {', '.join(taken)}; rename them first")
    root = _replica(net)
    records: list[PassRecord] = []
    reasons: dict[str, str] = {}
    classes = class_names(root)
    drafts = dict(_draft_scopes(root, "", sites, dict(root.named_modules()), records, reasons))
    if not drafts:
        raise MorphError(f"no part of {type(net).__name__} can be traced: {_why_not(root)}")
    names = [site for draft in drafts.values() for site in draft.sites]
    if not names:
        raise SiteError(
            no_match_message(sites, filter(None, (_join(s, n) for s, d in drafts.items() for n in d.outputs)))
        )
    report = trace_report(root, classes, drafts, reasons)
    growth = Growth(KasminaStateLayout(len(names), names=names), seed)
    modules = dict(root.named_modules())
    growth.by_index = [KasminaSeed(name, i, growth, modules.get(name)) for i, name in enumerate(names)]
    growth.seeds = {item.name: item for item in growth.by_index}
    growth.state.to(next((t.device for t in (*net.parameters(), *net.buffers())), torch.device("cpu")))
    branch = Branch(growth)
    graphs = {scope: _adopt(draft, branch) for scope, draft in drafts.items() if draft.sites or not scope}
    model = _as_morphable(root)
    model.__dict__.pop(NAMESPACE, None)
    model.add_module(NAMESPACE, branch)
    model.growth = growth
    model.pass_records = records
    model.graphs = graphs
    model._trace_report = report
    model.register_forward_pre_hook(_before_eager_forward)
    watch_loading(model, branch)
    if example_inputs is not None:
        _learn_values(model, example_inputs)
    return model


wrap = morph

_RESERVED = (
    "growth",
    "seeds",
    "morphology",
    "ledger",
    "clock",
    "pending",
    "settle",
    "stats",
    "reset_stats",
    "graphs",
    "pass_records",
    "trace_report",
)


def _before_eager_forward(model: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        model.growth.changes.begin_eager_forward()  # type: ignore[union-attr,operator]


def _replica(net: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every tensor."""
    memo: dict[int, Any] = {}
    for module in net.modules():
        for value in (*vars(module).values(), *module._parameters.values(), *module._buffers.values()):
            if isinstance(value, Tensor):
                memo[id(value)] = value
    return copy.deepcopy(net, memo)


def _draft_scopes(
    module: nn.Module,
    path: str,
    sites: Sites,
    modules: Mapping[str, nn.Module],
    records: list[PassRecord],
    reasons: dict[str, str],
) -> Iterator[tuple[str, Draft]]:
    """The largest modules that can be traced, by path, traced and spliced; fills ``reasons`` for the others."""
    draft = Draft(module)
    pipeline = morph_pipeline(sites, modules, path)
    try:
        records += pipeline.run(draft)
    except TraceError as error:
        logger.info("%s stays plain Python: %s", path or "the model's own forward", error)
        reasons[path] = str(error)
        for name, child in module.named_children():
            yield from _draft_scopes(child, _join(path, name), sites, modules, records, reasons)
    else:
        yield path, draft


def morph_pipeline(sites: Sites, modules: Mapping[str, nn.Module], scope: str = "") -> Pipeline:
    """The passes that make a morphed graph, in order; ``check`` runs after each."""
    return Pipeline(
        [
            ("trace", trace),
            ("find_sites", partial(find_sites, sites=sites, modules=modules, scope=scope)),
            ("splice", partial(splice, target=_seed_target, alpha=_ALPHA, gate=_GATE)),
        ],
        check,
    )


def _why_not(module: nn.Module) -> str:
    try:
        trace(Draft(module))
    except TraceError as error:
        return str(error)
    return "it has no operations"


def _adopt(draft: Draft, branch: Branch) -> fx.Graph:
    """Give the draft's module the graph as its forward."""
    assert draft.graph is not None
    module = draft.root
    # Reachable by the graph's names, but not a submodule: that it is of the whole model, once.
    module.__dict__[NAMESPACE] = branch
    forward = type(fx.GraphModule(module, draft.graph)).forward
    module.__class__ = type(f"Traced{type(module).__name__}", (_plain_base(module),), {"forward": forward})
    return draft.graph


def _plain_base(module: nn.Module) -> type[nn.Module]:
    """The class to derive from: containers would count the seeds among their items."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return nn.Module if isinstance(module, containers) else type(module)


def _as_morphable(root: nn.Module) -> MorphableModel:
    base = _plain_base(root)
    name = type(root).__name__.removeprefix("Traced")
    bases = (MorphableModel,) if base is nn.Module else (MorphableModel, base)
    root.__class__ = type(f"Morphable{name}", bases, {"forward": type(root).forward})
    assert isinstance(root, MorphableModel)
    return root


def _learn_values(model: MorphableModel, example_inputs: Sequence[Any] | Mapping[str, Any]) -> None:
    """Run the model on fake tensors, so that every seed learns what flows through its site."""
    if isinstance(example_inputs, Tensor):
        raise MorphError("example_inputs must be a tuple of arguments, such as (x,), not one tensor")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    own = [t for name, t in (*model.named_parameters(), *model.named_buffers()) if not name.startswith(f"{NAMESPACE}.")]
    replica = copy.deepcopy(model, {id(tensor): mode.from_tensor(tensor) for tensor in own})
    replica._forward_pre_hooks.clear()
    inputs = pytree.tree_map_only(Tensor, mode.from_tensor, example_inputs)
    try:
        with mode, torch.no_grad():
            replica(**inputs) if isinstance(inputs, Mapping) else replica(*inputs)
    except SiteError:
        raise
    except DataDependentOutputException as error:
        logger.info("sites are learnt at the first call, because the model's control flow depends on values: %s", error)
    except Exception as error:
        raise MorphError(
            f"example_inputs do not fit {type(model).__name__.removeprefix('Morphable')}: {type(error).__name__}: {error}"
        ) from error
    for mine, theirs in zip(model.growth.by_index, replica.growth.by_index, strict=True):
        mine._spec = theirs._spec


def _join(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)


def _seed_target(site: str) -> str:
    return f"{NAMESPACE}.seeds.{mangled(site)}"
