"""The operator esper::seed and the arithmetic of a seed, as plain PyTorch.

A seed computes (DESIGN: select, never multiply)

    x̃ = gate · x + (1 - gate) · stop_gradient(x)
    y = x + alpha · body(x̃)

with y = x exactly where alpha is 0, whatever the body returned, and no gradient into x through the body where gate or
alpha is 0.

A body may read the *source* of the value instead, which is the input of the module whose output x is (LoRA does): then

    x̃ = gate · source + (1 - gate) · stop_gradient(source)

and what is said of gradients into x through the body holds for the source.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from esper_fx._torch import FakeTensor


class _ScaleGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        (grad,) = grads
        return torch.where(scale == 0, torch.zeros((), dtype=grad.dtype, device=grad.device), grad * scale), None


def seed_input(x: Tensor, alpha: Tensor, gate: Tensor) -> Tensor:
    """Return ``x`` unchanged; its gradient is multiplied by ``gate``, and zero (not NaN) where gate or alpha is 0.

    Args:
        x: Value at the site, any shape, floating.
        alpha: 0-dim float32.
        gate: 0-dim float32.
    """
    result: Tensor = _ScaleGradient.apply(x, torch.where(alpha == 0, alpha, gate))  # type: ignore[no-untyped-call]
    return result


def seed_output(x: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    """Return ``x + alpha * delta``, and exactly ``x`` where alpha is 0 even if ``delta`` is not finite.

    Args:
        x: Value at the site, any shape, floating.
        delta: What the seed's body returned, same shape and dtype as ``x``.
        alpha: 0-dim float32; does not take part in type promotion.
    """
    return torch.where(alpha == 0, x, x + alpha * delta)


def reads_source(body: object) -> bool:
    """Whether a body reads the input of the module at its site instead of the value at its site.

    A body says so with an attribute ``reads_source`` that is true.
    """
    return bool(getattr(body, "reads_source", False))


def seed_forward(
    x: Tensor, body: Callable[[Tensor], Tensor], alpha: Tensor, gate: Tensor, source: Tensor | None = None
) -> Tensor:
    """What a live seed computes, eagerly.

    Args:
        x: Value at the site, any shape, floating.
        body: Maps ``x``, or ``source`` where it says that it reads that, to a delta of the shape and dtype of ``x``.
        alpha: 0-dim float32.
        gate: 0-dim float32; alpha and gate may be on another device than ``x``.
        source: Input of the module whose output ``x`` is, where that is known.

    Raises:
        RuntimeError: The body reads the source, and there is none.
    """
    value = x
    if reads_source(body):
        if source is None:
            raise RuntimeError(
                f"{type(body).__name__} reads the input of the module at its site, but none was handed over"
            )
        value = source
    alpha, gate = alpha.to(x.device, non_blocking=True), gate.to(x.device, non_blocking=True)
    return seed_output(x, body(seed_input(value, alpha, gate)), alpha)


class SeedHost(Protocol):
    """What ``esper::seed`` needs of the model it belongs to, to run without a compiled kernel."""

    def run_seed(self, site: int, x: Tensor, alpha: Tensor, gate: Tensor, source: Tensor | None = None) -> Tensor:
        """Run the seed of the site with this index on ``x``, the output of a module whose input is ``source``."""


hosts: weakref.WeakValueDictionary[int, SeedHost] = weakref.WeakValueDictionary()

_library = torch.library.Library("esper", "DEF")
_library.define(
    "seed(Tensor x, Tensor alpha, Tensor gate, int model, int site, bool training, Tensor? source=None) -> Tensor"
)


def _seed_eager(
    x: Tensor, alpha: Tensor, gate: Tensor, model: int, site: int, training: bool, source: Tensor | None = None
) -> Tensor:
    if isinstance(x, FakeTensor) or x.is_meta:
        return x.clone()  # no leaf, or else Dynamo would refuse to change it in place
    host = hosts.get(model)
    if host is None:
        raise RuntimeError(f"esper::seed was called for model {model}, which no longer exists")
    return host.run_seed(site, x, alpha, gate, source)


for _key in ("Autograd", "CompositeExplicitAutograd"):
    _library.impl("seed", _seed_eager, _key)


@torch.library.register_fake("esper::seed", lib=_library)
def _seed_fake(
    x: Tensor, alpha: Tensor, gate: Tensor, model: int, site: int, training: bool, source: Tensor | None = None
) -> Tensor:
    return torch.empty_like(x)
