"""Dynamo: for whom it traces, and the kernels that its graphs call."""

from __future__ import annotations

from typing import Any

import torch

from esper_fx._torch.names import HigherOrderOperator

BACKEND_NAME = "esper"


@torch.compiler.assume_constant_result
def compiling_for_esper() -> bool:
    """Whether Dynamo is tracing for the esper backend right now; evaluated once, while tracing."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    for _ in range(8):
        if getattr(backend, "esper_backend", False) or backend == BACKEND_NAME:
            return True
        inner = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None)
        if inner is None:  # within DistributedDataParallel: a method of what cuts the graph at its buckets
            inner = getattr(getattr(backend, "__self__", None), "backend_compile_fn", None)
        if inner is None or inner is backend:
            return False
        backend = inner
    return False


def is_recompile() -> bool:
    """Whether Dynamo compiles a frame now that it has compiled before."""
    from torch._guards import CompileContext

    compile_id = CompileContext.current_compile_id()
    return compile_id is not None and bool(compile_id.frame_compile_id)


def is_kernel_call(target: Any) -> bool:
    """Whether a node's target is how Dynamo calls a Triton kernel of the user's own."""
    return isinstance(target, HigherOrderOperator) and target.name().startswith("triton_kernel_wrapper_")


def kernel_side_table() -> Any:
    """Where Dynamo keeps Triton kernels and those of their arguments that a graph cannot hold, by number."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    return kernel_side_table
