"""The demo as its user runs it, through torch.compile, only shorter."""

from __future__ import annotations

import torch
from rich.console import Console

from esper_fx import Stage
from esper_fx.demo import report
from esper_fx.demo.growth import Run
from esper_fx.demo.text import text_task
from tests.support.watchers import Notes


def test_the_text_demo_grows_without_a_recompile() -> None:
    notes = Notes()
    run = Run(text_task(0), steps=100, seed=0, watcher=notes)
    run.start()
    with torch.compiler.set_stance("fail_on_recompile"):
        record = run.train()
    stats = run.model.stats()
    assert stats.recompiles == 0
    assert stats.kernels_compiled + stats.kernels_loaded > 0
    assert [event.live is not None for event in record.events if event.what.startswith("germinate")] == [True, True]
    for index, event in enumerate(event for event in record.events if event.live is not None):
        assert event.live is not None
        assert {step.alphas[index] for step in record.steps[: event.live]} == {0.0}
        assert record.steps[event.live].alphas[index] == 0.25
    assert Stage.FOSSILIZED in {seed.stage for seed in run.model.seeds.values()}
    assert len(run.model.morphology) == 1
    assert record.accuracies["after"] > 0.2
    console = Console(width=80)
    with console.capture() as capture:
        report.print_report(console, run.task, record, stats)
    assert "eager mode" not in capture.get()
