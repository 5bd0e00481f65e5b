"""Take some operations of a program out of it, as a graph of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import fx

from esper_fx.passes.carry_sizes import SIZE
from esper_fx.passes.metas import InputMeta, SizeMeta, TensorMeta
from esper_fx.passes.propagate import is_seed, seed_operands


def extract(
    inside: Sequence[fx.Node],
    leaving: Sequence[fx.Node],
    meta: Callable[[fx.Node], TensorMeta],
    integers: Mapping[fx.Node, SizeMeta],
) -> tuple[dict[fx.Node, InputMeta], fx.Graph]:
    """A graph of its own for these nodes, without names; constants are read again in it, and sizes computed again.

    Args:
        inside: The nodes.
        leaving: Those that others read: its outputs.
        meta: What the value of a node is.
        integers: The inputs of the program that sizes are made of.

    Returns:
        What comes from outside, in the order of the graph's placeholders, with what it is: first the integers that the
        others' sizes are made of, called `n0`, `n1` and so on.
    """
    members = set(inside)
    outside = dict.fromkeys(used for node in inside for used in _operands(node) if used not in members)
    computed: dict[fx.Node, None] = {}
    entering: dict[fx.Node, None] = {}
    for node in outside:
        if SIZE in node.meta:
            _collect(node, computed, entering)
        elif node.op != "get_attr":
            entering[node] = None
    inputs = _inputs(entering, meta, integers)
    graph = fx.Graph()
    mapping = {node: graph.placeholder(f"input{number}") for number, node in enumerate(inputs)}
    for node in outside:
        if node.op == "get_attr":
            mapping[node] = graph.get_attr(str(node.target))
    for node in (*computed, *inside):
        if is_seed(node):
            value, *more = [mapping[n] for n in seed_operands(node) if n is not None]
            mapping[node] = graph.call_function(node.target, (value, value, value, 0, 0, node.args[5], *more))  # type: ignore[arg-type]
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            mapping[node].meta = {}
    graph.output(tuple(mapping[node] for node in leaving))
    return inputs, graph


def _operands(node: fx.Node) -> list[fx.Node]:
    return [n for n in seed_operands(node) if n is not None] if is_seed(node) else node.all_input_nodes


def _collect(node: fx.Node, computed: dict[fx.Node, None], entering: dict[fx.Node, None]) -> None:
    """Add what computes a size, in order, and the integers that it is made of."""
    for used in node.all_input_nodes:
        if SIZE in used.meta:
            _collect(used, computed, entering)
        else:
            entering[used] = None
    computed[node] = None


def _inputs(
    entering: Mapping[fx.Node, None], meta: Callable[[fx.Node], TensorMeta], integers: Mapping[fx.Node, SizeMeta]
) -> dict[fx.Node, InputMeta]:
    tensors = {node: meta(node) for node in entering if node not in integers}
    names = dict.fromkeys(
        name for node in entering for name in (tensors[node].names if node in tensors else [integers[node].name])
    )
    local = {name: f"n{number}" for number, name in enumerate(names)}
    by_name = {integer.name: node for node, integer in integers.items()}
    inputs: dict[fx.Node, InputMeta] = {
        by_name[name]: SizeMeta(local[name], integers[by_name[name]].example) for name in names
    }
    return inputs | {node: tensor.renamed(local) for node, tensor in tensors.items()}
