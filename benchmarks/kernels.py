"""Fused kernels on a GPU against eager, torch.compile and its max-autotune mode, and against copying the same bytes."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import Turn, interleave, require_gpu
from benchmarks.harness import quantiles
from benchmarks.options import Options
from benchmarks.report import Bar, Report, Row
from esper_fx import ops
from esper_fx.kernels.build import end_with_parent

SHAPES = ((8192, 1024), (8192, 4096), (32768, 768))
RANKS = (8, 16, 64)
FORWARD, BACKWARD = Bar(at_most=1 / 1.3, aim=1 / 1.8), Bar(at_most=1 / 1.2)
NEVER_SLOWER = Bar(at_most=1.0)
COPY, STATS_COPY = Bar(at_most=1 / 0.70, aim=1 / 0.85), Bar(at_most=1 / 0.85, aim=1 / 0.95)
STATS_INSIDE = Bar(at_most=1.03, aim=1.0)
COPIED = (8192, 4096)
INDUCTOR = {"compile": "default", "max-autotune": "max-autotune-no-cudagraphs"}

Function = Callable[..., Tensor]


def run(options: Options) -> Report:
    """bfloat16, three shapes and three ranks; every figure is a ratio of times, ours above: smaller is better."""
    require_gpu()
    report = Report("kernels")
    rounds = 30 if options.quick else 100
    shapes, ranks = SHAPES[: 1 if options.quick else None], RANKS[: 1 if options.quick else None]
    _compile_ahead([(*shape, rank) for shape in shapes for rank in ranks])
    for rows, width in shapes:
        for rank in ranks:
            _low_rank(report, rows, width, rank, rounds, options.seed)
        _site_stats(report, rows, width, rounds, options.seed)
    for name, shape in (("channel_gate", (64, 512, 28, 28)), ("depthwise_conv", (64, 512, 28, 28))):
        _maps(report, name, shape, rounds, options.seed)
    return report


def _compile_ahead(cases: list[tuple[int, int, int]]) -> None:
    """Let other processes put into PyTorch's and Triton's caches what `_low_rank` compiles: minutes, one after the other.

    Not what max-autotune compiles: it times its candidates, and nothing else must run meanwhile.
    """
    jobs = [(*case, config) for case in cases for config in range(_operator("low_rank")[1].CONFIG_COUNT)]
    processes = max(1, (os.cpu_count() or 1) // 2)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        list(pool.map(_compile_one, jobs))


def _compile_one(job: tuple[int, int, int, int]) -> None:
    rows, width, rank, config = job
    torch.compiler.reset()
    leaves = _low_rank_leaves(rows, width, rank, 0)
    if _fits(leaves, config):
        for part in _turn(_compiled(_low_rank_fused(config, _scalar(0.5), _scalar(1.0))), leaves):
            part()
        torch.cuda.synchronize()


def _low_rank_leaves(rows: int, width: int, rank: int, seed: int) -> list[Tensor]:
    """x, and the weights of two linear layers, as they are."""
    return [_random((rows, width), seed), _random((rank, width), seed + 1), _random((width, rank), seed + 2)]


def _low_rank_fused(config: int, alpha: Tensor, gate: Tensor) -> Function:
    operator, _ = _operator("low_rank")
    return lambda x, down, up: operator(x, down.t(), up.t(), alpha, gate, "identity", -1, config)[0]


def _low_rank(report: Report, rows: int, width: int, rank: int, rounds: int, seed: int) -> None:
    torch.compiler.reset()  # a function is compiled anew for every configuration, up to a limit
    operator, kernels = _operator("low_rank")
    alpha, gate = _scalar(0.5), _scalar(1.0)
    leaves = _low_rank_leaves(rows, width, rank, seed)
    name = f"low_rank {rows}x{width}, rank {rank}"

    def eager(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return ops.seed_forward(x, lambda value: (value @ down.t()) @ up.t(), alpha, gate)

    sides = _reference_sides(eager, leaves)
    for config in range(kernels.CONFIG_COUNT):
        if _fits(leaves, config):
            sides[f"fused {config}"] = _turn(_compiled(_low_rank_fused(config, alpha, gate)), leaves)
    forward, backward = interleave(sides, rounds=rounds, seed=seed)
    both = {side: [a + b for a, b in zip(forward.seconds[side], backward.seconds[side], strict=True)] for side in sides}
    best = min((side for side in sides if side.startswith("fused")), key=lambda side: quantiles(both[side]).p50)
    copied = (rows, width) == COPIED
    for part, samples, bar in (("forward", forward, FORWARD), ("backward", backward, BACKWARD)):
        for other in ("max-autotune", "compile", "eager"):
            ratio = samples.ratio(best, other)
            wanted = bar if other == "max-autotune" else NEVER_SLOWER if other == "compile" else None
            note = f"{best}: {samples.side(best).p50 * 1e6:.0f} µs; {other} {samples.side(other).p50 * 1e6:.0f} µs"
            report.add(Row(f"{name}: {part}, fused / {other}", ratio.p50, "×", wanted, ratio, note))
    ratio = forward.ratio(best, "copy")
    note = f"copying x takes {forward.side('copy').p50 * 1e6:.0f} µs"
    report.add(Row(f"{name}: forward / copying x", ratio.p50, "×", COPY if copied else None, ratio, note))
    tiled = [f"fused {config}" for config in range(len(kernels.CONFIGS))]  # the others take no statistics
    config = int(min(tiled, key=lambda side: forward.side(side).p50).removeprefix("fused "))
    arguments = (leaves[0].detach(), leaves[1].t(), leaves[2].t(), alpha, gate, "identity", -1, config, False)
    inside = {
        "with": [lambda: torch.ops.esper.low_rank_stats(*arguments)],
        "without": [lambda: operator(*arguments)],
    }
    with torch.no_grad():
        (samples,) = interleave(inside, rounds=rounds, seed=seed)
    ratio = samples.ratio("with", "without")
    report.add(Row(f"{name}: statistics inside / without", ratio.p50, "×", STATS_INSIDE, ratio))
    report.raw[name] = {"forward_s": forward.seconds, "backward_s": backward.seconds, "best": best}


def _fits(leaves: list[Tensor], config: int) -> bool:
    """Whether a kernel takes these in this configuration; the one that keeps rows on the chip does not always."""
    from esper_fx.kernels import low_rank_rows

    tiled = len(_operator("low_rank")[1].CONFIGS)
    if config < tiled:
        return True
    x, down, up = leaves
    try:
        low_rank_rows.check(x, down.t(), up.t(), -1, config - tiled)
    except ValueError:
        return False
    return True


def _site_stats(report: Report, rows: int, width: int, rounds: int, seed: int) -> None:
    operator, kernels = _operator("site_stats")
    x = _random((rows, width), seed).detach()
    target = torch.empty_like(x)
    sides: dict[str, Turn] = {
        f"fused {config}": [lambda config=config: operator(x, config)] for config in range(len(kernels.CONFIGS))
    }
    sides["copy"] = [lambda: target.copy_(x)]
    (samples,) = interleave(sides, rounds=rounds, seed=seed)
    best = min((side for side in sides if side != "copy"), key=lambda side: samples.side(side).p50)
    # A copy moves every byte twice, statistics read it once: at equal bandwidth they take half as long.
    ratio = samples.ratio(best, "copy").scaled(2.0)
    note = f"{best}: {samples.side(best).p50 * 1e6:.0f} µs, copy {samples.side('copy').p50 * 1e6:.0f} µs"
    report.add(Row(f"site_stats {rows}x{width}: time a byte / a copy's", ratio.p50, "×", STATS_COPY, ratio, note))
    report.raw[f"site_stats {rows}x{width}"] = samples.seconds


def _maps(report: Report, name: str, shape: tuple[int, ...], rounds: int, seed: int) -> None:
    torch.compiler.reset()
    operator, kernels = _operator(name)
    channels, alpha, gate = shape[1], _scalar(0.5), _scalar(1.0)
    if name == "depthwise_conv":
        sizes: tuple[tuple[int, ...], ...] = ((channels, 1, 3, 3), (channels,))
    else:
        hidden = channels // 16
        sizes = ((hidden, channels), (hidden,), (channels, hidden), (channels,))
    leaves = [_random(shape, seed), *(_random(size, seed + 1 + i) for i, size in enumerate(sizes))]

    def body(x: Tensor, *weights: Tensor) -> Tensor:
        if name == "depthwise_conv":
            return torch.nn.functional.conv2d(x, *weights, padding="same", groups=channels)
        down, down_bias, up, up_bias = weights
        hidden = torch.relu(torch.nn.functional.linear(x.mean((2, 3)), down, down_bias))
        scale = torch.tanh(torch.nn.functional.linear(hidden, up, up_bias) * 0.5)
        return x * scale[:, :, None, None]

    def eager(x: Tensor, *weights: Tensor) -> Tensor:
        return ops.seed_forward(x, lambda value: body(value, *weights), alpha, gate)

    def fused(config: int) -> Function:
        def call(x: Tensor, *weights: Tensor) -> Tensor:
            result: Any = operator(x, *weights, alpha, gate, config=config)
            y: Tensor = result[0] if isinstance(result, tuple) else result
            return y

        return call

    sides = _reference_sides(eager, leaves)
    for config in range(len(kernels.CONFIGS)):
        sides[f"fused {config}"] = _turn(_compiled(fused(config)), leaves)
    parts = interleave(sides, rounds=rounds, seed=seed)
    for part, samples in zip(("forward", "backward"), parts, strict=True):
        best = min((side for side in sides if side.startswith("fused")), key=lambda side: samples.side(side).p50)
        for other in ("max-autotune", "compile", "eager"):
            ratio = samples.ratio(best, other)
            note = f"{best}: {samples.side(best).p50 * 1e6:.0f} µs; {other} {samples.side(other).p50 * 1e6:.0f} µs"
            wanted = None if other == "eager" else NEVER_SLOWER
            size = "x".join(map(str, shape))
            report.add(Row(f"{name} {size}: {part}, fused / {other}", ratio.p50, "×", wanted, ratio, note))
    report.raw[name] = [samples.seconds for samples in parts]


def _reference_sides(eager: Function, leaves: list[Tensor]) -> dict[str, Turn]:
    """Eager, both modes of torch.compile, and a copy of the first tensor (its gradient's part does the same)."""
    target = torch.empty_like(leaves[0])

    def copy() -> None:
        target.detach().copy_(leaves[0].detach())

    sides: dict[str, Turn] = {"eager": _turn(eager, leaves), "copy": [copy, copy]}
    for name, mode in INDUCTOR.items():
        sides[name] = _turn(_compiled(eager, mode), leaves)
    return sides


def _turn(function: Function, leaves: list[Tensor]) -> Turn:
    """Forward, and backward with gradients for all leaves."""
    result: list[Tensor] = []
    upstream = torch.ones_like(leaves[0])

    def forward() -> None:
        result[:] = [function(*leaves)]

    def backward() -> None:
        torch.autograd.grad(result[0], leaves, upstream)

    return [forward, backward]


def _compiled(function: Function, mode: str = "default") -> Function:
    compiled: Function = torch.compile(function, mode=mode, dynamic=False)
    return compiled


def _operator(name: str) -> tuple[Any, Any]:
    importlib.import_module(f"esper_fx.ops.{name}")
    return getattr(torch.ops.esper, name), importlib.import_module(f"esper_fx.kernels.{name}")


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(shape, generator=generator, device="cuda") / shape[-1] ** 0.25
    return values.to(torch.bfloat16).requires_grad_()


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, device="cuda")
