"""esper::low_rank: y = x + alpha * act(x̃ A) B, a residual of low rank as one operator.

x̃ is x to the forward pass; to the backward pass the gradient through the body into x is multiplied by the gate. Where alpha
is 0, y is x and the gradients of A, B and alpha are 0, whatever A and B hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from esper_fx._torch import triton_op
from esper_fx.kernels.launch import HiddenLaunch, runs_kernels
from esper_fx.kernels.rows import rows_of
from esper_fx.ops import low_rank_rows  # noqa: F401  # defines operators that this one calls
from esper_fx.ops.site_stats import FIELDS as STATS_FIELDS
from esper_fx.ops.site_stats import reference as reference_stats

#: Largest rank that the kernels take: beyond it a tile of hidden values no longer fits the registers.
MAX_RANK = 64


@triton_op("esper::low_rank")
def low_rank(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: Tensor,
    gate: Tensor,
    activation: str = "identity",
    dim: int = -1,
    config: int = 0,
    save: bool = True,
) -> tuple[Tensor, Tensor]:
    """Add a low-rank residual to ``x``.

    Args:
        x: Value at the site, any shape, floating.
        down: A, ``[d, r]``, where ``d`` is the size of ``x`` in dimension ``dim``; products are taken in its dtype.
        up: B, ``[r, d]``, of the same dtype.
        alpha: Factor on the residual, 0-dim float32.
        gate: Factor on the gradient that flows into ``x`` through the residual, 0-dim float32.
        activation: Between the two products: ``identity``, ``relu``, ``gelu`` (by erf) or ``silu``.
        dim: The dimension of ``x`` that holds features.
        config: Number of the configuration; see ``esper_fx.kernels.low_rank.CONFIGS`` and, for the numbers beyond these,
            ``esper_fx.kernels.low_rank_rows.CONFIGS``.
        save: Keep what the backward pass needs.

    Returns:
        y like ``x``; and for the backward pass ``x A`` before the activation, ``[rows, r]``, empty unless ``save``.
    """
    if _runs_kernels(x, down):
        from esper_fx.kernels import low_rank as kernels

        return kernels.forward(x, down, up, alpha, activation, dim, config, save)[:2]
    return _reference(x, down, up, alpha, activation, dim, save)


@triton_op("esper::low_rank_stats")
def low_rank_stats(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: Tensor,
    gate: Tensor,
    activation: str = "identity",
    dim: int = -1,
    config: int = 0,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`low_rank`, and what :func:`esper_fx.ops.site_stats.site_stats` says of ``x``, in the same read of it."""
    if _runs_kernels(x, down):
        from esper_fx.kernels import low_rank as kernels
        from esper_fx.kernels.moments import merge_partials

        y, hidden, partials = kernels.forward(x, down, up, alpha, activation, dim, config, save, stats=True)
        return y, hidden, merge_partials(partials, x.numel())
    return *_reference(x, down, up, alpha, activation, dim, save), reference_stats(x)


def hidden_launches(graph: fx.Graph) -> list[HiddenLaunch]:
    """What calls of :func:`low_rank` in a graph, annotated with example values, will compile that Inductor does not see."""
    from esper_fx.kernels import low_rank_rows as kernels
    from esper_fx.kernels.low_rank import CONFIGS

    found: list[HiddenLaunch] = []
    for node in graph.find_nodes(op="call_function", target=torch.ops.esper.low_rank.default):
        arguments = {argument.name: argument.default_value for argument in node.target._schema.arguments}
        arguments |= dict(zip(arguments, node.args, strict=False)) | node.kwargs
        config = arguments["config"] - len(CONFIGS)
        if config < 0:
            continue
        x, down = (arguments[name].meta["example_value"] for name in ("x", "down"))
        for backward in (False, True)[: 1 + arguments["save"]]:
            values = (x, down.shape[1], arguments["activation"], config)
            found.append(kernels.hidden(*values, backward=backward, save=arguments["save"]))
    return found


def _runs_kernels(x: Tensor, down: Tensor) -> bool:
    """Not beyond the largest rank, nor where products are taken in float64."""
    return runs_kernels(x) and down.dtype != torch.float64 and down.shape[1] <= MAX_RANK


def _reference(
    x: Tensor, down: Tensor, up: Tensor, alpha: Tensor, activation: str, dim: int, save: bool
) -> tuple[Tensor, Tensor]:
    features = x.movedim(dim, -1)
    hidden = features.to(down.dtype) @ down
    delta = (_activate(hidden, activation) @ up).movedim(-1, dim)
    y = torch.where(alpha == 0, x, x + alpha * delta)
    kept = hidden.reshape(-1, down.shape[1]) if save else hidden.new_empty((0, down.shape[1]))
    return y.to(x.dtype), kept.clone()


@triton_op("esper::low_rank_backward")
def low_rank_backward(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: Tensor,
    gate: Tensor,
    activation: str,
    dim: int,
    config: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``down``, ``up`` and ``alpha`` of :func:`low_rank`.

    Args:
        grad: Gradient of y, like ``x``.
        hidden: The second result of :func:`low_rank`.

    The other arguments are those of :func:`low_rank`.
    """
    if _runs_kernels(x, down):
        from esper_fx.kernels import low_rank as kernels

        return kernels.backward(grad, x, hidden, down, up, alpha, gate, activation, dim, config)
    g = grad.movedim(dim, -1).reshape(-1, x.shape[dim])
    rows = x.movedim(dim, -1).reshape(-1, x.shape[dim]).to(down.dtype)
    silent = alpha == 0
    zero = torch.zeros((), dtype=down.dtype, device=x.device)
    back = g.to(down.dtype) @ up.t()
    active = _activate(hidden, activation)
    dhidden = torch.where(silent, zero, (alpha * back * _activate_grad(hidden, activation)).to(down.dtype))
    ddown = torch.where(silent, zero, rows.t() @ dhidden)
    dup = torch.where(silent, zero, (alpha * (active.t() @ g.to(down.dtype))).to(up.dtype))
    dalpha = torch.where(silent, 0.0, (active * back).to(alpha.dtype).sum())
    shape = x.movedim(dim, -1).shape
    through = (dhidden @ down.t()).reshape(shape).movedim(-1, dim)
    dx = torch.where(silent | (gate == 0), grad, grad + gate * through)
    return dx.to(x.dtype), ddown, dup, dalpha


@low_rank.register_fake
def _low_rank_fake(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: Tensor,
    gate: Tensor,
    activation: str = "identity",
    dim: int = -1,
    config: int = 0,
    save: bool = True,
) -> tuple[Tensor, Tensor]:
    rows = rows_of(x, dim)
    return torch.empty_like(rows.tensor), down.new_empty((rows.count if save else 0, down.shape[1]))


@low_rank_stats.register_fake
def _low_rank_stats_fake(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: Tensor,
    gate: Tensor,
    activation: str = "identity",
    dim: int = -1,
    config: int = 0,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    y, hidden = _low_rank_fake(x, down, up, alpha, gate, activation, dim, config, save)
    return y, hidden, x.new_empty(len(STATS_FIELDS), dtype=torch.float64)


@low_rank_backward.register_fake
def _low_rank_backward_fake(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    alpha: Tensor,
    gate: Tensor,
    activation: str,
    dim: int,
    config: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ddown, dup = down.new_empty(down.shape[::-1]).t(), up.new_empty(up.shape[::-1]).t()
    return torch.empty_like(rows_of(x, dim).tensor), ddown, dup, torch.empty_like(alpha)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, down, up, alpha, gate, *ctx.options, save = inputs
    if not save:
        raise RuntimeError("esper::low_rank was called with save=False, but a gradient is asked for; pass save=True")
    ctx.save_for_backward(x, output[1], down, up, alpha, gate)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = low_rank_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*gradients, None, None, None, None, None)


low_rank.register_autograd(_backward, setup_context=_setup_context)
low_rank_stats.register_autograd(_backward, setup_context=_setup_context)


def _activate(x: Tensor, activation: str) -> Tensor:
    return x if activation == "identity" else _FUNCTIONS[activation](x)


def _activate_grad(x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return (x > 0).to(x.dtype)
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * 0.3989422804014327
    if activation == "silu":
        return torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x)))
    return torch.ones_like(x)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}
