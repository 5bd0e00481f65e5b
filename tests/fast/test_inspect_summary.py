"""What a summary says of a model, that it can be read, and that looking changes nothing and never hangs."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper_fx
from esper_fx import inspect
from esper_fx.engine.service import Service
from esper_fx.errors import EsperError, InspectionError
from esper_fx.inspect import collect
from esper_fx.inspect.names import shortened, visible, width
from esper_fx.inspect.text import COLUMNS
from esper_fx.lifecycle import HAS_BODY, Stage
from tests.support.growing import grow
from tests.support.inspecting import ODD_NAMES, footprint, grown_transformer, looked_at, odd, parts, small_transformer
from tests.support.models import Transformer
from tests.support.standin import StandIn
from tests.support.zoo import KINDS


def strict(value: Any) -> Any:
    """A value written as strict JSON and read back."""

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(json.dumps(value, allow_nan=False), parse_constant=refuse)


def test_a_summary_says_what_each_seed_is_doing() -> None:
    model = grown_transformer()
    now = inspect.summary(model)
    original = Transformer(vocabulary=32, width=16, depth=3, heads=2, tokens=8)
    assert (now.model, now.clock) == ("Transformer", 5)
    assert now.parameters == sum(parameter.numel() for parameter in original.parameters())
    assert now.stages == {"DORMANT": 1, "BLENDING": 1, "FOSSILIZED": 1}
    assert now.morphology == {"blocks.1": "low_rank", "blocks.2": "affine"}
    assert [seed.site for seed in now.seeds] == list(model.seeds)
    for seed in now.seeds:
        actual = model.seeds[seed.site]
        assert (seed.stage, seed.alpha, seed.live) == (actual.stage.name, actual.alpha, actual.live)
        assert (seed.shape, seed.dtype, seed.feature_dim) == ((2, 8, 16), "float32", 2)
        assert seed.since == model.growth.state.read("stage_since", actual.index)
        assert seed.health is None  # nobody has measured it
    dormant, blending, kept = now.seeds
    assert (dormant.blueprint, dormant.config, dormant.parameters, dormant.germinations) == (None, {}, 0, 0)
    assert (blending.blueprint, blending.config["rank"], blending.gate) == ("low_rank", 4, 1.0)
    assert (blending.parameters, blending.trainable, blending.germinations) == (2 * 4 * 16, 2 * 4 * 16, 1)
    assert now.grown == blending.parameters + kept.parameters == 2 * 4 * 16 + 2 * 16
    assert (now.pending, now.settled, now.programs) == ((), True, ())
    assert now.engine == model.stats()


def test_bodies_that_are_not_trained_are_told_apart() -> None:
    model = small_transformer()
    seed = grow(model, "blocks.0", "low_rank", rank=2)
    assert seed.body is not None
    seed.body.requires_grad_(False)
    (summed, *_) = inspect.summary(model).seeds
    assert (summed.parameters, summed.trainable) == (64, 0)
    assert "64 frozen" in str(inspect.summary(model))


def test_measured_health_and_errors_are_shown() -> None:
    model = grown_transformer()
    model.growth.state.write(1, health=0.25)
    model.growth.fail(model.seeds["blocks.2"], RuntimeError("out of\nluck"))
    _, healthy, failed = inspect.summary(model).seeds
    assert (healthy.health, healthy.errors, healthy.error) == (0.25, 0, None)
    assert (failed.errors, failed.error) == (1, "RuntimeError: out of\nluck")
    text = str(inspect.summary(model))
    assert "blocks.2 failed: RuntimeError: out of\\nluck" in text
    assert math.isnan(model.seeds["blocks.0"].health)
    assert strict(inspect.summary(model).to_dict())["seeds"][0]["health"] is None


def test_a_site_of_which_nothing_is_known_yet() -> None:
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), sites="1")
    (seed,) = inspect.summary(model).seeds
    assert (seed.shape, seed.dtype, seed.feature_dim) == (None, None, None)
    assert "not known yet" in str(inspect.summary(model))
    model(torch.ones(3, 4))
    (seed,) = inspect.summary(model).seeds
    assert (seed.shape, seed.dtype, seed.feature_dim) == ((3, 4), "float32", 1)


def test_a_summary_is_plain_data() -> None:
    now = inspect.summary(grown_transformer())
    record = strict(now.to_dict())
    assert record == now.to_dict()  # JSON's own types, lists included
    assert [seed["site"] for seed in record["seeds"]] == ["blocks.0", "blocks.1", "blocks.2"]
    assert record["seeds"][1]["config"]["rank"] == 4
    assert record["seeds"][1]["shape"] == [2, 8, 16]
    assert record["engine"]["recompiles"] == 0
    with pytest.raises(AttributeError):
        now.clock = 3  # type: ignore[misc]


def test_parameters_of_a_blueprint_that_json_cannot_hold_are_said_in_words() -> None:
    @esper_fx.blueprint("test_inspect_scaled", replace=True)
    def scaled(site: esper_fx.SiteSpec, *, limit: float = math.inf, kind: Any = torch.float32) -> nn.Module:
        layer = nn.Linear(site.features, site.features)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    model = small_transformer()
    grow(model, "blocks.0", "test_inspect_scaled")
    assert strict(inspect.summary(model).to_dict())["seeds"][0]["config"] == {"limit": "inf", "kind": "torch.float32"}


@pytest.mark.parametrize("make", [small_transformer, grown_transformer, parts, odd])
def test_the_text_is_a_table_that_fits(make: Callable[[], esper_fx.MorphableModel]) -> None:
    model = make()
    text = str(inspect.summary(model))
    assert max(map(width, text.splitlines())) <= COLUMNS
    assert text.isascii() or make is odd or "…" in text
    for seed in model.seeds.values():
        shown = next(line for line in text.splitlines() if line.startswith(visible(seed.name)[:10]))
        assert seed.stage.name in shown
    header = next(line for line in text.splitlines() if line.startswith("site "))
    stages = [line[header.index("stage") :].split()[0] for line in text.splitlines() if " float32 " in line]
    assert stages == [seed.stage.name for seed in model.seeds.values()] or make is odd  # wide characters: by columns


def test_long_names_lose_their_middle() -> None:
    assert shortened("blocks.0.attention.projection", 12) == "blocks…ction"
    assert shortened("short", 12) == "short"
    assert (width("文字"), width("größe")) == (4, 5)
    assert width(shortened("文字" * 10, 9)) <= 9
    assert shortened("文字" * 10, 9).startswith("文字")
    assert shortened("文字" * 10, 9).endswith("文字")
    assert visible("a\nb\x00\ud800") == "a\\nb\\x00\\ud800"


def test_the_example_of_the_readme_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split("## Looking inside")[1]
    code, promised = re.findall(r"```(?:python)?\n(.*?)```", section, flags=re.DOTALL)[:2]
    model = esper_fx.morph(
        nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1)), sites="1", example_inputs=(torch.ones(256, 16),)
    )
    grow(model, "1", "low_rank", rank=8, alpha=1.0, stage=Stage.FOSSILIZED)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": model, "esper_fx": esper_fx}
    exec(code, names)
    printed, expected = (re.sub(r"[\d,]+", "0", text).splitlines() for text in (capsys.readouterr().out, promised))
    seeds = next(number for number, line in enumerate(printed) if line.startswith("site"))
    assert [line.split() for line in printed[: seeds + 2]] == [line.split() for line in expected[: seeds + 2]]
    assert names["graph"].nodes["esper_seeds_1"]["stage"] == "FOSSILIZED"
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_parameters_that_are_not_the_default_are_shown() -> None:
    model = small_transformer(depth=4)
    default = esper_fx.blueprints.get("low_rank").parameters["rank"].default
    grow(model, "blocks.0", "low_rank", rank=default + 1)
    grow(model, "blocks.1", "low_rank", rank=default)
    grow(model, "blocks.2", "sequence", parts=["affine"])
    shown = [line.split("  ")[0] for line in _column(str(inspect.summary(model)), "blueprint")]
    assert shown == [f"low_rank(rank={default + 1})", "low_rank", "sequence(parts=['affine'])", "-"]


def _column(text: str, name: str) -> list[str]:
    """The rest of the seeds' lines from a column on."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("site "))
    return [line[lines[start].index(name) :] for line in lines[start + 1 :] if line]


def test_odd_names_stay_whole_in_the_data() -> None:
    assert {seed.site for seed in inspect.summary(odd()).seeds} == {f"layers.{name}" for name in ODD_NAMES}


def test_changes_that_are_on_their_way_are_shown() -> None:
    model = small_transformer()
    program = _Program(model)
    first, second = (model.seeds[site].germinate("affine") for site in ("blocks.1", "blocks.0"))
    now = inspect.summary(model)
    assert [(change.site, change.change, change.stage) for change in now.pending] == [
        ("blocks.1", "comes", "INCUBATING"),
        ("blocks.0", "comes", "INCUBATING"),
    ]
    assert not now.settled
    assert now.stages == {"DORMANT": 1, "GERMINATING": 2}
    assert now.morphology == {}  # they have bodies, which are not live
    assert [program.plan for program in now.programs] == ["eager"]
    assert "on its way: blocks.1 comes, blocks.0 comes" in str(now)
    program.land("blocks.1")
    assert first.wait(10)
    assert [change.site for change in inspect.summary(model).pending] == ["blocks.0"]
    program.land("blocks.0", "blocks.1")
    assert second.wait(10)
    assert model.settle(10)
    now = inspect.summary(model)
    assert (now.pending, now.settled) == ((), True)
    assert now.morphology == {"blocks.0": "affine", "blocks.1": "affine"}
    assert "on its way: nothing" in str(now)


class _Program(StandIn):
    """A stand-in of which statistics can be had."""

    service: Any = Service(cache=esper_fx.KernelCache(), store=None, compiler=None)
    number, plan, layout, seeds = 1, "eager", None, ()


@pytest.mark.parametrize("name", KINDS)
def test_models_of_all_kinds_can_be_looked_into(name: str) -> None:
    args, kwargs = KINDS[name].inputs(9)
    model = esper_fx.morph(KINDS[name].build(), sites=KINDS[name].sites, example_inputs=None if kwargs else args)
    now = inspect.summary(model)
    assert [seed.site for seed in now.seeds] == list(model.seeds)
    assert strict(now.to_dict())["model"] == now.model == type(KINDS[name].build()).__name__
    assert max(map(width, str(now).splitlines())) <= COLUMNS
    drawn = [site for _, site in inspect.graph(model).nodes(data="site") if site is not None]
    assert set(drawn) == set(model.seeds)


LOOKS: dict[str, Callable[[Any], Any]] = {
    "summary": lambda model: str(inspect.summary(model)),
    "modules": inspect.graph,
    "operations": lambda model: inspect.graph(model, detail="operations"),
    "dot": inspect.to_dot,
    "json": inspect.to_json,
    "report": inspect.report,
}


@pytest.mark.parametrize("look", LOOKS)
def test_looking_changes_nothing(look: str) -> None:
    model = grown_transformer()
    before = footprint(model)
    LOOKS[look](model)
    assert footprint(model) == before


@pytest.mark.parametrize("look", LOOKS)
def test_what_is_no_morphed_model_is_refused(look: str) -> None:
    function = {"modules": "graph", "operations": "graph", "dot": "to_dot", "json": "to_json"}.get(look, look)
    with pytest.raises(
        InspectionError, match=rf"^{function}\(\) needs a morphed model, not a Linear; call esper_fx.morph"
    ):
        LOOKS[look](nn.Linear(2, 2))
    with pytest.raises(InspectionError, match="not a str"):
        LOOKS[look]("model")
    assert issubclass(InspectionError, EsperError)
    assert issubclass(InspectionError, ValueError)


@pytest.mark.parametrize("look", LOOKS)
def test_what_torch_compile_returns_is_looked_through(look: str) -> None:
    model = grown_transformer()
    seen, expected = LOOKS[look](torch.compile(model, backend="eager")), LOOKS[look](model)
    if isinstance(seen, str):
        assert seen == expected
    else:
        assert list(seen.nodes(data=True)) == list(expected.nodes(data=True))


def test_a_model_that_hangs_in_a_transition_can_be_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "PATIENCE_S", 0.01)
    model = grown_transformer()
    held, release = threading.Event(), threading.Event()
    waited_for: list[bool] = []

    def hang() -> None:
        with model.growth.lock:
            held.set()
            waited_for.append(not release.wait(20))

    thread = threading.Thread(target=hang)
    thread.start()
    try:
        held.wait()
        for look in LOOKS.values():
            look(model)
        assert inspect.summary(model).stages == {"DORMANT": 1, "BLENDING": 1, "FOSSILIZED": 1}
    finally:
        release.set()
        thread.join()
    assert waited_for == [False]


def test_the_lock_with_a_limit_is_held_and_given_back() -> None:
    model = small_transformer()
    lock = model.growth.lock
    with lock.within(0.01) as mine:
        assert mine
        other: list[bool] = []
        thread = threading.Thread(target=lambda: other.append(_try(lock)))
        thread.start()
        thread.join()
        assert other == [False]
    thread = threading.Thread(target=lambda: other.append(_try(lock)))
    thread.start()
    thread.join()
    assert other == [False, True]


def _try(lock: Any) -> bool:
    with lock.within(0.01) as mine:
        return bool(mine)


def test_a_model_in_training_is_seen_between_transitions_only() -> None:
    """No picture is of half a transition: who has a body has a blueprint, and who sleeps has neither."""
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), sites="1", example_inputs=(torch.ones(2, 4),))
    seen: list[inspect.Summary] = []
    with esper_fx.configure(embargo_steps=0), looked_at(lambda: seen.append(inspect.summary(model))) as problems:
        rounds = 0
        while rounds < 50 or len(seen) < 50:
            seed = model.seeds["1"]
            seed.germinate("affine")
            model(torch.ones(2, 4))
            seed.prune()
            model(torch.ones(2, 4))
            rounds += 1
            if problems:
                break
    assert problems == []
    assert rounds >= 50
    for now in seen:
        (seed_now,) = now.seeds
        has_body = Stage[seed_now.stage] in HAS_BODY
        assert seed_now.live == has_body, seed_now
        assert (seed_now.blueprint is not None) == has_body, seed_now
        assert (seed_now.parameters > 0) == has_body, seed_now
