"""Compile one region: what a worker process does with a job, and the same in the training process for the first call."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from esper_fx import _torch, flags, ops
from esper_fx.cache import ArtifactStore
from esper_fx.engine.annotate import annotate
from esper_fx.engine.choice import Chooser, has_kernels
from esper_fx.errors import StoreError
from esper_fx.kernels.launch import HiddenLaunch
from esper_fx.passes import serialize
from esper_fx.passes.lower import lower
from esper_fx.passes.metas import InputMeta, Symbols, TensorMeta
from esper_fx.settings import settings

TARGET = "esper_fx.engine.build:run_job"
WARM_TARGET = "esper_fx.engine.build:warm"


@dataclass(frozen=True)
class Ambient:
    """The state around a call that compilation reads.

    Attributes:
        grad: Whether gradients are recorded.
        autocast: For each device type with autocast on, its dtype.
        environment: Versions, CPU features, accelerator and numeric flags.
        inductor: The user's Inductor settings.
        fused: Whether fused kernels may take the place of what Inductor makes.
    """

    grad: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    environment: dict[str, str]
    inductor: dict[str, Any]
    fused: bool = True

    @classmethod
    def current(cls) -> Ambient:
        """Read it off the calling thread."""
        grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)
        return cls(grad, autocast, _torch.compile_environment(), _torch.inductor_settings(), settings().fused_kernels)

    def describe(self) -> dict[str, Any]:
        """A JSON value, for keys."""
        autocast = [[kind, str(dtype)] for kind, dtype in self.autocast]
        return {"grad": self.grad, "autocast": autocast, "environment": self.environment, "fused": self.fused}

    @contextlib.contextmanager
    def on_this_thread(self) -> Iterator[None]:
        """Set the grad mode and autocast of the calling thread to these."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind in ("cpu", "cuda"):
                dtype = dict(self.autocast).get(kind)
                if dtype is not None or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=dtype is not None))
            yield

    @contextlib.contextmanager
    def in_this_process(self) -> Iterator[None]:
        """Like :meth:`on_this_thread`, and set Inductor and PyTorch's global flags to these."""
        with self.on_this_thread(), _torch.inductor_patch(self.inductor), flags.applied(self.environment):
            yield


def make_payload(
    module: fx.GraphModule, inputs: tuple[InputMeta, ...], ambient: Ambient, store: ArtifactStore | None
) -> bytes:
    """Serialise what :func:`run_job` needs."""
    return pickle.dumps((serialize.dumps(module), inputs, ambient, None if store is None else store.root))


def run_job(payload: bytes) -> bytes:
    """Compile a region in a worker; returns the artifact's bytes."""
    graph, inputs, ambient, root = pickle.loads(payload)
    store = None
    if root is not None:
        with contextlib.suppress(StoreError):
            store = ArtifactStore(root, create=False)
    return compile_region(serialize.loads(graph), inputs, ambient, store, threads=_threads(inputs))[1]


def _threads(inputs: tuple[InputMeta, ...]) -> int:
    """How many compilations a worker runs at once.

    One on CPUs, which are what the training loop computes with. A region for a GPU has dozens of Triton kernels, several
    configurations each, and the host is mostly idle.
    """
    if any(meta.device.type == "cuda" for meta in inputs if isinstance(meta, TensorMeta)):
        return max(1, min(8, (os.cpu_count() or 1) // 2))
    return 1


def compile_region(
    module: fx.GraphModule,
    inputs: tuple[InputMeta, ...],
    ambient: Ambient,
    store: ArtifactStore | None,
    *,
    threads: int | None = None,
) -> tuple[Callable[..., Any], bytes]:
    """Compile a region for these inputs; returns the callable and its serialised form.

    Args:
        module: The region's variant: a graph of PyTorch functions.
        inputs: What its placeholders are.
        ambient: The state to compile in.
        store: Where it is remembered which fused kernels are fast, or None.
        threads: Number of compilations at once.
    """
    hidden: list[HiddenLaunch] = []
    with ambient.in_this_process():
        symbols = Symbols.of(inputs)
        annotate(module, inputs, symbols)
        if ambient.fused and not symbols.given and has_kernels(inputs):
            module = _fused(module, inputs, ambient, store)
            from esper_fx.ops.low_rank import hidden_launches  # only now: it defines the operator

            hidden = hidden_launches(module.graph)
        cacheable = dict.fromkeys(ops.GRAPH_FUNCTIONS, ops.source_digest())
        if symbols.given:
            examples = [node.meta["example_value"] for node in module.graph.nodes if node.op == "placeholder"]
            return _torch.compile_graph(module, examples, cacheable, threads=threads, guards=symbols.guards)
        examples = symbols.examples(inputs)  # outside of the mode: real ones
        return _torch.compile_graph(module, examples, cacheable, threads=threads, hidden=hidden)


def _fused(
    module: fx.GraphModule, inputs: tuple[InputMeta, ...], ambient: Ambient, store: ArtifactStore | None
) -> fx.GraphModule:
    """The region with fused kernels where these are fastest; the module itself stays as it is, to run eagerly."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    choose = Chooser(ambient.environment, store)
    if not lower(graph, choose=choose, autocast=dict(ambient.autocast).get("cuda")):
        return module
    fused = fx.GraphModule(module, graph)
    annotate(fused, inputs)
    return fused


def warm(_: bytes) -> bytes:
    """Make a fresh worker ready: import the compiler and compile one tiny kernel, forward and backward."""

    ambient = Ambient(True, (), _torch.compile_environment(), {})
    meta = TensorMeta((64,), (1,), torch.float32, torch.device("cpu"), True)
    graph = fx.Graph()
    x = graph.placeholder("x")
    product = graph.call_function(torch.mul, (x, 2.0))
    graph.output((graph.call_function(torch.relu, (product,)),))
    compile_region(fx.GraphModule(torch.nn.Module(), graph), (meta,), ambient, None, threads=1)
    return b""
