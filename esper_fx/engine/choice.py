"""Which live seeds run as fused kernels: measured on the device against what Inductor makes, once, and remembered."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, fx, nn

from esper_fx import _torch, ops
from esper_fx.cache import ArtifactStore, KernelKey
from esper_fx.engine.annotate import annotate
from esper_fx.errors import StoreError
from esper_fx.passes import lower
from esper_fx.passes.lower import Candidate
from esper_fx.passes.metas import InputMeta, TensorMeta

logger = logging.getLogger(__name__)

INDUCTOR = "inductor"

#: Median seconds of one run, forward and backward, of each of these functions.
Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]


@dataclass(frozen=True)
class Choice:
    """What a measurement has found.

    Attributes:
        config: Number of the fastest configuration of the fused operator; None where Inductor's code is faster.
        seconds: What was measured: of ``inductor``, and of each configuration by its number.
    """

    config: int | None
    seconds: Mapping[str, float]

    @classmethod
    def fastest(cls, seconds: Mapping[str, float]) -> Choice:
        """The fused operator only where it is faster, so that a region is never slower for it."""
        best = min(seconds, key=lambda name: (seconds[name], name != INDUCTOR))
        return cls(None if best == INDUCTOR else int(best), dict(seconds))

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps({"config": self.config, "seconds": dict(self.seconds)}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Choice:
        """Read what :meth:`to_bytes` wrote."""
        values = json.loads(data)
        return cls(values["config"], values["seconds"])


_choices: dict[str, Choice] = {}


class Chooser:
    """Answers :func:`esper_fx.passes.lower.lower`'s question from memory, from the store, or by a measurement.

    Args:
        environment: Versions, device and numeric flags, as in the keys of kernels.
        store: Where choices are kept, or None.
        timer: Measures functions on the device.
    """

    def __init__(self, environment: Mapping[str, str], store: ArtifactStore | None, timer: Timer | None = None) -> None:
        self._environment = dict(environment)
        self._store = store
        self._timer = timer or time_on_device

    def __call__(self, candidate: Candidate) -> int | None:
        """The configuration that is fastest for a candidate, or None where Inductor's code is."""
        key = KernelKey.of(choice=candidate.describe(), environment=self._environment, source=ops.source_digest())
        choice = _choices.get(key.digest) or self._recall(key)
        if choice is None:
            choice = Choice.fastest(measure(candidate, self._timer))
            logger.debug("%s: %s", candidate.describe(), choice)
            self._remember(key, choice)
        _choices[key.digest] = choice
        return choice.config

    def _recall(self, key: KernelKey) -> Choice | None:
        data = self._store.get(key) if self._store is not None else None
        if data is None:
            return None
        try:
            return Choice.from_bytes(data)
        except (ValueError, KeyError, TypeError) as error:  # it is measured anew
            logger.warning("what is remembered of %s cannot be read: %s", key, error)
            return None

    def _remember(self, key: KernelKey, choice: Choice) -> None:
        if self._store is not None:
            try:
                self._store.put(key, choice.to_bytes(), metadata={"kind": "choice"})
            except StoreError as error:  # it is measured again next time
                logger.warning("%s", error)


def has_kernels(inputs: Sequence[InputMeta]) -> bool:
    """Whether values like these are where fused kernels run."""
    return (
        any(isinstance(m, TensorMeta) and m.device.type == "cuda" for m in inputs) and find_spec("triton") is not None
    )


def measure(candidate: Candidate, timer: Timer) -> Mapping[str, float]:
    """Seconds of a candidate as Inductor compiles its functions, and of the fused operator in every configuration.

    Everything is compiled the same way, forward and, where gradients are needed, backward. A configuration that the device
    cannot run is left out.
    """
    plain, inputs = _alone(candidate)
    runs = {INDUCTOR: _runner(plain, inputs)}
    kernels = importlib.import_module(f"esper_fx.kernels.{candidate.operator}")
    for number in range(getattr(kernels, "CONFIG_COUNT", len(kernels.CONFIGS))):
        graph = fx.Graph()
        graph.output(graph.graph_copy(plain.graph, {}))
        output = next(node for node in graph.nodes if node.op == "output").args[0][0]
        (inner,) = [c for c in lower.candidates(graph, autocast=_autocast(candidate)) if c.output is output]
        lower.rewrite(graph, inner, number)
        try:
            runs[str(number)] = _runner(fx.GraphModule(nn.Module(), graph), inputs)
        except Exception as error:
            logger.debug("%s in configuration %d cannot run: %s", candidate.operator, number, error)
    return timer(runs)


def time_on_device(runs: Mapping[str, Callable[[], object]]) -> Mapping[str, float]:
    """Median seconds of each function on the GPU, with a cold L2 cache."""
    from triton.testing import do_bench

    return {name: float(do_bench(run, return_mode="median")) / 1e3 for name, run in runs.items()}


def _autocast(candidate: Candidate) -> torch.dtype | None:
    weight: Tensor = candidate.weights[0].meta["example_value"]
    return None if weight.dtype == candidate.dtype else candidate.dtype


def _alone(candidate: Candidate) -> tuple[fx.GraphModule, list[Tensor]]:
    """A graph of what a candidate computes and nothing else, and inputs for it with random values."""
    scale = () if candidate.scale is None else (candidate.scale,)
    inputs = dict.fromkeys((candidate.x, candidate.alpha, candidate.gate, *candidate.weights, *scale))
    needed: set[fx.Node] = set()
    waiting = [candidate.output]
    while waiting:
        node = waiting.pop()
        if node not in needed and node not in inputs:
            needed.add(node)
            waiting += node.all_input_nodes
    graph = fx.Graph()
    mapping = {node: graph.placeholder(node.name) for node in inputs}
    for node, placeholder in mapping.items():
        placeholder.meta["example_value"] = node.meta["example_value"]
    for node in candidate.output.graph.nodes:
        if node in needed:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.output((mapping[candidate.output],))
    return fx.GraphModule(nn.Module(), graph), [_random_like(node.meta["example_value"]) for node in inputs]


def _random_like(fake: Tensor) -> Tensor:
    value = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
    if value.ndim:
        value.normal_(0.0, 1.0 / max(1, value.shape[-1]) ** 0.5)
    else:
        value.fill_(0.5)
    return value.requires_grad_(fake.requires_grad)


def _runner(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[[], object]:
    """Compile a graph and return what runs it once, forward and backward."""
    annotate(module, tuple(TensorMeta.of(value) for value in inputs))
    cacheable = dict.fromkeys(ops.GRAPH_FUNCTIONS, ops.source_digest())
    kernel, _ = _torch.compile_graph(module, inputs, cacheable)
    leaves = [value for value in inputs if value.requires_grad]

    def run() -> object:
        (y,) = kernel(*inputs)
        return torch.autograd.grad(y, leaves, torch.ones_like(y)) if y.requires_grad else y

    run()
    return run
