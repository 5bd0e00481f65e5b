"""Regions, what they have in common, and the variants they are compiled as."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from esper_fx import ops
from esper_fx.cache import ArtifactStore, KernelKey
from esper_fx.cache._background import ForkSafeLock, register_after_fork
from esper_fx.engine import build
from esper_fx.engine.annotate import annotate
from esper_fx.engine.build import Ambient
from esper_fx.engine.probes import Probes, rows_with_gradients
from esper_fx.passes.canonical import canonical, digest
from esper_fx.passes.metas import Dim, InputMeta, SizeMeta, TensorMeta, fixed
from esper_fx.passes.record import BodyGraph
from esper_fx.passes.specialize import specialize

if TYPE_CHECKING:
    from esper_fx.engine.service import Service


#: A template keeps so many variants that nobody uses, for when they are asked for again.
MAX_RECENT = 16


class Variant:
    """A template specialised to bodies and to which of its inputs need gradients, with probes or without: what is compiled.

    Attributes:
        key: Address of its kernel.
        module: The graph, ready to compile or to run eagerly.
        inputs: What the graph's placeholders are.
        output_grads: For each output of the region whether it needs a gradient.
        leaves: The inputs that take what probes measure of gradients, where it has probes; see :mod:`esper_fx.ops.probe`.
        rows: Which of its sites' gradients they measure.
        error: Why it has no kernel, where that is known.
        future: Done when the kernel that was asked for is in the cache, or the error is known. It holds no kernel: that
            is left to the cache, and to what runs it.
    """

    def __init__(
        self,
        template: Template,
        grads: Sequence[bool],
        bodies: Sequence[BodyGraph | None],
        probes: Probes | None,
    ) -> None:
        graph = specialize(template.graph if probes is None else probes.into(template.graph), bodies)
        self.module = fx.GraphModule(template.owner, graph)
        self.ambient = template.ambient
        inputs = [meta.with_grad(grad) for meta, grad in zip(template.inputs, grads, strict=True)]
        tensors: list[TensorMeta] = []
        for body in bodies:
            if body is not None:
                scalar = TensorMeta((), (), torch.float32, body.output.device, False)
                tensors += [scalar, scalar, *body.tensors]
        self.leaves = () if probes is None else probes.leaves()
        with self.ambient.on_this_thread():
            self.inputs = (*inputs, *self.leaves, *tensors)
            outputs = annotate(self.module, fixed(self.inputs))  # where gradients flow does not depend on sizes
            self.rows = () if probes is None else rows_with_gradients(graph)
            if probes is not None and self.rows:
                self.leaves = probes.leaves(requires_grad=True)
                self.inputs = (*inputs, *self.leaves, *tensors)
                outputs = annotate(self.module, fixed(self.inputs))
        self.output_grads = tuple(meta.requires_grad for meta in outputs)[: len(outputs) - (probes is not None)]
        self.key = KernelKey.of(
            graph=canonical(graph, self.module),
            inputs=[meta.describe() for meta in self.inputs],
            ambient=self.ambient.describe(),
            inductor=repr(sorted(self.ambient.inductor.items())),
            source=ops.source_digest(),
        )
        self.error: BaseException | None = None
        self.future: Future[None] | None = None
        register_after_fork(self)

    def payload(self, store: ArtifactStore | None) -> bytes:
        """The job for a worker, which remembers in ``store`` what it measures."""
        return build.make_payload(self.module, self.inputs, self.ambient, store)

    def request(self, service: Service, *, priority: int, retry: bool) -> None:
        """Ask for the kernel, unless it is on its way or, without ``retry``, has failed before."""
        if retry:
            self.error = None
        if self.error is not None or (self.future is not None and not self.future.done()):
            return
        fetched = service.fetch(self.key, partial(self.payload, service.store), priority)
        self.future = Future()
        fetched.add_done_callback(partial(self._decide, self.future))

    def _decide(self, decided: Future[None], fetched: Future[Any]) -> None:
        self.error = fetched.exception()
        decided.set_result(None)

    def after_fork_in_child(self) -> None:
        """Forgets what was on its way to the parent."""
        self.future = None

    def compile_here(self, store: ArtifactStore | None) -> tuple[Any, bytes]:
        """Compile in this process."""
        return build.compile_region(self.module, self.inputs, self.ambient, store)


class Template:
    """A region without names: equal regions of all programs share one, and so share kernels.

    Attributes:
        graph: The operations, seeds unresolved.
        owner: Holds the constants that the graph reads.
        inputs: What its placeholders are; requires_grad is not part of it.
        ambient: The state it is compiled in.
    """

    def __init__(self, graph: fx.Graph, owner: nn.Module, inputs: Sequence[InputMeta], ambient: Ambient) -> None:
        self.graph = graph
        self.owner = owner
        self.inputs = tuple(inputs)
        self.ambient = ambient
        # Who runs a variant, or has asked for its kernel, keeps it alive; so does the list of the last few.
        self._variants: weakref.WeakValueDictionary[tuple[Any, ...], Variant] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[Variant, None] = OrderedDict()
        self._lock = ForkSafeLock()
        self._touching = ForkSafeLock()

    def variant(
        self, grads: Sequence[bool], bodies: Sequence[BodyGraph | None], probes: Probes | None = None
    ) -> Variant:
        """The variant for these; made where it is not known, which takes milliseconds."""
        known = self.known_variant(grads, bodies, probes)
        if known is not None:
            return known
        with self._lock:
            identity = _identity(grads, bodies, probes)
            variant = self._variants.get(identity)
            if variant is None:
                variant = self._variants[identity] = Variant(self, grads, bodies, probes)
            return self._touched(variant)

    def known_variant(
        self, grads: Sequence[bool], bodies: Sequence[BodyGraph | None], probes: Probes | None = None
    ) -> Variant | None:
        """The variant for these if it is known: those that are in use are, and the last few that were asked for. Fast."""
        variant = self._variants.get(_identity(grads, bodies, probes))
        return None if variant is None else self._touched(variant)

    def _touched(self, variant: Variant) -> Variant:
        with self._touching:
            self._recent[variant] = None
            self._recent.move_to_end(variant)
            dropped = self._recent.popitem(last=False) if len(self._recent) > MAX_RECENT else None
        del dropped  # only now, outside the lock
        return variant


def _identity(grads: Sequence[bool], bodies: Sequence[BodyGraph | None], probes: Probes | None) -> tuple[Any, ...]:
    return (tuple(grads), tuple(None if body is None else body.identity for body in bodies), probes)


@dataclass(frozen=True)
class Region:
    """A template at work in a program.

    Attributes:
        template: What is computed.
        inputs: Places in the program's environment that hold its inputs.
        outputs: Places that its outputs go to.
        slots: Numbers of the program's seeds that sit in it, in order.
        frees: Places that nobody reads after it.
        strides: Strides of its outputs, as PyTorch gives them and as later regions are compiled for.
    """

    template: Template
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    slots: tuple[int, ...]
    frees: tuple[int, ...] = ()
    strides: tuple[tuple[Dim, ...], ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """For each integer that its template's sizes are made of, by its name there, the place that holds it."""
        pairs = zip(self.template.inputs, self.inputs, strict=True)
        return {meta.name: place for meta, place in pairs if isinstance(meta, SizeMeta)}


_templates: weakref.WeakValueDictionary[str, Template] = weakref.WeakValueDictionary()
_templates_lock = ForkSafeLock()


def shared_template(graph: fx.Graph, owner: nn.Module, inputs: Sequence[InputMeta], ambient: Ambient) -> Template:
    """The template equal to this one, or this one if it is the first of its kind."""
    metas = [meta.with_grad(False).describe() for meta in inputs]
    identity = digest(canonical(graph, owner) + repr((metas, ambient.describe(), sorted(ambient.inductor.items()))))
    with _templates_lock:
        template = _templates.get(identity)
        if template is None:
            template = _templates[identity] = Template(graph, owner, inputs, ambient)
        return template
