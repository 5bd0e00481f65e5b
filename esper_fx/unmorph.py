"""unmorph: take the seeds out of a model again, keep what has grown, and leave no trace of esper_fx."""

from __future__ import annotations

import keyword
import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from esper_fx._torch import unwrapped
from esper_fx.errors import MorphError
from esper_fx.lineage import ATTRIBUTE, SeedSnapshot, describe, snapshot
from esper_fx.model import MorphableModel
from esper_fx.morphing.branch import NAMESPACE
from esper_fx.morphing.original import OWN_FORWARD, Swap, original_kind, take_back
from esper_fx.morphing.replica import replica
from esper_fx.morphing.scopes import Scope, scopes_of
from esper_fx.ops import reads_source
from esper_fx.passes.names import join
from esper_fx.unmorphing.fold import fold_all
from esper_fx.unmorphing.plain import (
    add_residual_hook,
    become_graph_module,
    make_plain,
    owner_of_hook,
    residual,
    restore_class,
    set_attribute,
)

logger = logging.getLogger(__name__)

HOLDER = "grown"
"""Name of the submodule that holds the kept bodies."""


def unmorph(model: nn.Module, *, fold: bool = False) -> nn.Module:
    """Return a plain model that computes what a morphed one computes now, and that needs no esper_fx to run or load.

    Seeds with a live body (INCUBATING, BLENDING, ACTIVE, FOSSILIZED) are kept: ``x + alpha * body(x)`` with alpha as it
    is now, a constant. Their gates go, so gradient flows through a body that is still incubated. All other seeds
    vanish, and so do those whose alpha is 0. A module in which nothing is kept is of its own class again; one with kept
    seeds becomes a `torch.fx.GraphModule` with the same parts, attributes and qualified names, and the bodies in a
    submodule ``grown``; of its class's methods only the forward remains, and torch.fx saves none of its hooks.

    The result shares parameters and buffers with ``model``, except those that folding makes anew, and ``model`` stays as
    it is. Its attribute ``lineage`` says what grew where, when and why, and what became of it: see `write_lineage`.

    Args:
        model: A morphed model, compiled or not. A body of a class of yours must be importable where the result is loaded.
        fold: Merge bodies into the weights before them where both are linear: ``low_rank`` without activation (LoRA too),
            ``affine``, and ``sequence`` of these, right after a Linear or a convolution that is called once and shares
            no weight. What cannot be folded is kept as a module, and the lineage says why. A weight that plain Python
            code reads besides, in a model that could not be traced, goes unseen.

    Raises:
        MorphError: The model is not morphed, a kept body cannot do without esper_fx, or a kept site of a loaded model is
            not known well enough before its first call. Nothing has changed then.
    """
    source = unwrapped(model)
    if not isinstance(source, MorphableModel):
        raise MorphError(f"unmorph() needs a model that esper_fx.morph has made, not a {type(source).__name__}")
    seeds = snapshot(source.growth)
    kept = {seed.site: seed for seed in seeds if seed.kept}
    memo: dict[int, Any] = {id(source.get_submodule(NAMESPACE)): nn.Module()}
    memo |= {id(value): None for value in (source.growth, source.graphs, source.pass_records)}
    root = replica(source, memo)
    take_back(root, source._additions)
    scopes = scopes_of(root, source.graphs, set(kept))
    outcomes, reasons = fold_all(root, scopes, kept) if fold else ({}, {})
    for scope in scopes:
        outcomes |= _REBUILD[scope.original.how](scope, {site: kept[site] for site in scope.sites}, memo)
    for site in kept:
        outcomes.setdefault(site, "dropped: the model never calls it")
        logger.info("%s: %s %s", site, outcomes[site], reasons.get(site, ""))
    set_attribute(root, ATTRIBUTE, describe(source, seeds, source.clock, outcomes, reasons))
    return root


unwrap = unmorph


# One function for each reason why morph changes a module's class. Each gives the module a plain class, adds the bodies
# that are kept in it, and returns what became of them.


def _rebuild_traced(scope: Scope, kept: Mapping[str, SeedSnapshot], memo: dict[int, Any]) -> dict[str, str]:
    """A traced module: of its own class again, or a GraphModule where seeds are kept."""
    module, kind = scope.module, original_kind(scope.module)
    vars(module).pop(NAMESPACE, None)
    if not kept:
        restore_class(module, kind)
        return {}
    assert scope.graph is not None
    holder, bodies = _free_name(HOLDER, module), nn.Module().train(module.training)
    names = {site: _add_body(bodies, site, scope.path, seed, memo) for site, seed in kept.items()}
    for site, nodes in scope.seeds.items():
        for node in nodes:
            leaf = node.args[0]
            assert isinstance(leaf, fx.Node)
            if leaf.op == "call_module":
                _check_seen(kept[site], module.get_submodule(str(leaf.target)))
            _resolve(node, f"{holder}.{names[site]}", kept[site])
    for node in [n for n in scope.graph.nodes if n.op == "get_attr" and str(n.target).startswith(f"{NAMESPACE}.")]:
        scope.graph.erase_node(node)
    module.add_module(holder, bodies)
    become_graph_module(module, scope.graph, kind.__name__)
    return {site: f"module {join(scope.path, holder, name)}" for site, name in names.items()}


def _rebuild_python(scope: Scope, kept: Mapping[str, SeedSnapshot], memo: dict[int, Any]) -> dict[str, str]:
    """A module that stays plain Python: of its own class again, with a hook that adds what a kept body returns."""
    module = scope.module
    vars(module).pop(NAMESPACE, None)
    restore_class(module, original_kind(module))
    if OWN_FORWARD in vars(module):
        vars(module)["forward"] = vars(module).pop(OWN_FORWARD)
    if not kept:
        return {}
    ((site, seed),) = kept.items()
    inner, owner = owner_of_hook(module)
    holder, bodies = _free_name(HOLDER, owner), nn.Module()
    name = _add_body(bodies, site, scope.path, seed, memo)
    body = bodies.get_submodule(name)
    _check_seen(seed, module)
    add_residual_hook(module, owner, holder, name, body, seed.alpha, seed.container, reads_source(seed.body))
    return {site: f"module {join(scope.path, inner, holder, name)}"}


_Rebuild = Callable[[Scope, Mapping[str, SeedSnapshot], dict[int, Any]], dict[str, str]]
_REBUILD: Mapping[Swap, _Rebuild] = {Swap.TRACED: _rebuild_traced, Swap.PYTHON: _rebuild_python}


def _check_seen(seed: SeedSnapshot, module: nn.Module) -> None:
    """Raise MorphError where nobody knows whether a module returns a tensor or a tuple."""
    own = not type(module).__module__.startswith("torch.nn.modules.")
    if not seed.seen and (own or isinstance(module, nn.RNNBase | nn.MultiheadAttention)):
        raise MorphError(
            f"nothing has flowed through site {seed.site!r} since its body was loaded, and whether the module there returns "
            "a tensor or a tuple decides what the plain model must do: call the model once before unmorph()"
        )


def _resolve(node: fx.Node, target: str, seed: SeedSnapshot) -> None:
    """Replace a seed's node by ``x + alpha * body(x)``."""
    value = node.args[0]
    source = node.args[3] if reads_source(seed.body) else None
    assert isinstance(value, fx.Node)
    assert source is None or isinstance(source, fx.Node)
    with node.graph.inserting_before(node):
        made = residual(node.graph, value, target, seed.alpha, seed.container, source)
    for new in made:
        new.meta.update({key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta})
    node.replace_all_uses_with(made[-1])
    node.graph.erase_node(node)


def _add_body(bodies: nn.Module, site: str, scope: str, seed: SeedSnapshot, memo: dict[int, Any]) -> str:
    """Put a plain copy of a seed's body under a readable name; returns the name."""
    assert seed.body is not None
    body = replica(seed.body, memo)
    make_plain(body, site)
    local = site.removeprefix(scope).removeprefix(".").replace(".", "_") or "output"
    readable = local.isidentifier() and not keyword.iskeyword(local)
    name = _free_name(local if readable else f"site_{local}", bodies)
    bodies.add_module(name, body)
    return name


def _free_name(name: str, module: nn.Module) -> str:
    number, free = 2, name
    while hasattr(module, free):
        number, free = number + 1, f"{name}_{number}"
    return free
