"""The demo without compilation: its data, its story told in eager mode, and what is drawn and printed of it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from esper_fx import BlueprintError, Germination, GerminationError, Stage
from esper_fx.demo import growth, plot, report, text, vision
from esper_fx.demo.growth import Run
from esper_fx.demo.record import (
    AFTER,
    Event,
    Record,
    Step,
    longest_step,
    smooth,
    steady_seconds,
    steady_steps,
    steps_per_second,
)
from esper_fx.demo.task import DemoError, Labelled, Task, accuracy, loss
from tests.support.watchers import Notes

pytest.importorskip("sklearn")


def smaller(task: Task, batch: int) -> Task:
    def sample(generator: torch.Generator) -> Labelled:
        inputs, classes = task.sample(generator)
        return inputs[:batch], classes[:batch]

    return dataclasses.replace(task, sample=sample)


def rows(seconds: list[float]) -> list[Step]:
    return [Step(1.0, second, (0.0, 0.0)) for second in seconds]


# Data.


def test_digits_are_split_without_overlap_whatever_the_seed() -> None:
    first, second = vision.digits_task(0), vision.digits_task(1)
    assert torch.equal(first.test[0], second.test[0])
    assert not torch.equal(next(first.net.parameters()), next(second.net.parameters()))
    training = {image.numpy().tobytes() for image in first.sample(torch.Generator().manual_seed(0))[0]}
    held_out = [image.numpy().tobytes() for part in (first.validation, first.test) for image in part[0]]
    assert len(training) > 200
    assert training.isdisjoint(held_out)
    assert len(held_out) == 597
    assert set(first.test[1].tolist()) == set(range(10))
    assert first.test[0].min() == 0
    assert first.test[0].max() == 1


def test_the_digits_network_cannot_tell_how_patches_lie() -> None:
    """What makes it too simple: the same 2x2 patches in another order give the same answer."""
    net = vision.PatchNet()
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(net(images), net(images.flip(3).flip(2).flip(2).flip(3)))
    features = net.stem(images).flatten(2)
    shuffled = features[:, :, torch.randperm(features.shape[2])].view(3, -1, 7, 7)
    mixed = features.view(3, -1, 7, 7)
    for block in net.blocks:
        mixed, shuffled = block(mixed), block(shuffled)
    torch.testing.assert_close(mixed.mean((2, 3)), shuffled.mean((2, 3)))


def test_text_is_the_standard_library_and_the_answer_is_the_next_character() -> None:
    task = text.text_task(0)
    inputs, classes = task.sample(torch.Generator().manual_seed(0))
    assert inputs.shape == classes.shape == (16, 64)
    torch.testing.assert_close(inputs[:, 1:], classes[:, :-1])
    alphabet = text._ALPHABET + "?"
    window = "".join(alphabet[code] for code in task.test[0][0])
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[9::10]
    assert any(window.replace("?", "") in path.read_text(errors="replace") for path in files) or "?" in window


def test_text_round_trips_through_its_codes() -> None:
    source = "def f(x):\n    return x + 1  # done\n"
    assert "".join(text._ALPHABET[code] for code in text._encode(source)) == source
    assert text._encode("\t\N{SNOWMAN}").tolist() == [text._OTHER] * 2


def test_a_python_without_source_files_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(DemoError, match="too few source files of the standard library; run the demo without --text"):
        text.text_task(0)


def test_the_character_model_does_not_see_the_future() -> None:
    model = text.CharacterModel()
    characters = torch.randint(90, (2, 64))
    changed = characters.clone()
    changed[:, 40:] = 3
    torch.testing.assert_close(model(characters)[:, :40], model(changed)[:, :40])
    assert not torch.allclose(model(characters)[:, 40:], model(changed)[:, 40:])


def test_accuracy_counts_over_all_parts() -> None:
    scores = torch.eye(10)[torch.arange(1000) % 10]
    classes = torch.arange(1000) % 10
    classes[:250] = (classes[:250] + 1) % 10
    assert accuracy(torch.nn.Identity(), (scores, classes)) == 0.75


def test_loss_of_even_odds_is_the_logarithm_of_the_number_of_classes() -> None:
    expected = torch.tensor(math.log(7))
    torch.testing.assert_close(loss(torch.zeros(4, 7), torch.tensor([0, 1, 2, 3])), expected)
    torch.testing.assert_close(loss(torch.zeros(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64)), expected)


# The story.


@pytest.fixture(scope="module")
def told() -> tuple[Run, Notes]:
    notes = Notes()
    run = Run(smaller(vision.digits_task(0), 32), steps=100, seed=0, watcher=notes, compiled=False)
    run.start()
    run.train()
    return run, notes


def test_one_growth_is_kept_and_one_pruned(told: tuple[Run, Notes]) -> None:
    run, _ = told
    stages = {seed.stage for seed in run.model.seeds.values() if seed.name in {t.site for t in run.task.trials}}
    assert Stage.FOSSILIZED in stages
    assert stages - {Stage.FOSSILIZED} <= {Stage.EMBARGOED, Stage.DORMANT}
    assert [event.what.split()[0] for event in run.record.events] == [
        "germinate",
        "blend",
        "germinate",
        "blend",
        "fossilize",
        "prune",
    ]


def test_the_growth_that_is_missed_more_is_kept(told: tuple[Run, Notes]) -> None:
    run, _ = told
    kept = next(event.site for event in run.record.events if event.what.startswith("fossilize"))
    assert run.record.without[kept] == min(run.record.without.values())


def test_alphas_tell_the_story(told: tuple[Run, Notes]) -> None:
    run, _ = told
    for index, trial in enumerate(run.task.trials):
        events = [event for event in run.record.events if event.site == trial.site]
        alphas = [step.alphas[index] for step in run.record.steps]
        germinated, blended, ended = events
        assert set(alphas[: germinated.step]) == {0.0}
        assert set(alphas[germinated.step : blended.step]) == {0.25}
        assert alphas[ended.step - 1] == 1.0
        assert alphas[blended.step : ended.step] == sorted(alphas[blended.step : ended.step])
        assert alphas[-1] == (1.0 if ended.what.startswith("fossilize") else 0.0)


def test_parameters_come_and_go_and_every_event_settles(told: tuple[Run, Notes]) -> None:
    run, notes = told
    count = run.record.parameters
    assert count["before"] < count["after"] < count["with both"]
    assert all(event.settled is not None for event in run.record.events)
    assert len(notes.doings) == len(run.record.steps)
    assert any("keep depthwise_conv, prune channel_gate" in line for line in notes.lines) == (
        run.model.seeds["blocks.0"].stage == Stage.FOSSILIZED
    )


def test_the_comparison_starts_from_the_same_network_and_leaves_the_grown_one_alone(told: tuple[Run, Notes]) -> None:
    run, _ = told
    again = smaller(vision.digits_task(0), 32).net.state_dict()
    for name, value in run._untouched.state_dict().items():
        torch.testing.assert_close(value, again[name], rtol=0, atol=0)
    grown = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train_without()
    assert 0 <= run.record.accuracies["without growth"] <= 1
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, grown[name], rtol=0, atol=0, equal_nan=True)


def test_on_a_slow_machine_fewer_steps_are_trained_and_the_comparison_is_left_out() -> None:
    notes = Notes()
    run = Run(smaller(vision.digits_task(0), 16), steps=10**9, seed=0, watcher=notes, limit_s=1e-9, compiled=False)
    run.start()
    run.train()
    run.train_without()
    assert len(run.record.steps) == 240  # the least number, and 20 steps for each of two blends
    assert "without growth" not in run.record.accuracies
    assert [line for line in notes.lines if "slow or busy: 200 steps" in line or "left out" in line] == [
        notes.lines[1],
        notes.lines[-1],
    ]


def test_the_time_of_a_request_counts_as_part_of_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(smaller(vision.digits_task(0), 16), steps=100, seed=0, watcher=Notes(), compiled=False)
    ticking = itertools.count()
    monkeypatch.setattr(growth, "time", SimpleNamespace(perf_counter=lambda: float(next(ticking))))
    run.start()
    event = run._ask("nothing", run.model.seeds["blocks.0"], lambda: None)
    run._step()
    run._step()
    assert event.call_seconds == 1.0
    assert [step.seconds for step in run.record.steps] == [1.0, 2.0, 1.0]


def test_a_growth_that_is_refused_ends_the_demo_with_the_reason() -> None:
    task = smaller(vision.digits_task(0), 16)
    broken = dataclasses.replace(task.trials[0], config={"kernel_size": -1})
    run = Run(
        dataclasses.replace(task, trials=(broken, task.trials[1])), steps=100, seed=0, watcher=Notes(), compiled=False
    )
    run.start()
    with pytest.raises(BlueprintError, match="kernel_size"):
        run.train()


def test_a_growth_that_never_comes_to_life_ends_the_demo_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(Germination, "done", lambda _: False)
    run = Run(smaller(vision.digits_task(0), 16), steps=100, seed=0, watcher=Notes(), compiled=False)
    run.start()
    with pytest.raises(DemoError, match="in vain.*esper-fx doctor"):
        run.train()


def test_a_growth_that_failed_ends_the_demo_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Germination, "exception", lambda _: GerminationError("no kernel today"))
    run = Run(smaller(vision.digits_task(0), 16), steps=100, seed=0, watcher=Notes(), compiled=False)
    run.start()
    with pytest.raises(DemoError, match="depthwise_conv at blocks.0 did not come to life: no kernel today"):
        run.train()


# What is made of it.


def test_the_longest_step_is_looked_for_around_its_event_only() -> None:
    seconds = [9.0] + [0.1] * 300
    seconds[100], seconds[130], seconds[130 + AFTER - 1], seconds[130 + AFTER] = 0.5, 0.6, 0.7, 0.8
    record = Record(rows(seconds), [Event("germinate", "a", 100, 0.0, live=120, live_seconds=2.0, settled=130)])
    assert longest_step(record, record.events[0]).seconds == 0.7
    assert longest_step(record, dataclasses.replace(record.events[0], settled=None)).seconds == 0.8
    assert steady_seconds(record) == 0.1
    assert len(steady_steps(record)) == 99


def test_throughput_counts_stalls() -> None:
    assert steps_per_second(rows([0.1] * 9 + [1.1])) == pytest.approx(5)
    assert math.isnan(steps_per_second([]))


def test_smoothing_is_a_mean_of_what_is_there() -> None:
    assert smooth([1.0, 3.0, 5.0, 7.0], width=2) == [1.0, 2.0, 4.0, 6.0]


def test_the_report_prints_what_was_measured(told: tuple[Run, Notes]) -> None:
    run, _ = told
    console = Console(width=100)
    with console.capture() as capture:
        report.print_report(console, run.task, run.record, run.model.stats())
    printed = " ".join(capture.get().split())
    assert f"accuracy before growth {run.record.accuracies['before']:.1%}" in printed
    assert f"accuracy after growth {run.record.accuracies['after']:.1%}" in printed
    assert "Dynamo recompiles 0" in printed
    for event in run.record.events:
        ratio = longest_step(run.record, event).seconds / steady_seconds(run.record)
        assert f"{event.what} {event.site} {event.step:,}" in printed
        assert f"{ratio:.1f}" in printed


def test_the_report_fits_into_eighty_columns(told: tuple[Run, Notes]) -> None:
    run, _ = told
    console = Console(width=80)
    with console.capture() as capture:
        report.print_report(console, run.task, run.record, run.model.stats())
    assert "…" not in capture.get()


def test_the_picture_is_written_with_folders_made(told: tuple[Run, Notes], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run, _ = told
    path = tmp_path / "new" / "digits.png"
    plot.draw(run.record, run.task, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000
