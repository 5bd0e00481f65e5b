"""Growing on a GPU: dormant and live seeds, the swap, and how soon a resident kernel is live, on two large models."""

from __future__ import annotations

import os
from time import perf_counter

import torch

import esper_fx
from benchmarks import active, training
from benchmarks.gpu_timing import require_gpu
from benchmarks.harness import Stamps, interleave, median, quantiles
from benchmarks.options import Options
from benchmarks.report import Bar, Report, Row

LARGE = {"transformer": "gpt2-small", "cnn": "resnet-50"}
DORMANT, ACTIVE, LONGEST = Bar(at_most=1.005), Bar(at_most=1.0), Bar(at_most=1.5)
RESIDENT_US = Bar(at_most=100.0)
#: Both sides round to bfloat16, in different places.
TOLERANCE = 5e-2
MOST_STEPS = 20_000


def run(options: Options) -> Report:
    """Steps under autocast to bfloat16, each until the device has done it."""
    require_gpu()
    report = Report("gpu")
    rounds = 20 if options.quick else 100
    for name in map(LARGE.__getitem__, options.models):
        # One store for all parts: what the swap compiles, the active model finds. Compiling is waited for, so by many workers.
        with training.empty_store(), esper_fx.configure(workers=max(1, (os.cpu_count() or 1) // 4)):
            _dormant(report, name, rounds, options.seed)
            _swap(report, name, rounds, options.seed)
            _active(report, name, rounds, options.seed)
    return report


def _dormant(report: Report, name: str, rounds: int, seed: int) -> None:
    torch.compiler.reset()
    case = training.case(name, seed, "cuda")
    loops = {
        "plain": training.plain_loop(case),
        "twin": training.plain_loop(case),
        "reduce-overhead": training.plain_loop(case, mode="reduce-overhead"),
        "esper": training.esper_loop(case, training.FINE_SITES[name]),
    }
    for loop in loops.values():
        loop.autocast = True
    training.settle(loops["esper"])
    samples = interleave({side: loop.step for side, loop in loops.items()}, rounds=rounds, warmup=8)
    for other, bar in (("plain", DORMANT), ("reduce-overhead", None)):
        ratio = samples.ratio("esper", other)
        note = f"{len(loops['esper'].net.seeds)} seeds; {other} {samples.side(other).p50 * 1e3:.2f} ms"
        report.add(Row(f"{name}: training step, dormant / {other}", ratio.p50, "×", bar, ratio, note))
    ratio = samples.ratio("twin", "plain")
    report.add(Row(f"{name}: plain against itself", ratio.p50, "×", None, ratio, "what cannot be told apart"))
    report.raw[f"{name}, dormant"] = samples.seconds


def _swap(report: Report, name: str, rounds: int, seed: int) -> None:
    """A first germination in a running loop, and then the same at an equal block, whose kernels are resident."""
    torch.compiler.reset()
    case = training.case(name, seed, "cuda")
    loop = training.esper_loop(case)
    loop.autocast = True
    training.settle(loop)
    training.wait_for_a_worker()
    before = _watched(loop, rounds)
    loop.net.seeds[training.MIDDLE[name]].germinate("low_rank", rank=8)
    event: list[float] = []
    left = 20
    while left:
        event += _watched(loop, 1)
        left -= training.on_best_plan(loop)
        if len(event) > MOST_STEPS:
            raise RuntimeError(f"after {MOST_STEPS} steps the change has not taken over: {loop.net.stats()}")
    longest = max(event) / median(before)
    note = f"{median(before) * 1e3:.2f} ms before, {len(event)} steps, {loop.net.stats().kernels_compiled} compiled"
    report.add(Row(f"{name}: longest step of a first germination / median", longest, "×", LONGEST, None, note))
    calls, switches = [], []
    target = loop.net.seeds[training.MIDDLE[name]]
    for _ in range(10):
        target.prune()
        while target.stage.name != "DORMANT" or loop.net.pending:  # the embargo takes steps
            loop.step()
        started = perf_counter()
        target.germinate("low_rank", rank=8)
        calls.append((perf_counter() - started) * 1e6)
        loop.net.reset_stats()  # from here on only what the engine does in the steps counts
        training.steps_until_live(loop, target, MOST_STEPS)
        loop.step()  # the engine books a step's time when the next one begins
        switches.append(loop.net.stats().longest_step_host_ms * 1e3)
    for what, taken, bar, note in (
        ("activation of a resident kernel", switches, RESIDENT_US, "the engine's time in the step that goes live"),
        ("germinate() before it", calls, None, "a new body, its parameters, and what the switch puts in place"),
    ):
        spread = quantiles(taken)
        report.add(Row(f"{name}: {what}", spread.p50, "µs", bar, spread, note))
    report.raw[f"{name}, swap"] = {"before_s": before, "event_s": event, "call_us": calls, "switch_us": switches}


def _active(report: Report, name: str, rounds: int, seed: int) -> None:
    torch.compiler.reset()
    case = training.case(name, seed, "cuda")
    grow = dict.fromkeys(active.SITES, active.LOW_RANK)
    esper = training.esper_loop(case)
    esper.autocast = True
    training.settle(esper)
    training.make_active(esper, grow)
    static = active.by_hand(case, esper, tuple(grow))
    static.autocast = True
    error = active.largest_difference(esper, static)
    if error > TOLERANCE:
        raise RuntimeError(f"{name}: the two sides differ by {error:.2e} relative; expected {TOLERANCE:g}")
    samples = interleave({"esper": esper.step, "static": static.step}, rounds=rounds, warmup=8)
    ratio = samples.ratio("esper", "static")
    note = f"static {samples.side('static').p50 * 1e3:.2f} ms; equal within {error:.0e}"
    report.add(Row(f"{name}: training step, 4 × low_rank / static", ratio.p50, "×", ACTIVE, ratio, note))
    report.raw[f"{name}, active"] = samples.seconds


def _watched(loop: training.Loop, steps: int) -> list[float]:
    stamps = Stamps()
    stamps.mark()
    for _ in range(steps):
        loop.step()
        stamps.mark()
    return stamps.seconds
