"""Fold grown bodies into the weights of the layers before them, where what they do is linear."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from esper_fx._torch import storage_id
from esper_fx.blueprints.low_rank import LowRank
from esper_fx.lineage import SeedSnapshot
from esper_fx.morphing.branch import NAMESPACE
from esper_fx.morphing.original import original_kind
from esper_fx.morphing.scopes import Scope, is_seed
from esper_fx.ops import reads_source
from esper_fx.passes.names import join
from esper_fx.passes.trace import has_own_call
from esper_fx.unmorphing.feature_map import (
    CONVOLUTIONS,
    TRANSPOSED,
    Layer,
    NotFoldable,
    as_double,
    feature_axis,
    feature_map,
)

HOSTS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
"""Layers that a body can be folded into: exactly these, because a class that derives from one may compute otherwise."""


def fold_all(
    root: nn.Module, scopes: Sequence[Scope], kept: Mapping[str, SeedSnapshot]
) -> tuple[dict[str, str], dict[str, str]]:
    """Fold what can be folded into the layers of a model, and take its seeds out of the graphs.

    Args:
        root: A copy of the morphed model. Layers get new parameters, the old ones stay as they are.
        scopes: Its scopes.
        kept: The seeds that stay, by site.

    Returns:
        What became of the folded seeds, and why the others were not folded, both by site and in words.
    """
    outcomes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    weights = _Weights(root, scopes, [seed.body for seed in kept.values() if seed.body is not None])
    for scope in scopes:
        for site in list(scope.sites):
            seed = kept[site]
            assert seed.body is not None
            try:
                host, path = _host(scope, site)
                weights.check(host)
                with torch.inference_mode(False), torch.no_grad():
                    merge(host, seed.body, seed.alpha)
            except NotFoldable as reason:
                reasons[site] = str(reason)
                continue
            scope.remove(site)
            outcomes[site] = f"folded into {path or 'the model itself'}"
    return outcomes, reasons


def merge(host: Layer, body: nn.Module, alpha: float) -> None:
    """Give a layer weights with which it computes ``y + alpha * body(y)`` where it computed ``y``.

    With ``y = W z + b`` and ``body(y) = M y + c`` these are ``(I + alpha M) W`` and ``(I + alpha M) b + alpha c``,
    computed in float64. A bias is made only where it is not zero. The old parameters stay as they are.

    Args:
        host: The layer.
        body: The body of a seed on what it returns.
        alpha: The factor on it.

    Raises:
        NotFoldable: The body is not a linear map of the layer's output features; nothing has changed then.
    """
    if reads_source(body):
        _merge_beside(host, body, alpha)
        return
    grown, name = feature_map(body), _name(host)
    if grown.axis not in (None, feature_axis(host)):
        raise NotFoldable(
            f"its body runs along dimension {grown.axis} of the value, the features of the {name} along {feature_axis(host)}"
        )
    groups = 1 if isinstance(host, nn.Linear) else host.groups
    transposed = isinstance(host, TRANSPOSED)
    rows = as_double(host.weight).unflatten(0, (groups, -1))
    rows = rows.transpose(1, 2) if transposed else rows  # [groups, features / groups, inputs / groups, *]
    features = groups * rows.shape[1]
    bias = torch.zeros(features, dtype=torch.float64) if host.bias is None else as_double(host.bias)
    try:
        if groups == 1:
            change = grown.apply(rows[0].flatten(1), False)
        else:
            change = torch.bmm(grown.blocks(features, groups), rows.flatten(2))
        new_bias = bias + alpha * grown.apply(bias[:, None], True)[:, 0]
    except RuntimeError as error:
        raise NotFoldable(f"its body does not map the {features} features of the {name}: {error}") from error
    new_rows = rows + alpha * change.reshape(rows.shape)
    new_weight = (new_rows.transpose(1, 2) if transposed else new_rows).flatten(0, 1)
    parameters = {"weight": _like(new_weight, host.weight)}
    if host.bias is not None or bool(new_bias.count_nonzero()):
        parameters["bias"] = _like(new_bias, host.weight if host.bias is None else host.bias)
    for key, parameter in parameters.items():
        setattr(host, key, parameter)


def _merge_beside(host: Layer, body: nn.Module, alpha: float) -> None:
    """Give a layer ``W + alpha · scale · up · down``: the body reads what the layer reads, as LoRA does."""
    if not isinstance(body, LowRank) or type(body) is not LowRank or not isinstance(body.activation, nn.Identity):
        raise NotFoldable("its body reads the layer's input and is not linear")
    if not isinstance(body.dropout, nn.Identity):
        raise NotFoldable("its body has dropout")
    if isinstance(host, TRANSPOSED) or (not isinstance(host, nn.Linear) and host.groups != 1):
        raise NotFoldable(f"the {_name(host)} is transposed or has groups")
    if not isinstance(host, nn.Linear) and not _moves_alike(host, body.down):
        raise NotFoldable(f"its body does not move over the input as the {_name(host)} does")
    if any(has_own_call(part) for part in body.modules()):
        raise NotFoldable("its body has hooks")
    down, up = (as_double(layer.weight) for layer in (body.down, body.up) if isinstance(layer.weight, Tensor))
    change = (up.flatten(1) @ down.flatten(1)).reshape(host.weight.shape)
    host.weight = _like(as_double(host.weight) + alpha * float(body.scale) * change, host.weight)


def _moves_alike(host: nn.Module, down: nn.Module) -> bool:
    """Whether two convolutions look at the same places of their input, so that their weights may be added."""
    return all(getattr(host, name) == getattr(down, name) for name in ("stride", "padding", "dilation", "padding_mode"))


def _like(values: Tensor, parameter: Tensor) -> nn.Parameter:
    """A parameter of another's kind, and memory format where it has its shape, with values of its own."""
    empty = torch.empty_like(parameter) if values.shape == parameter.shape else parameter.new_empty(values.shape)
    data = empty.detach().copy_(values)
    if not bool(data.isfinite().all()):
        raise NotFoldable(f"the weights would not be finite in {parameter.dtype}")
    return nn.Parameter(data, parameter.requires_grad)


def _name(host: nn.Module) -> str:
    return original_kind(host).__name__


# Finding the layer.


def _host(scope: Scope, site: str) -> tuple[Layer, str]:
    """The layer whose output a seed reads, and its qualified name.

    Raises:
        NotFoldable: There is none that only this seed reads, once.
    """
    if scope.graph is None:
        return _layer(scope.module), scope.path
    nodes = scope.seeds[site]
    if len(nodes) != 1:
        raise NotFoldable(f"its site is visited {len(nodes)} times")
    value = nodes[0].args[0]
    assert isinstance(value, fx.Node)
    if is_seed(value):
        raise NotFoldable(f"the module grown at {value.meta['esper_seed']} stands between it and the layer")
    if _returned(scope.graph) is value and original_kind(scope.module) in HOSTS:
        return _layer(scope.module), scope.path
    if value.op != "call_module":
        raise NotFoldable(f"the value is what {value.name} returns, not a Linear or a convolution")
    host = _layer(scope.module.get_submodule(str(value.target)))
    if sum(node.op == "call_module" and node.target == value.target for node in scope.graph.nodes) != 1:
        raise NotFoldable(f"the {_name(host)} is called more than once")
    return host, join(scope.path, str(value.target))


def _layer(module: nn.Module) -> Layer:
    if original_kind(module) not in HOSTS:
        raise NotFoldable(f"the value is what a {_name(module)} returns, not a Linear or a convolution")
    assert isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED))
    return module


def _returned(graph: fx.Graph) -> object:
    """What a graph returns, before the seeds on it."""
    value = next(iter(reversed(graph.nodes))).args[0]
    while isinstance(value, fx.Node) and is_seed(value):
        value = value.args[0]
    return value


class _Weights:
    """Whose weights are whose in a model, so that none is changed for two.

    Args:
        root: The model.
        scopes: Its scopes.
        bodies: Modules beside it that may share weights with it.
    """

    def __init__(self, root: nn.Module, scopes: Sequence[Scope], bodies: Sequence[nn.Module]) -> None:
        modules = {id(module): module for tree in (root, *bodies) for module in tree.modules()}
        tensors = [t for m in modules.values() for t in (*m._parameters.values(), *m._buffers.values())]
        self._owners = Counter(storage_id(tensor) for tensor in tensors if tensor is not None)
        self._names = Counter(id(module) for _, module in root.named_modules(remove_duplicate=False))
        self._read = {storage_id(tensor) for scope in scopes for tensor in _read(scope)}

    def check(self, host: Layer) -> None:
        """Refuse a layer whose weights cannot be changed without changing something else.

        Raises:
            NotFoldable: It is such a layer.
        """
        name = _name(host)
        if has_own_call(host):
            raise NotFoldable(f"the {name} has hooks")
        if self._names[id(host)] > 1:
            raise NotFoldable(f"the {name} has {self._names[id(host)]} names in the model")
        for tensor in (host.weight, host.bias):
            if tensor is None:
                continue
            if self._owners[storage_id(tensor)] > 1:
                raise NotFoldable(f"the {name} shares a weight with another module")
            if storage_id(tensor) in self._read:
                raise NotFoldable(f"a weight of the {name} is read elsewhere")


def _read(scope: Scope) -> Iterator[Tensor]:
    """Tensors that a scope's graph reads by name, unless it is the graph of a layer itself."""
    if scope.graph is None or original_kind(scope.module) in HOSTS:
        return
    for node in scope.graph.nodes:
        if node.op == "get_attr" and not str(node.target).startswith(f"{NAMESPACE}."):
            path, _, name = str(node.target).rpartition(".")
            value = getattr(scope.module.get_submodule(path), name)
            if isinstance(value, Tensor):
                yield value
