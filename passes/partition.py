"""Choose where to cut a program into regions: where few tensors are live, preferring repeated blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from esper_fx._torch import SET_GRAD_ENABLED, pytree, storage_id
from esper_fx.passes.carry_sizes import SIZE
from esper_fx.passes.propagate import Effects, is_seed, level_change, seed_operands

#: A region smaller than this many operations is merged with a neighbour.
MIN_OPERATIONS = 6
#: No more than this many tensors may be live at a cut.
MAX_LIVE = 8
#: Segments between cuts are kept below this size where the graph allows it.
MAX_OPERATIONS = 64


@dataclass(frozen=True)
class Flow:
    """A graph's operations in order and the values that are live between them.

    Attributes:
        nodes: The operations: neither placeholders, nor constants, nor the output, nor what computes sizes.
        live: For each position, the values defined before it and used at or after it; position i lies before ``nodes[i]``.
        legal: For each position, whether a cut there keeps the meaning.
    """

    nodes: tuple[fx.Node, ...]
    live: tuple[tuple[fx.Node, ...], ...]
    legal: tuple[bool, ...]


def analyse(graph: fx.Graph, effects: Effects) -> Flow:
    """Compute liveness and legal cut positions of an annotated graph.

    A cut is illegal where a value that is not one tensor would cross it, where a value that crosses it is changed in place
    later (an upstream region may have saved it for its backward pass), between two uses of an input that is changed in place
    anywhere (a change may be what it needs a gradient for), inside a block that switches the grad mode or autocast or is a
    transform of torch.func, and between the last operation that reads a seed's source and that seed: the source would have to
    cross for the sake of a seed that is dormant most of the time.
    """
    nodes = tuple(n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output") and SIZE not in n.meta)
    position = {node: i for i, node in enumerate(nodes)}
    last_use = {node: max((position.get(user, len(nodes)) for user in node.users), default=-1) for node in nodes}
    changed_at: dict[int, int] = {}
    for node, storages in effects.mutations.items():
        for storage in storages:
            changed_at[storage] = max(changed_at.get(storage, -1), position.get(node, -1))
    parted = _between_source_and_seed(nodes, position) | _around_changed_inputs(graph, position, changed_at)
    live: list[tuple[fx.Node, ...]] = []
    legal: list[bool] = []
    alive: list[fx.Node] = []
    depth = 0
    ambient_grad = True
    for i in range(len(nodes) + 1):
        alive = [node for node in alive if last_use[node] >= i]
        live.append(tuple(alive))
        crossing_ok = all(_may_cross(node, i, changed_at) for node in alive)
        legal.append(crossing_ok and depth == 0 and ambient_grad and i not in parted)
        if i < len(nodes):
            node = nodes[i]
            depth += _context_change(node)
            if node.target is SET_GRAD_ENABLED:
                ambient_grad = bool(node.args[0]) == _first_grad_mode(nodes)
            alive.append(node)
    return Flow(nodes, tuple(live), tuple(legal))


def whole(flow: Flow) -> list[int]:
    """Cut positions of the plan that does not cut: one region."""
    return [0, len(flow.nodes)]


def blocks(flow: Flow, labels: Sequence[str], closing: Collection[str] = ()) -> list[int]:
    """Cut positions of the plan with many small regions, equal blocks cut alike.

    The narrowest cuts give the finest segments; the most frequent adjacent pair of segments is then merged again and again
    (as byte-pair encoding merges letters) until no region is smaller than ``MIN_OPERATIONS``, so that what repeats in the
    network repeats in the plan.

    Args:
        flow: The analysed graph.
        labels: For each operation a label that is equal for equal operations.
        closing: Labels of operations after which a region ends wherever a cut is legal and narrow there: the seeds, so that
            what a seed changes is its own block and not the next one too.

    Returns:
        Increasing positions, the first 0 and the last ``len(flow.nodes)``.
    """
    total = len(flow.nodes)
    positions = [0, total]
    for width in range(1, MAX_LIVE + 1):
        inner = [i for i in range(1, total) if flow.legal[i] and len(flow.live[i]) <= width]
        positions = [0, *inner, total]
        if max(b - a for a, b in zip(positions, positions[1:], strict=False)) <= MAX_OPERATIONS:
            break
    segments = [tuple(labels[a:b]) for a, b in zip(positions, positions[1:], strict=False)]
    merged = _merge(segments, closing)
    cuts = [0]
    for segment in merged:
        cuts.append(cuts[-1] + len(segment))
    return cuts


def _merge(segments: list[tuple[str, ...]], closing: Collection[str]) -> list[tuple[str, ...]]:
    while len(segments) > 1:
        pairs = Counter[tuple[tuple[str, ...], tuple[str, ...]]]()
        i = 0
        candidates = list(zip(segments, segments[1:], strict=False))
        for pair in candidates:
            if pair[0][-1] not in closing and min(len(pair[0]), len(pair[1])) < MIN_OPERATIONS:
                pairs[pair] += 1
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], -len(pair[0]) - len(pair[1]), -candidates.index(pair)))
        result: list[tuple[str, ...]] = []
        i = 0
        while i < len(segments):
            if i + 1 < len(segments) and (segments[i], segments[i + 1]) == best:
                result.append(segments[i] + segments[i + 1])
                i += 2
            else:
                result.append(segments[i])
                i += 1
        segments = result
    return segments


def _may_cross(node: fx.Node, cut: int, changed_at: dict[int, int]) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and changed_at.get(storage_id(value), -1) < cut


def _between_source_and_seed(nodes: Sequence[fx.Node], position: Mapping[fx.Node, int]) -> set[int]:
    """The cut positions that lie between a seed and the last operation before it that reads its source anyway."""
    parted: set[int] = set()
    for seed in filter(is_seed, nodes):
        _, source = seed_operands(seed)
        if source is not None:
            others = (user for user in source.users if not is_seed(user) or seed_operands(user)[0] is source)
            readers = [position[user] for user in others if position.get(user, len(nodes)) < position[seed]]
            parted.update(range(max(readers, default=position.get(source, -1)) + 1, position[seed] + 1))
    return parted


def _around_changed_inputs(graph: fx.Graph, position: Mapping[fx.Node, int], changed: Collection[int]) -> set[int]:
    """The cut positions that lie between two uses, in whatever view, of an input or constant that is changed in place."""
    uses: dict[int, list[int]] = {}
    for node in graph.nodes:
        for used in node.all_input_nodes if node in position else ():
            value = used.meta.get("example_value")
            if isinstance(value, Tensor) and storage_id(value) in changed:
                uses.setdefault(storage_id(value), []).append(position[node])
    given = [node.meta.get("example_value") for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    places = {storage_id(value) for value in given if isinstance(value, Tensor)} & uses.keys()
    return {cut for place in places for cut in range(min(uses[place]) + 1, max(uses[place]) + 1)}


def _context_change(node: fx.Node) -> int:
    name = getattr(node.target, "__name__", "")
    if name in ("_enter_autocast", "_enter_inference_mode"):
        return 1
    return -1 if name in ("_exit_autocast", "_exit_inference_mode") else level_change(node)


def _first_grad_mode(nodes: Sequence[fx.Node]) -> bool:
    """The mode outside of all switches: the first switch turns away from it."""
    for node in nodes:
        if node.target is SET_GRAD_ENABLED:
            return not bool(node.args[0])
    return True


def label(node: fx.Node, describe: Any) -> str:
    """A label for :func:`blocks`: the operation and the shape and dtype of what it returns."""
    values = [leaf for leaf in pytree.tree_leaves(node.meta.get("example_value")) if isinstance(leaf, Tensor)]
    return f"{describe(node.target)}:{[(tuple(v.shape), str(v.dtype)) for v in values]}"
