"""What telemetry costs: a step that is measured, and one that is not, against one of a model that is not watched."""

from __future__ import annotations

import esper_fx
from benchmarks import training
from benchmarks.harness import interleave
from benchmarks.options import Options
from benchmarks.report import Bar, Report, Row

BAR = Bar(at_most=1.03, aim=1.005)
NEVER = 1 << 40
USUAL = 50  # steps from one that is measured to the next, by default


def run(options: Options) -> Report:
    """Interleave a loop that is not watched, one between its measured steps, and one of which every step is measured."""
    report = Report("telemetry")
    rounds = 20 if options.quick else 200
    for name in options.models:
        case = training.case(name, options.seed)
        with training.empty_store():
            loops = {
                side: training.esper_loop(case, training.FINE_SITES[name]) for side in ("plain", "between", "measured")
            }
            for loop in loops.values():
                training.settle(loop)
            watches = {
                side: esper_fx.telemetry.watch(loops[side].net, every=every)  # type: ignore[arg-type]
                for side, every in (("between", NEVER), ("measured", 1))
            }
            for side in watches:
                training.settle(loops[side])
            steps = interleave({side: loop.step for side, loop in loops.items()}, rounds=rounds, budget_s=60, warmup=8)
            watches["measured"].flush()
            records = esper_fx.telemetry.records(loops["measured"].net)  # type: ignore[arg-type]
        least = min(record.samples for record in records)
        if least < len(steps.seconds["measured"]):
            raise RuntimeError(f"a site of the {name} was measured in {least} steps only")
        plain = f"{len(records)} sites; not watched {steps.side('plain').p50 * 1e3:.2f} ms"
        between, measured = (steps.ratio(side, "plain") for side in ("between", "measured"))
        report.add(Row(f"{name}: step between measured ones / not watched", between.p50, "×", BAR, between, plain))
        report.add(Row(f"{name}: measured step / not watched", measured.p50, "×", None, measured))
        average = between.p50 + (measured.p50 - between.p50) / USUAL
        report.add(Row(f"{name}: on average, every {USUAL}th step measured", average, "×", None))
        report.raw[name] = {"step_s": steps.seconds, "stats": training.stats_dict(loops["measured"])}
    return report
