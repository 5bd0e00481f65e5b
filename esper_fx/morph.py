"""morph: trace a model, splice dormant seeds into its graph, and hand back a model that can grow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from itertools import chain
from typing import Any

import torch
from torch import nn

from esper_fx._garbage import collecting_later
from esper_fx._torch import in_transform
from esper_fx.checkpoint.loading import watch_loading
from esper_fx.checks import shown, whole
from esper_fx.errors import MorphError, SiteError
from esper_fx.feature_dim import FeatureDim, feature_dims
from esper_fx.growth import Growth
from esper_fx.lineage import ATTRIBUTE, is_lineage
from esper_fx.model import MorphableModel, taken_names
from esper_fx.morphing.adoption import adopt, adopt_python, plain_base
from esper_fx.morphing.branch import NAMESPACE, Branch
from esper_fx.morphing.containers import goes_through_parts, items_of, on_parts
from esper_fx.morphing.drafting import Scoping
from esper_fx.morphing.original import Original, Swap, additions, footprint, original_of
from esper_fx.morphing.rehearsal import Inputs, check_inputs, rehearse
from esper_fx.morphing.replica import replica
from esper_fx.passes.auto_sites import MAX_SITES, auto_sites
from esper_fx.passes.find_sites import Sites, checked, no_match_message, unmatched
from esper_fx.passes.flow import observe, of_graph
from esper_fx.passes.names import above, join
from esper_fx.passes.pipeline import Draft
from esper_fx.passes.trace import TraceError, trace
from esper_fx.passes.trace_report import trace_report
from esper_fx.seed import KasminaSeed
from esper_fx.state import KasminaStateLayout

logger = logging.getLogger(__name__)


def morph(
    net: nn.Module,
    sites: Sites,
    *,
    example_inputs: Inputs | None = None,
    max_sites: int = MAX_SITES,
    feature_dim: FeatureDim = None,
    seed: int = 0,
) -> MorphableModel:
    """Return a model that computes what ``net`` computes and can grow at ``sites``.

    The result shares the parameters and buffers of ``net``, under the same names, and leaves ``net`` itself as it is.

    Args:
        net: The model. A part that cannot be traced symbolically stays plain Python and its children are traced.
        sites: A glob over qualified module names (``*`` within one level, ``**`` across levels), a compiled regular
            expression that matches a whole name, a module type, a list of these, or a predicate over graph nodes.
            ``"auto"`` finds block outputs and residual streams by the flow of data (see ``passes/auto_sites.py``). Of a
            module that returns a tuple, the first item is the value.
        example_inputs: Arguments of ``net`` (a tuple, or a dict of keyword arguments), from which shapes are learnt; no
            computation is done, unless what the model does depends on values. Without them a site is known after the first
            call.
        max_sites: The most sites that ``"auto"`` chooses.
        feature_dim: Which dimension of a site's value holds features, negative counted from the end: one for all sites, or
            a mapping from names or globs of sites. Without it that is guessed: 1 after convolutions and what goes with
            them and for values with over 3 dimensions, else the last one; the last one after linear layers, LayerNorm,
            embeddings and attention.
        seed: Where the initial values of grown modules come from, together with site and number of germination.

    Raises:
        MorphError: ``net`` is morphed already, nothing in it can be traced, it has parameters without a shape yet, or
            ``example_inputs`` do not fit it, or ``seed`` is no whole number.
        SiteError: No site was found, a site's value is not one floating tensor, or ``sites``, ``max_sites`` or
            ``feature_dim`` does not do.
    """
    if not isinstance(net, nn.Module):
        raise MorphError(f"morph() needs an nn.Module, not a {type(net).__name__}")
    sites = checked(sites)
    if (most := whole(max_sites)) is None or most < 1:
        raise SiteError(f"max_sites={shown(max_sites)}: expected a whole number from 1")
    if (number := whole(seed)) is None:
        raise MorphError(
            f"seed={shown(seed)}: expected a whole number, which the initial values of grown modules come from"
        )
    if example_inputs is not None:
        check_inputs(example_inputs)
    modules = list(net.modules())
    if isinstance(net, MorphableModel) or any(isinstance(module, KasminaSeed) for module in modules):
        raise MorphError(f"{type(net).__name__} is morphed already; morph the original instead")
    taken = [NAMESPACE] * hasattr(net, NAMESPACE) + taken_names(net)
    if hasattr(net, ATTRIBUTE) and not is_lineage(getattr(net, ATTRIBUTE)):
        taken.append(ATTRIBUTE)
    if taken:
        raise MorphError(f"{type(net).__name__} has attributes of its own called {', '.join(taken)}; rename them first")
    tensors = chain.from_iterable(module._parameters.values() for module in modules)
    if any(isinstance(tensor, nn.parameter.UninitializedParameter) for tensor in tensors):
        lazy = [name for name, tensor in net.named_parameters() if nn.parameter.is_lazy(tensor)]
        raise MorphError(
            f"{type(net).__name__} has parameters without a shape yet ({', '.join(lazy[:3])}): call the model once before "
            "morph()"
        )
    with collecting_later():
        root = replica(net)
    if isinstance(sites, str) and sites == "auto":
        sites = _auto(root, example_inputs, most)
    with collecting_later():
        model = _assemble(root, sites, feature_dim, number)
    for pattern in unmatched(sites, model.seeds):
        logger.warning("%s", no_match_message(pattern, model.seeds))
    if example_inputs is None:
        return model
    _learn_values(model, example_inputs)
    missed = [site for site, item in model.seeds.items() if not item.seen]
    if called := _called(net, example_inputs, missed):
        # Code around a traced module calls parts of it past its graph: that module must not be traced as one.
        with collecting_later():
            model = _assemble(
                replica(net), sites, feature_dim, number, opened={o for site in called for o in above(site)}
            )
        _learn_values(model, example_inputs)
    return model


wrap = morph


def _assemble(
    root: nn.Module, sites: Sites, feature_dim: FeatureDim, seed: int, opened: Collection[str] = ()
) -> MorphableModel:
    """Make a replica a model that can grow.

    Args:
        root: The replica; the other arguments are those of `morph`.
        opened: Modules whose forwards must stay Python.
    """
    scoping = Scoping(root, sites, opened)
    drafts = scoping.drafts
    if not drafts:
        raise MorphError(f"no part of {type(root).__name__} can be traced: {_why_not(root)}")
    before = footprint(root)
    names = [site for draft in drafts.values() for site in draft.sites]
    if not names:
        raise SiteError(
            no_match_message(sites, filter(None, (join(s, n) for s, d in drafts.items() for n in d.outputs)))
        )
    dims = feature_dims(feature_dim, names)
    report = trace_report(scoping.modules, drafts, scoping.reasons)
    growth = Growth(KasminaStateLayout(len(names), names=names), seed)
    modules = scoping.modules
    growth.by_index = [KasminaSeed(name, i, growth, modules.get(name), dims.get(name)) for i, name in enumerate(names)]
    growth.seeds = {item.name: item for item in growth.by_index}
    growth.state.to(_device(root))
    branch = Branch(growth).train(root.training)
    for item in growth.by_index:
        item.train(modules.get(item.name, root).training)
    graphs = {
        scope: adopt(scope, draft, branch)
        for scope, draft in drafts.items()
        if draft.graph and (draft.sites or not scope)
    }
    for scope, draft in drafts.items():
        if draft.graph is None:
            adopt_python(draft.root, scope, branch)
    model = _as_morphable(root)
    model.__dict__.pop(NAMESPACE, None)
    # add_module would take it for there already where a wrapper looks names up in what it wraps.
    model._modules[NAMESPACE] = branch
    model.growth = growth
    model.pass_records = scoping.records
    model.graphs = graphs
    model._trace_report = report
    model.register_forward_pre_hook(_before_eager_forward)
    model.register_forward_hook(_after_eager_forward)
    watch_loading(model, branch)
    model._additions = {}
    model._additions = additions(model, before)
    return model


def _device(net: nn.Module) -> torch.device:
    """Where a network is: where its first tensor with data is, if one has data."""
    first: torch.device | None = None
    for tensor in chain(net.parameters(), net.buffers()):
        if not tensor.is_meta:
            return tensor.device
        first = first or tensor.device
    return first or torch.device("cpu")


def _before_eager_forward(model: nn.Module, args: Any) -> None:
    # A transform of torch.func is a calculation about the model, not a step of it, and may not write to its state.
    if not torch.compiler.is_compiling() and not in_transform():
        model.growth.changes.begin_eager_forward()  # type: ignore[union-attr,operator]


def _after_eager_forward(model: nn.Module, args: Any, outputs: Any) -> None:
    if not torch.compiler.is_compiling() and model.growth.replicas is not None and not in_transform():  # type: ignore[union-attr]
        model.growth.replicas.averaging.end_forward(outputs)  # type: ignore[union-attr,operator]


def _why_not(module: nn.Module) -> str:
    try:
        trace(Draft(module))
    except TraceError as error:
        return str(error)
    return "it has no operations"


def _as_morphable(root: nn.Module) -> MorphableModel:
    base, original = plain_base(root), original_of(root)
    name = type(root).__name__.removeprefix("Traced")
    members, forward = {}, type(root).forward
    if original is None:
        members = Original(type(root), "", Swap.PYTHON).members()
        forward = on_parts(forward) if goes_through_parts(root) else forward
    bases = (MorphableModel, *items_of(base), *(() if base is nn.Module else (base,)))
    root.__class__ = type(f"Morphable{name}", bases, {**members, "forward": forward})
    assert isinstance(root, MorphableModel)
    return root


def _learn_values(model: MorphableModel, example_inputs: Inputs) -> None:
    """Call a copy of the model, so that every seed learns what flows through its site."""

    def watch(copied: nn.Module, call: Callable[[], Any]) -> MorphableModel:
        assert isinstance(copied, MorphableModel)
        # No step of training: and the state arrays cannot be read while their copies have no data.
        for key in [key for key, hook in copied._forward_pre_hooks.items() if hook is _before_eager_forward]:
            del copied._forward_pre_hooks[key]
        call()
        return copied

    copied = rehearse(model, example_inputs, watch, type(model).__name__.removeprefix("Morphable"))
    for mine, theirs in zip(model.growth.by_index, copied.growth.by_index, strict=True):
        mine._spec, mine.container, mine.seen = theirs._spec, theirs.container, theirs.seen


def _called(net: nn.Module, example_inputs: Inputs, names: Collection[str]) -> set[str]:
    """Which of these modules a call of the model calls."""
    if not names:
        return set()

    def watch(copied: nn.Module, call: Callable[[], Any]) -> set[str]:
        found: set[str] = set()
        modules = {name: module for name, module in copied.named_modules() if name in names}
        handles = [module.register_forward_hook(lambda *_, n=name: found.add(n)) for name, module in modules.items()]
        call()
        for handle in handles:
            handle.remove()
        return found

    return rehearse(net, example_inputs, watch, type(net).__name__)


def _auto(root: nn.Module, example_inputs: Inputs | None, max_sites: int) -> list[str]:
    """The names that ``sites="auto"`` stands for."""
    name = type(root).__name__
    modules = dict(root.named_modules())
    if example_inputs is not None:
        flow = rehearse(root, example_inputs, observe, name)
    else:
        draft = Draft(root)
        try:
            trace(draft)
        except TraceError as error:
            raise SiteError(f"sites='auto' needs example_inputs here, because {error}") from error
        flow = of_graph(draft)
    names = auto_sites(flow, modules, max_sites)
    if not names:
        raise SiteError(
            f"sites='auto' found no place in {name} with layers before it and after it that every path to the output passes. "
            f"Name sites instead, such as sites={next((n for n, m in modules.items() if n), '**')!r}"
        )
    return names
