"""A program for fixed sizes: its plans (ways to cut it), and executables that run a plan's kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from esper_fx._torch import pytree, storage_id
from esper_fx.engine.build import Ambient
from esper_fx.engine.extract import extract
from esper_fx.engine.probes import Probes
from esper_fx.engine.region import Region, Variant, shared_template
from esper_fx.engine.varying import FIXED, Varying, fake_inputs
from esper_fx.ops import reads_source
from esper_fx.passes import partition
from esper_fx.passes.canonical import qualified_name
from esper_fx.passes.carry_sizes import SIZE, carry_sizes
from esper_fx.passes.metas import SizeMeta, TensorMeta, examples
from esper_fx.passes.propagate import Effects, is_seed, propagate, seed_operands
from esper_fx.passes.record import BodyGraph
from esper_fx.passes.wrapped_numbers import unwrap_numbers

Assignment = tuple[BodyGraph | None, ...]


@dataclass(frozen=True)
class Slot:
    """Where a seed sits in a program.

    Attributes:
        model: Handle of its model.
        site: Its row in the state arrays.
        value: The value at its site.
        training: The mode.
        changed: Whether that value is changed in place after the seed, or may be by whoever the program hands its memory to
            more than once.
        source: Input of the module whose output that value is, where that is known.
        names: What the names in their sizes are called in the program.
    """

    model: int
    site: int
    value: TensorMeta
    training: bool
    changed: bool = False
    source: TensorMeta | None = None
    names: Mapping[str, str] = field(default_factory=dict, compare=False)

    def input_of(self, body: object) -> TensorMeta | None:
        """What a body reads here: the value or, where it says so, the source; None where that is not known."""
        return self.source if reads_source(body) else self.value


@dataclass(frozen=True)
class Plan:
    """A way to cut a program.

    Attributes:
        name: ``whole`` or ``blocks``.
        regions: In the order they run.
        outputs: For each output of the program its place in the environment.
        places: Size of the environment: the program's inputs, then what regions exchange.
        varying: How its sizes are made of its inputs.
    """

    name: str
    regions: tuple[Region, ...]
    outputs: tuple[Any, ...]
    places: int
    varying: Varying = FIXED


class Layout:
    """A Dynamo graph, annotated, with its plans.

    Args:
        module: The graph.
        args: What it is called with.
        ambient: The state around that call.
        blocks: Whether there is to be the plan with many regions.
        vary: Whether it is for all sizes, where the graph's vary, instead of for those of this call.

    Raises:
        SizesError: It cannot be for all sizes.

    Attributes:
        plans: Best steady state first.
        slots: For each seed in the graph, in order, where it sits.
        input_grads: For each input of the program whether it needs a gradient.
        changed_inputs: Positions of the inputs that the program changes in place.
        shown: Positions of the outputs that share memory with the value at a site; the caller may change that in place.
    """

    def __init__(
        self, module: fx.GraphModule, args: Sequence[Any], ambient: Ambient, *, blocks: bool, vary: bool = False
    ) -> None:
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(module.graph, mapping)
        graph.output(output)
        self.module = fx.GraphModule(module, graph)
        numbers = unwrap_numbers(graph, args)
        with ambient.on_this_thread():
            symbols, inputs, places = fake_inputs(module, args, vary=vary)
            with symbols.active():
                effects = propagate(self.module, inputs)
        carry_sizes(graph)
        self.input_grads = tuple(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        changed = set[int]().union(*effects.mutations.values())
        self.changed_inputs = tuple(i for i, value in enumerate(inputs) if _storage(value) in changed)
        self.slots = _slots(graph, effects, symbols.names)
        self._names = symbols.names
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self._integers = {placeholders[place]: SizeMeta(name, args[place]) for name, place in places.items()}
        self._varying = Varying(places, symbols.guards(), tuple(slot.names for slot in self.slots), numbers)
        unchanged = zip(filter(is_seed, graph.nodes), self.slots, strict=True)
        memory = {_storage_of(node) for node, slot in unchanged if not slot.changed}
        self.shown = tuple(i for i, item in enumerate(_results(graph)) if _storage_of(item) in memory - {None})
        flow = partition.analyse(graph, effects)
        self.plans = [self._plan("whole", partition.whole(flow), flow, ambient)] if flow.nodes else []
        if blocks and self.slots:
            labels = [
                partition.label(node, lambda t: t if isinstance(t, str) else qualified_name(t)) for node in flow.nodes
            ]
            closing = {label for label, node in zip(labels, flow.nodes, strict=True) if is_seed(node)}
            cuts = partition.blocks(flow, labels, closing)
            if len(cuts) > 2:
                self.plans.append(self._plan("blocks", cuts, flow, ambient))

    def _plan(self, name: str, cuts: Sequence[int], flow: partition.Flow, ambient: Ambient) -> Plan:
        graph = self.module.graph
        places = {node: i for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
        slot_of = {node: i for i, node in enumerate(n for n in graph.nodes if is_seed(n))}
        final = next(iter(reversed(graph.nodes)))
        regions: list[Region] = []
        for first, last in zip(cuts, cuts[1:], strict=False):
            inside = flow.nodes[first:last]
            members = set(inside)
            leaving = [n for n in inside if any(user not in members for user in n.users)]
            seeds = tuple(slot_of[node] for node in inside if node in slot_of)
            entering, region_graph = extract(inside, leaving, self._meta, self._integers)
            for node in leaving:
                places[node] = len(places)
            metas = list(entering.values())
            template = shared_template(region_graph, self.module, metas, ambient)
            strides = tuple(self._meta(node).stride for node in leaving)
            regions.append(
                Region(
                    template,
                    tuple(places[n] for n in entering),
                    tuple(places[n] for n in leaving),
                    seeds,
                    strides=strides,
                )
            )

        def source(node: fx.Node) -> Any:
            if node in places:
                return Place(places[node])
            return node.meta[SIZE].renamed(self._names) if SIZE in node.meta else Constant(self._constant(node))

        outputs: Any = fx.map_arg(final.args[0], source)
        return Plan(name, _with_frees(regions, outputs, len(places)), tuple(outputs), len(places), self._varying)

    def _meta(self, node: fx.Node) -> TensorMeta:
        return TensorMeta.of(node.meta["example_value"]).renamed(self._names)

    def _constant(self, node: fx.Node) -> Any:
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value

    def variants(
        self,
        plan: Plan,
        assignment: Assignment,
        *,
        known: bool = False,
        probes: Sequence[Probes | None] | None = None,
    ) -> list[Variant] | None:
        """The variants that run ``plan`` with these bodies, each knowing which of its inputs need gradients.

        Args:
            plan: One of ``plans``.
            assignment: For each slot its body, or None.
            known: Make no new variants: return None where one is missing. Fast.
            probes: For each region its probes. Default: none.
        """
        grads = list(self.input_grads) + [False] * (plan.places - len(self.input_grads))
        result = []
        for number, region in enumerate(plan.regions):
            bodies = [assignment[slot] for slot in region.slots]
            needed = [grads[place] for place in region.inputs]
            find = region.template.known_variant if known else region.template.variant
            variant = find(needed, bodies, None if probes is None else probes[number])
            if variant is None:
                return None
            for place, grad in zip(region.outputs, variant.output_grads, strict=True):
                grads[place] = grad
            result.append(variant)
        return result

    def probes(self, plan: Plan, directions: int, dims: Sequence[int | None]) -> list[Probes | None]:
        """For each region of a plan probes at all its sites, or None where it has none.

        Args:
            plan: One of ``plans``.
            directions: How many directions sensors have; 0: there are none.
            dims: For each slot the dimension that holds features. None: it gets no sensor.
        """
        result: list[Probes | None] = []
        for region in plan.regions:
            slots = [self.slots[slot] for slot in region.slots]
            features = [
                None if dim is None else (examples([slot.value.shape[dim]])[0], dim)
                for slot, dim in zip(slots, [dims[slot] for slot in region.slots], strict=True)
            ]
            gradients = tuple(not slot.changed for slot in slots)
            result.append(Probes(slots[0].value.device, gradients, directions, tuple(features)) if slots else None)
        return result


@dataclass(frozen=True)
class Place:
    """An output of a program that is a place of its environment."""

    index: int


@dataclass(frozen=True)
class Constant:
    """An output of a program that is always the same."""

    value: Any


def _storage(value: Any) -> int | None:
    return storage_id(value) if isinstance(value, Tensor) else None


def _storage_of(item: Any) -> int | None:
    return _storage(item.meta.get("example_value")) if isinstance(item, fx.Node) else None


def _results(graph: fx.Graph) -> Sequence[Any]:
    results: Sequence[Any] = next(iter(reversed(graph.nodes))).args[0]
    return results


def _handed_out_more_than_once(graph: fx.Graph) -> set[int]:
    """The memory that the caller gets with several outputs, or has given as an input and gets with an output."""
    times = Counter(_storage_of(item) for item in _results(graph))
    times.update({_storage_of(node) for node in graph.nodes if node.op == "placeholder"} & times.keys())
    return {storage for storage, number in times.items() if storage is not None and number > 1}


def _slots(graph: fx.Graph, effects: Effects, names: Mapping[str, str]) -> tuple[Slot, ...]:
    later = _handed_out_more_than_once(graph)
    slots = []
    for node in reversed(graph.nodes):
        if is_seed(node):
            slots.append(_slot(node, later, names))
        later |= effects.mutations.get(node, set())
    return tuple(reversed(slots))


def _slot(node: fx.Node, changed_later: set[int], names: Mapping[str, str]) -> Slot:
    value, source = seed_operands(node)
    metas = [TensorMeta.of(n.meta["example_value"]).renamed(names) for n in (value, source) if n is not None]
    local = _numbered("d", metas)
    metas = [meta.renamed(local) for meta in metas]
    return Slot(
        model=node.args[3],  # type: ignore[arg-type]
        site=node.args[4],  # type: ignore[arg-type]
        value=metas[0],
        training=bool(node.args[5]),
        changed=_storage(value.meta["example_value"]) in changed_later,
        source=None if source is None else metas[1],
        names={number: name for name, number in local.items()},
    )


def _numbered(letter: str, metas: Sequence[TensorMeta]) -> dict[str, str]:
    """Other names for all in the sizes of these tensors, in order: equal for tensors that are alike."""
    return {name: f"{letter}{i}" for i, name in enumerate(dict.fromkeys(name for m in metas for name in m.names))}


def _with_frees(regions: list[Region], outputs: Any, places: int) -> tuple[Region, ...]:
    """Note after which region each place is read for the last time."""
    kept = {item.index for item in pytree.tree_leaves(outputs) if isinstance(item, Place)}
    last: dict[int, int] = {}
    for number, region in enumerate(regions):
        for place in (*region.outputs, *region.inputs):
            last[place] = number
    return tuple(
        replace(region, frees=tuple(p for p, n in last.items() if n == number and p not in kept))
        for number, region in enumerate(regions)
    )
