"""The torch.compile backend "esper"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from esper_fx import _torch
from esper_fx.engine.program import Program
from esper_fx.errors import ArgumentError


def esper(module: fx.GraphModule, example_inputs: list[Any], **options: Any) -> Callable[..., Any]:
    """Compile a Dynamo graph; found by ``torch.compile(model, backend="esper")``.

    The graph is compiled when it is first called, for the sizes it is called with.

    Args:
        module: The graph; a seed is the operator ``esper::seed`` in it.
        example_inputs: Not used: the first call has the real ones.
        **options: None are known yet.

    Raises:
        ArgumentError: An option was given; a TypeError.
    """
    if options:
        raise ArgumentError(
            f"backend 'esper' takes no options, but was given {sorted(options)}; use esper_fx.configure(...)"
        )
    program = Program(module)
    for growth in program.growths:
        growth.changes.recompiles += int(_torch.is_recompile())
    return program


esper.esper_backend = True  # type: ignore[attr-defined]
