"""A second process with a warm store: its first training step against a cold one, and against plain torch.compile."""

from __future__ import annotations

import shutil
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks import child, training
from benchmarks.options import Options
from benchmarks.report import Bar, Report, Row

FIRST_STEP = Bar(at_most=0.35, aim=0.1)
COMPILES = Bar(at_most=0, aim=0)
MOST_STEPS = 5000


def run(options: Options) -> Report:
    """Cold; warm with both caches; warm with Inductor's own cache emptied, so that only our store helps."""
    report = Report("restart")
    for name in options.models:
        runs: dict[str, dict[str, Any]] = {}
        for side in ("esper", "plain"):
            _cold_and_warm(runs, name, side, options.seed)
        for row in rows(name, runs):
            report.add(row)
        report.raw[name] = runs
    return report


def _cold_and_warm(runs: dict[str, dict[str, Any]], name: str, side: str, seed: int) -> None:
    arguments = {"model": name, "side": side, "seed": seed}
    with child.fresh_folders() as folders:
        inductor = Path(folders[child.FOLDERS["inductor"]])
        phases = ("cold", "warm", "warm, only our store") if side == "esper" else ("cold", "warm")
        for phase in phases:
            if phase == "warm, only our store":
                shutil.rmtree(inductor)
                inductor.mkdir(mode=0o700)
            runs[f"{side} {phase}"] = child.call("benchmarks.restart:first_step", arguments, environment=folders)


def first_step(model: str, side: str, seed: int) -> dict[str, Any]:
    """In a fresh process: build, compile, take the first training step; then (esper) settle and germinate.

    Returns:
        ``build_s`` (model, morph, optimizer), ``first_step_s`` (from ``torch.compile``'s first call to the end of the
        update), ``second_step_s``, and for esper ``first`` and ``grown``: the engine's statistics after the first
        step and after a germination has settled; ``grown_steps``: steps until that was live.
    """
    case = training.case(model, seed)
    started = perf_counter()
    loop = training.esper_loop(case) if side == "esper" else training.plain_loop(case)
    built = perf_counter()
    loop.step()
    stepped = perf_counter()
    loop.step()
    result: dict[str, Any] = {
        "build_s": built - started,
        "first_step_s": stepped - built,
        "second_step_s": perf_counter() - stepped,
    }
    if side == "esper":
        result["first"] = training.stats_dict(loop)
        training.settle(loop)
        result["settled"] = training.stats_dict(loop)
        target = loop.net.seeds[training.MIDDLE[model]]
        target.germinate("low_rank", rank=8)
        grown_steps = training.steps_until_live(loop, target, MOST_STEPS)
        training.settle(loop)
        result |= {"grown_steps": grown_steps, "grown": training.stats_dict(loop)}
    return result


def rows(name: str, runs: dict[str, dict[str, Any]]) -> list[Row]:
    """The figures of one model from what the processes brought back."""

    def seconds(phase: str, field: str = "first_step_s") -> float:
        return float(runs[phase][field])

    def compiles(phase: str, moment: str) -> int:
        """Kernels compiled in workers or in the training process."""
        stats = runs[phase][moment]
        return int(stats["kernels_compiled"] + stats["foreground_compiles"])

    cold = seconds("esper cold")
    result = []
    for phase in ("esper warm, only our store", "esper warm"):
        warm = seconds(phase)
        note = f"{warm:.2f} s / {cold:.2f} s; "
        note += f"import {seconds(phase, 'import_s'):.1f} s, morph {seconds(phase, 'build_s'):.2f} s"
        title = "our store only" if phase.endswith("store") else "Inductor's too"
        result.append(Row(f"{name}: first step, warm / cold, {title}", warm / cold, "×", FIRST_STEP, note=note))
        foreground = runs[phase]["first"]["foreground_compile_seconds"]
        note = f"{foreground:.2f} s in the foreground; with a germination {compiles(phase, 'grown')}, "
        note += f"live after {runs[phase]['grown_steps']} steps"
        result.append(
            Row(f"{name}: compiles when warm, {title}", compiles(phase, "settled"), "compiles", COMPILES, note=note)
        )
    plain_cold, plain_warm = seconds("plain cold"), seconds("plain warm")
    note = f"{plain_warm:.2f} s / {plain_cold:.2f} s"
    result.append(Row(f"{name}: plain torch.compile, warm / cold", plain_warm / plain_cold, "×", note=note))
    note = "what compiling by backend esper costs at first"
    result.append(Row(f"{name}: cold first step, esper / plain", cold / plain_cold, "×", note=note))
    return result
