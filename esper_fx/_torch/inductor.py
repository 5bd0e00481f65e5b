"""Inductor: compile a graph, serialise what comes of it, and load that in another process."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import logging
import os
import re
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from functools import partial
from typing import Any, TypeVar

import torch
from torch import fx

from esper_fx.artifact import Artifact, Code, holds, pack, relocated, unpack, write_atomic
from esper_fx.cache._background import ForkSafeLock
from esper_fx.kernels.launch import HiddenLaunch, compile_hidden

logger = logging.getLogger(__name__)


_T = TypeVar("_T")


_GRAPH_LOCK = ForkSafeLock()


class Uncacheable(Exception):
    """A graph holds something that cannot be serialised."""


def compile_graph(
    module: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    cacheable: dict[str, str],
    *,
    threads: int | None = None,
    hidden: Sequence[HiddenLaunch] = (),
    guards: Callable[[], tuple[str, ...]] | None = None,
) -> tuple[Callable[..., Any], bytes]:
    """Compile a graph with Inductor, forward and backward, and return the callable and its serialised form.

    Args:
        module: PyTorch functions and methods only; every node annotated with ``meta["example_value"]``.
        inputs: Example inputs whose shape, stride, dtype, device and requires_grad are compiled for. Where sizes vary, the
            fake ones that the graph was annotated with.
        cacheable: Qualified names of functions of ours in the graph, with a digest of their source.
        threads: Number of compilations at once, by processes beside this one; None leaves Inductor's setting.
        hidden: What launches within operators will compile, for whoever loads the serialised form.
        guards: Where sizes vary: what compiling has taken for granted of them, asked when it is over.

    Raises:
        Uncacheable: Compilation is possible but not serialisation.
    """
    return _without_broken_libraries(partial(_compile_graph, module, inputs, cacheable, threads, hidden, guards))


def _without_broken_libraries(work: Callable[[], _T]) -> _T:
    """Do something that loads C++ libraries, again without those that turn out to be broken.

    A C++ compiler that is killed leaves half a file where Inductor takes it for a whole one from then on.
    """
    removed: set[str] = set()
    while True:
        try:
            return work()
        except Exception as error:
            broken = _broken_library(error)
            if broken is None or broken in removed:
                raise
            logger.warning("%s is broken and is built again", broken)
            removed.add(broken)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(broken)


def _broken_library(error: BaseException) -> str | None:
    """The library in Inductor's cache that could not be loaded, if that is what an error is about."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    text = f"{type(error).__name__}: {error}"
    found = re.search(r"(?:ImportError|OSError): (/[^:\n]+\.so): ", text)
    return found[1] if found is not None and found[1].startswith(os.path.join(cache_dir(), "")) else None


def _compile_graph(
    module: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    cacheable: dict[str, str],
    threads: int | None,
    hidden: Sequence[HiddenLaunch],
    guards: Callable[[], tuple[str, ...]] | None,
) -> tuple[Callable[..., Any], bytes]:
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config
    from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache
    from torch._inductor import standalone_compile
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    options: dict[str, Any] = {"unsafe_marked_cacheable_functions": cacheable}
    if threads is not None:
        options["compile_threads"] = threads
    with (
        functorch_config.patch(
            force_non_lazy_backward_lowering=True,
            bundled_autograd_cache=True,
            strict_autograd_cache=True,
            autograd_cache_allow_custom_autograd_functions=True,
        ),
        inductor_config.patch(options),
        _libraries_used() as used,
    ):
        if threads is not None and threads > 1:
            _wait_for_compile_processes()
        try:
            source: Any = "from_example_inputs" if guards is None else "from_graph"
            artifact = standalone_compile(module, list(inputs), dynamic_shapes=source, aot=True)
        except BypassAOTAutogradCache as error:
            raise Uncacheable(str(error)) from error
        serialized = artifact.serialize()  # type: ignore[attr-defined]
        # Inductor leaves the backward's C++ to be built when it is first loaded: build it here, not where it is loaded.
        with _remembered_code({}) as code:
            kernel = AOTCompiledArtifact.deserialize(serialized)
        needs = None if guards is None else guards()
        return _with_guards(kernel, needs), pack(Artifact(serialized, used(), list(hidden), code, needs))


def _wait_for_compile_processes() -> None:
    """Start Inductor's processes and wait for them: until they are up it compiles one thing after the other.

    Where they do not come up in time, it goes on doing that.
    """
    from torch._inductor.async_compile import AsyncCompile

    if not AsyncCompile.use_process_pool():
        ready = AsyncCompile._ready_future
        if ready is not None:
            wait([ready], timeout=120)


def load_graph(data: bytes) -> Callable[..., Any]:
    """Load what :func:`compile_graph` serialised, in any process of a machine of the same kind. Executes code."""
    import torch._inductor.config as inductor_config
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    artifact = unpack(data)
    folder = cache_dir()
    for name, content in artifact.libraries.items():
        path = os.path.join(folder, name)
        if not holds(path, content):  # whatever else lies there would be loaded unverified
            write_atomic(path, content)
    if artifact.hidden:
        importlib.import_module("esper_fx.ops.low_rank_rows")  # defines the operators that hide them
    for launch in artifact.hidden:
        try:
            compile_hidden(launch)
        except Exception as error:  # then its first launch compiles it, or says what is wrong
            logger.warning("%s is not compiled ahead of its first launch: %s", launch.kernel, error)
    # The libraries were built where they came from: nothing is compiled here, and the vector instructions are known good.
    with (
        _no_precompiled_header(),
        _remembered_code(artifact.code),
        _only_to_run(),
        inductor_config.patch({"cpp.vec_isa_ok": True}),
    ):
        return _with_guards(AOTCompiledArtifact.deserialize(artifact.serialized), artifact.guards)


class GuardedKernel:
    """A kernel for sizes that vary.

    Attributes:
        guards: What has to be true of its integer inputs, `n0`, `n1` and so on in order, for it to be right.
    """

    def __init__(self, kernel: Callable[..., Any], guards: tuple[str, ...]) -> None:
        self._kernel = kernel
        self.guards = guards

    def __call__(self, *values: Any) -> Any:
        """Run it."""
        return self._kernel(*values)


def _with_guards(kernel: Callable[..., Any], guards: tuple[str, ...] | None) -> Callable[..., Any]:
    return kernel if guards is None else GuardedKernel(kernel, guards)


@contextlib.contextmanager
def _remembered_code(code: Code) -> Iterator[Code]:
    """Let PyTorch find the Python that it has generated compiled already, and add to ``code`` what is not there."""

    def remembering(source: str, path: str, *args: Any, **kwargs: Any) -> types.CodeType:
        kwargs.setdefault("dont_inherit", True)  # the future that this file imports from
        address = hashlib.sha256(repr((source, args, sorted(kwargs.items()))).encode()).digest()
        if address not in code:
            code[address] = compile(source, path, *args, **kwargs)
        return relocated(code[address], path)

    with contextlib.ExitStack() as stack:
        for name in ("torch._inductor.runtime.compile_tasks", "torch._functorch._aot_autograd.subclass_codegen"):
            if importlib.util.find_spec(name) is not None:
                stack.enter_context(_replaced(importlib.import_module(name), "compile", remembering))
        yield code


def _only_to_run() -> contextlib.AbstractContextManager[None]:
    """Keep PyTorch from copying all that this thread loads, for the case that it should be serialised again."""
    from torch._functorch._aot_autograd.aot_autograd_result import BundledAOTAutogradResult

    loading = threading.get_ident()

    def copied(self: Any, memo: dict[int, Any]) -> Any:
        if threading.get_ident() == loading:
            return None
        twin = copy.copy(self)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    return _replaced(BundledAOTAutogradResult, "__deepcopy__", copied)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object, for a while and to one thread at a time, another attribute."""
    with _GRAPH_LOCK:
        own = vars(owner).get(name)
        setattr(owner, name, value)
        try:
            yield
        finally:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


@contextlib.contextmanager
def _libraries_used() -> Iterator[Callable[[], dict[str, bytes]]]:
    """Collect the C++ libraries that Inductor builds or reuses meanwhile, by their path in Inductor's cache folder."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with _GRAPH_LOCK:
        outer = CppPythonBindingsCodeCache.cache
        mine: dict[str, Any] = {}
        CppPythonBindingsCodeCache.cache = mine

        def collect() -> dict[str, bytes]:
            files = {}
            for key in mine:
                name = os.path.join(key[1:3], f"{key}.main.so")
                path = os.path.join(cache_dir(), name)
                if os.path.exists(path):
                    with open(path, "rb") as file:
                        files[name] = file.read()
            return files

        try:
            yield collect
        finally:
            CppPythonBindingsCodeCache.cache = {**outer, **mine}


def _no_precompiled_header() -> contextlib.AbstractContextManager[None]:
    """Keep Inductor from precompiling a header before it looks whether the library is there already."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Libraries

    return _replaced(Libraries, "_get_uncompiled_header", classmethod(lambda cls, device: None))


def warm_inductor() -> None:
    """Import what loading a kernel needs, so that no step has to."""
    import torch._functorch._aot_autograd.autograd_cache
    import torch._inductor.compile_fx
    import torch._inductor.standalone_compile  # noqa: F401


def cpp_compiler() -> str:
    """Path or name of the C++ compiler that Inductor uses; raises RuntimeError where there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return str(get_cpp_compiler())
    except Exception as error:
        raise RuntimeError(f"no C++ compiler found: {error}") from error
