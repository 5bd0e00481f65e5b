"""What dormant seeds cost: a training step of a morphed model against plain torch.compile of the original."""

from __future__ import annotations

from benchmarks import training
from benchmarks.harness import interleave
from benchmarks.options import Options
from benchmarks.report import Bar, Report, Row

BAR = Bar(at_most=1.03, aim=1.005)
LEAST_SEEDS = 8


def run(options: Options) -> Report:
    """Interleave the plain loop, a second plain loop and the morphed one, all in steady state.

    The second plain loop is the same program again: its ratio to the first is what this machine cannot tell apart.
    """
    report = Report("dormant")
    rounds = 20 if options.quick else 300
    for name in options.models:
        case = training.case(name, options.seed)
        with training.empty_store():
            esper = training.esper_loop(case, training.FINE_SITES[name])
            training.settle(esper)
            loops = {"plain": training.plain_loop(case), "twin": training.plain_loop(case), "esper": esper}
            seeds = len(esper.net.seeds)
            if seeds < LEAST_SEEDS:
                raise RuntimeError(
                    f"the {name} was morphed with {seeds} seeds; this benchmark needs {LEAST_SEEDS} or more"
                )
            steps = interleave({side: loop.step for side, loop in loops.items()}, rounds=rounds, budget_s=60, warmup=8)
            halves = interleave(
                {side: loop.forward_backward for side, loop in loops.items()}, rounds=rounds, budget_s=20, warmup=3
            )
            still_best = training.on_best_plan(esper)
        ratio = steps.ratio("esper", "plain")
        note = f"{seeds} dormant seeds; plain {steps.side('plain').p50 * 1e3:.2f} ms"
        note += "" if still_best else "; NOT on plan whole"
        report.add(Row(f"{name}: training step, dormant / plain", ratio.p50, "×", BAR, ratio, note))
        ratio = halves.ratio("esper", "plain")
        note = f"without the optimizer; plain {halves.side('plain').p50 * 1e3:.2f} ms"
        report.add(Row(f"{name}: forward and backward alone", ratio.p50, "×", None, ratio, note))
        ratio = steps.ratio("twin", "plain")
        report.add(
            Row(f"{name}: plain against itself", ratio.p50, "×", None, ratio, "what this machine cannot tell apart")
        )
        report.raw[name] = {
            "step_s": steps.seconds,
            "forward_backward_s": halves.seconds,
            "stats": training.stats_dict(esper),
        }
    return report
