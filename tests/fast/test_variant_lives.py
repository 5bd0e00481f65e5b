"""How long variants and their kernels live: what runs or is asked for stays, and of the rest the last few."""

from __future__ import annotations

import gc
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from esper_fx import _torch
from esper_fx.cache import KernelCache
from esper_fx.engine.build import Ambient
from esper_fx.engine.region import MAX_RECENT, Template, Variant
from esper_fx.engine.service import Service
from esper_fx.passes.metas import TensorMeta
from esper_fx.passes.record import BodyGraph, record
from tests.support.compilers import EchoCompiler, HandCompiler
from tests.support.processes import in_forked_child
from tests.support.programs import SEED

META = TensorMeta((2, 4), (4, 1), torch.float32, torch.device("cpu"), False)


class Kernel:
    """What an artifact is loaded as."""

    made: ClassVar[weakref.WeakSet[Kernel]] = weakref.WeakSet()

    def __init__(self, data: bytes) -> None:
        self.made.add(self)


class Scale(nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "load_graph", Kernel)
    Kernel.made.clear()


@pytest.fixture
def template() -> Template:
    """A seed on its own."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(SEED, (x, x, x, 0, 0, True)),))
    return Template(graph, nn.Module(), [META], Ambient.current())


def body(number: int) -> BodyGraph:
    return record(Scale(number), META, training=True)


def service(compiler: Any, *, max_entries: int = 2) -> Service:
    return Service(KernelCache(max_entries=max_entries, compiler=compiler), None, compiler)


def asked(variant: Variant, owner: Service, *, retry: bool = False) -> Any:
    """What the variant's future is after a request that has been answered, and its kernel in the cache."""
    variant.request(owner, priority=0, retry=retry)
    assert variant.future is not None
    variant.future.result(10)
    return owner.cache.peek(variant.key)


def test_kernels_live_as_long_as_the_cache_keeps_them(template: Template) -> None:
    owner = service(EchoCompiler())
    variants = [template.variant([False], [body(number)]) for number in range(20)]
    for variant in variants:
        assert isinstance(asked(variant, owner), Kernel)
    gc.collect()
    assert len(Kernel.made) == len(owner.cache) == 2
    assert owner.cache.stats().evictions == 18


def test_a_kernel_that_the_cache_has_dropped_is_asked_for_again(template: Template) -> None:
    compiler = EchoCompiler()
    owner = service(compiler, max_entries=1)
    one, other = (template.variant([False], [body(number)]) for number in range(2))
    for variant in (one, other, one):
        assert asked(variant, owner) is not None
    assert len(compiler.payloads) == 3


def test_a_kernel_that_is_on_its_way_is_asked_for_once(template: Template) -> None:
    compiler = HandCompiler()
    owner, variant = service(compiler), template.variant([False], [None])
    variant.request(owner, priority=0, retry=False)
    coming = variant.future
    variant.request(owner, priority=0, retry=True)
    assert variant.future is coming


def test_a_kernel_that_has_failed_is_asked_for_again_by_those_only_who_say_so(template: Template) -> None:
    compiler = HandCompiler()
    owner, variant = service(compiler), template.variant([False], [None])
    variant.request(owner, priority=0, retry=False)
    assert variant.future is not None
    compiler.next()[1].set_exception(RuntimeError("no"))
    failed = variant.future
    failed.result(10)
    assert "RuntimeError: no" in str(variant.error)
    variant.request(owner, priority=0, retry=False)
    assert variant.error is not None
    assert variant.future is failed
    variant.request(owner, priority=0, retry=True)
    assert variant.error is None
    compiler.next()


def test_what_was_on_its_way_at_a_fork_is_asked_for_again_in_the_child(template: Template) -> None:
    compiler = HandCompiler()
    owner, variant = service(compiler), template.variant([False], [None])
    variant.request(owner, priority=0, retry=False)
    compiler.next()

    def check() -> None:
        owner.cache.compiler = EchoCompiler()
        assert isinstance(asked(variant, owner), Kernel)

    assert in_forked_child(check)
    assert variant.future is not None
    assert not variant.future.done()


def test_the_last_few_variants_stay_and_the_one_that_is_used(template: Template) -> None:
    bodies = [body(number) for number in range(2 * MAX_RECENT)]
    used = template.variant([False], [bodies[0]])
    made, graphs = [], []
    for each in bodies:
        variant = template.variant([False], [each])
        made.append(weakref.ref(variant))
        graphs.append(weakref.ref(variant.module))
    del variant
    gc.collect()
    expected = [True] + [False] * (MAX_RECENT - 1) + [True] * MAX_RECENT
    assert [variant() is not None for variant in made] == expected
    assert [graph() is not None for graph in graphs] == expected
    assert template.known_variant([False], [bodies[0]]) is used
    assert template.known_variant([False], [bodies[1]]) is None
    assert template.known_variant([False], [bodies[-1]]) is made[-1]()


def test_a_variant_that_is_looked_for_is_one_of_the_last_few(template: Template) -> None:
    bodies = [body(number) for number in range(2 * MAX_RECENT)]
    favourite = weakref.ref(template.variant([False], [bodies[0]]))
    for each in bodies:
        template.variant([False], [each])
        assert template.known_variant([False], [bodies[0]]) is favourite()


def test_a_variant_that_is_made_again_has_the_same_kernel(template: Template) -> None:
    before = template.variant([False], [body(1)]).key
    for number in range(2, MAX_RECENT + 2):
        template.variant([False], [body(number)])
    assert template.known_variant([False], [body(1)]) is None
    assert template.variant([False], [body(1)]).key == before
