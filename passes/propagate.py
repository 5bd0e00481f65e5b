"""Annotate a graph with fake values: run it once on tensors that have shapes but no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import esper_fx.ops  # noqa: F401  (defines esper::seed)
from esper_fx._torch import pytree, storage_id

SEED = torch.ops.esper.seed


def is_seed(node: fx.Node) -> bool:
    """Whether a node of a Dynamo graph is a call of ``esper::seed``."""
    return node.op == "call_function" and node.target in (SEED, SEED.default)


def seed_operands(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """What a call of ``esper::seed`` reads: the value at its site, and the source of that value where it has one."""
    value, source = node.args[0], node.args[6] if len(node.args) > 6 else None
    assert isinstance(value, fx.Node)
    assert source is None or isinstance(source, fx.Node)
    return value, source


@dataclass
class Effects:
    """What running a graph does besides returning values.

    Attributes:
        mutations: Node to the storages (by address of the fake storage) that it changes in place.
    """

    mutations: dict[fx.Node, set[int]] = field(default_factory=dict)


class _Annotator(fx.Interpreter):
    """Interpreter that stores each node's value in ``meta["example_value"]`` and notes in-place changes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.effects = Effects()

    def run_node(self, n: fx.Node) -> Any:
        operands = [self.env[used] for used in n.all_input_nodes if used in self.env]
        tensors = [leaf for leaf in pytree.tree_leaves(operands) if isinstance(leaf, Tensor)]
        versions = [_version(tensor) for tensor in tensors]
        # A dormant seed hands its input through: what changes the one in place changes the other.
        value = self.env[seed_operands(n)[0]] if is_seed(n) else super().run_node(n)
        changed = {storage_id(t) for t, v in zip(tensors, versions, strict=True) if _version(t) != v}
        if changed:
            self.effects.mutations[n] = changed
        n.meta["example_value"] = value
        return value


def propagate(module: fx.GraphModule, inputs: Sequence[Any]) -> Effects:
    """Run ``module`` on fake ``inputs`` (call it under their FakeTensorMode) and annotate every node.

    Args:
        module: The graph; each node's ``meta["example_value"]`` is set.
        inputs: One value per placeholder: fake tensors, or plain numbers.
    """
    annotator = _Annotator(module)
    annotator.run(*inputs)
    return annotator.effects


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def level_change(node: fx.Node) -> int:
    """1 where a transform of torch.func (vmap, grad, jvp) begins, -1 where it ends, else 0."""
    name = getattr(node.target, "__name__", "")
    if name.endswith("_increment_nesting") or name == "_enter_dual_level":
        return 1
    return -1 if name.endswith("_decrement_nesting") or name == "_exit_dual_level" else 0
