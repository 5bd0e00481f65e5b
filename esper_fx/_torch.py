"""Every private PyTorch API that esper_fx touches, in one place. Run on torch 2.11, 2.13, 2.14 and 2.15."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import inspect
import logging
import os
import platform
import re
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from esper_fx import flags
from esper_fx.artifact import Artifact, Code, holds, pack, relocated, unpack, write_atomic
from esper_fx.cache._background import ForkSafeLock
from esper_fx.kernels.launch import HiddenLaunch, compile_hidden

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

__all__ = [
    "CHANNEL_FIRST_LAYERS",
    "CPU_ATTENTION",
    "FUNCTION_HOLDERS",
    "PRESERVED_ATTRIBUTES",
    "SET_GRAD_ENABLED",
    "DataDependentOutputException",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "pytree",
    "quiet_fakes",
    "storage_id",
    "triton_op",
    "uncompiled",
]

#: What a graph holds where the grad mode is switched.
SET_GRAD_ENABLED = torch._C._set_grad_enabled

#: The fused attention that CPU tensors take.
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

#: Modules that hold PyTorch's functions, the public ones first.
FUNCTION_HOLDERS = (
    "torch.nn.functional",
    "torch",
    "torch.linalg",
    "torch.fft",
    "torch.special",
    "torch.nn.init",
    "torch._C._nn",
    "torch._C._fft",
    "torch._C._linalg",
    "torch._C._special",
    "torch._C",
    "operator",
    "math",
)

#: Layers whose output has its features in dimension 1.
CHANNEL_FIRST_LAYERS: tuple[type[nn.Module], ...] = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
)


HOOKS: frozenset[str] = frozenset(name for name in vars(nn.Module()) if "hooks" in name)
"""The attributes in which modules keep hooks; code that runs in a forward leaves them alone."""


def storage_id(tensor: torch.Tensor) -> int:
    """What tells the memory of tensors apart while they live, also of tensors without data.

    What a transform of torch.func wraps around a tensor shares its memory. Any other tensor without memory stands for itself.
    """
    inner = tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(inner):
        inner = torch._C._functorch.get_unwrapped(inner)
    try:
        return int(inner.untyped_storage()._cdata)
    except NotImplementedError:
        return id(tensor)


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Keep fake tensors from logging an error for what their caller expects and handles."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def uncompiled(module: Any) -> Any:
    """The module that `torch.compile` was given, or the module itself where it was not compiled."""
    return getattr(module, "_orig_mod", module)


#: Where a GraphModule's `meta` names the plain attributes that a deep copy keeps.
PRESERVED_ATTRIBUTES = "_user_preserved_attributes"


def triton_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.triton_op` for an operator that changes no argument; says nothing where there is no triton.

    The operator is decomposed where a graph is functionalised, so that Inductor sees the kernels in it, or the ATen
    operators where the tensors are on a device without them.
    """

    def define(function: Callable[..., Any]) -> Any:
        log = logging.getLogger("torch._library.triton")
        disabled, log.disabled = log.disabled, True
        try:
            return torch.library.triton_op(name, function, mutates_args=())
        finally:
            log.disabled = disabled

    return define


BACKEND_NAME = "esper"

_GRAPH_LOCK = ForkSafeLock()


# Modules


def load_in_progress() -> tuple[bool, dict[str, Any] | None]:
    """``strict`` and the metadata of the ``load_state_dict`` that is under way on this thread.

    A module's hook is told neither: PyTorch hands every one ``strict=True`` and the metadata of its own module. Where that
    cannot be found out, ``strict`` is True and the metadata None.
    """
    code = inspect.unwrap(nn.Module.load_state_dict).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return True, None
    metadata = frame.f_locals.get("metadata")
    if metadata is not None:  # PyTorch notes assign=True in it, for good
        metadata = {
            path: {key: value for key, value in entry.items() if key != "assign_to_params_buffers"}
            for path, entry in metadata.items()
        }
    return bool(frame.f_locals.get("strict", True)), metadata


# Dynamo


@torch.compiler.assume_constant_result
def compiling_for_esper() -> bool:
    """Whether Dynamo is tracing for the esper backend right now; evaluated once, while tracing."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    for _ in range(8):
        if getattr(backend, "esper_backend", False) or backend == BACKEND_NAME:
            return True
        inner = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None)
        if inner is None or inner is backend:
            return False
        backend = inner
    return False


def is_recompile() -> bool:
    """Whether Dynamo compiles a frame now that it has compiled before."""
    from torch._guards import CompileContext

    compile_id = CompileContext.current_compile_id()
    return compile_id is not None and bool(compile_id.frame_compile_id)


# Inductor


class Uncacheable(Exception):
    """A graph holds something that cannot be serialised."""


def compile_graph(
    module: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    cacheable: dict[str, str],
    *,
    threads: int | None = None,
    hidden: Sequence[HiddenLaunch] = (),
) -> tuple[Callable[..., Any], bytes]:
    """Compile a graph with Inductor, forward and backward, and return the callable and its serialised form.

    Args:
        module: PyTorch functions and methods only; every node annotated with ``meta["example_value"]``.
        inputs: Example inputs whose shape, stride, dtype, device and requires_grad are compiled for.
        cacheable: Qualified names of functions of ours in the graph, with a digest of their source.
        threads: Number of compilations at once, by processes beside this one; None leaves Inductor's setting.
        hidden: What launches within operators will compile, for whoever loads the serialised form.

    Raises:
        Uncacheable: Compilation is possible but not serialisation.
    """
    return _without_broken_libraries(partial(_compile_graph, module, inputs, cacheable, threads, hidden))


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
            artifact = standalone_compile(module, list(inputs), dynamic_shapes="from_example_inputs", aot=True)
        except BypassAOTAutogradCache as error:
            raise Uncacheable(str(error)) from error
        serialized = artifact.serialize()  # type: ignore[attr-defined]
        # Inductor leaves the backward's C++ to be built when it is first loaded: build it here, not where it is loaded.
        with _remembered_code({}) as code:
            kernel = AOTCompiledArtifact.deserialize(serialized)
        return kernel, pack(Artifact(serialized, used(), list(hidden), code))


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
        return AOTCompiledArtifact.deserialize(artifact.serialized)


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


def is_kernel_call(target: Any) -> bool:
    """Whether a node's target is how Dynamo calls a Triton kernel of the user's own."""
    return isinstance(target, HigherOrderOperator) and target.name().startswith("triton_kernel_wrapper_")


def kernel_side_table() -> Any:
    """Where Dynamo keeps Triton kernels and those of their arguments that a graph cannot hold, by number."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    return kernel_side_table


def may_be_repeated() -> bool:
    """Whether a forward pass is repeated, by checkpointing in the backward pass, or may be: hooks take what it saves."""
    return in_backward() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def saved_tensors_kept() -> contextlib.AbstractContextManager[Any]:
    """Keep what is computed meanwhile, on stand-ins for tensors, from hooks on saved tensors, such as checkpointing's."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return contextlib.nullcontext() if hooks is None else torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(tensor: Any) -> Any:
    return tensor


def is_owned(tensor: Tensor) -> bool:
    """Whether Dynamo has found a tensor in a module, as its parameter or buffer."""
    return isinstance(tensor, nn.Parameter) or hasattr(tensor, "_dynamo_static_input_type")


def in_transform() -> bool:
    """Whether the calling thread is within a transform of torch.func, such as grad or vmap."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def in_backward() -> bool:
    """Whether the calling thread is in the middle of a backward pass."""
    return bool(torch._C._current_graph_task_id() != -1)


def cpp_compiler() -> str:
    """Path or name of the C++ compiler that Inductor uses; raises RuntimeError where there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return str(get_cpp_compiler())
    except Exception as error:
        raise RuntimeError(f"no C++ compiler found: {error}") from error


def compile_environment() -> dict[str, str]:
    """What compiled code depends on besides the graph: versions, processor, accelerator and PyTorch's global flags.

    And where PyTorch lies: Inductor finds a C++ library by a compiler command that names the folder. From another one it would
    be built anew while it is loaded, in the process that trains.
    """
    device = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "triton": _version_of("triton"),
        "folder": os.path.dirname(torch.__file__),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()} {_processor()}",
        "gpu": "" if device is None else f"{device.name} {device.major}.{device.minor}",
        **flags.current(),
    }


#: What identifies a processor in /proc/cpuinfo, on x86 and on Arm.
_PROCESSOR_LINES = ("model name", "flags", "CPU implementer", "CPU part", "CPU variant", "Features")


@cache
def _processor() -> str:
    """A digest of what the system says of the processor: C++ is compiled for exactly this one."""
    described = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        first = file.read().split("\n\n", 1)[0].splitlines()
        described = "\n".join(line for line in first if line.split("\t")[0].strip() in _PROCESSOR_LINES)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def inductor_settings() -> dict[str, Any]:
    """The user's Inductor configuration: whatever differs in it gives other code. Only what can be sent to a worker."""
    import torch._inductor.config as inductor_config

    settings = inductor_config.save_config_portable()
    for name in ("compile_threads", "worker_start_method", "unsafe_marked_cacheable_functions"):
        settings.pop(name, None)
    return {name: value for name, value in sorted(settings.items()) if _is_plain(value)}


def inductor_patch(settings: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Apply settings from another process to Inductor here."""
    import torch._inductor.config as inductor_config

    known = {
        name: value for name, value in settings.items() if inductor_config.save_config_portable().get(name) != value
    }
    return inductor_config.patch(known) if known else contextlib.nullcontext()


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _version_of(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
