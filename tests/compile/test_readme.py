"""The README's examples do what it says they do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import esper_fx
from esper_fx import Stage
from tests.support.adapters import write_checkpoint
from tests.support.growing import grow
from tests.support.linear_kinds import matrices, with_lora

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_example_grows_and_keeps_a_module(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(EXAMPLES[0], names)
    printed = capsys.readouterr().out.splitlines()
    promised = next(block for block in README.split("```") if "kept by the user" in block).strip().splitlines()
    assert [re.sub(r"\d+", "", line).split() for line in printed] == [
        re.sub(r"\d+", "", line).split() for line in promised
    ]
    assert printed[-1] == "0 recompiles"
    assert names["seed"].stage is Stage.FOSSILIZED
    assert names["seed"].alpha == 1.0


def test_the_examples_of_saving_and_loading_resume_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, load = (example for example in EXAMPLES if "run.pt" in example)
    objects = EXAMPLES[0][: EXAMPLES[0].index("seed = model.seeds")]
    monkeypatch.chdir(tmp_path)
    first: dict[str, Any] = {}
    exec(objects, first)
    run, optimizer = first["model"], first["optimizer"]

    def step(names: dict[str, Any]) -> None:
        loss = (names["model"](names["x"]) - names["y"]).square().mean()
        names["optimizer"].zero_grad(), loss.backward(), names["optimizer"].step()

    run.seeds["1"].germinate("low_rank", rank=8, alpha=0.0)
    run.seeds["1"].blend(to=1.0, steps=10)
    for _ in range(4):
        step(first)
    exec(save, first)
    second: dict[str, Any] = {}
    exec(objects, second)
    second |= {name: first[name] for name in ("x", "y")}
    exec(load, second)
    assert torch.equal(torch.get_rng_state(), second["saved"]["random"])
    for names in (first, second):
        for _ in range(10):
            step(names)
    assert second["model"].seeds["1"].stage is Stage.ACTIVE
    assert second["model"].ledger == run.ledger
    for mine, theirs in zip(second["model"].state_dict().values(), run.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert str(second["optimizer"].state_dict()) == str(optimizer.state_dict())


def test_the_example_of_a_blueprint_grows() -> None:
    source = next(example for example in EXAMPLES if "@esper_fx.blueprint" in example)
    exec(source, {"esper_fx": esper_fx, "torch": torch, "__name__": "readme"})
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh())
    x = torch.randn(4, 3)
    model = esper_fx.morph(net, sites="0", example_inputs=(x,))
    before = model(x)
    model.seeds["0"].germinate("my_adapter", width=7)
    assert model.seeds["0"].stage is Stage.INCUBATING
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert sum(p.numel() for p in model.seeds["0"].body.parameters()) == 5 * 7 + 7 + 7 * 5 + 5


def test_the_example_of_going_back_saves_what_has_grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = next(example for example in EXAMPLES if "unmorph" in example)
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    x = torch.randn(4, 3)
    model = esper_fx.morph(net, sites="*", example_inputs=(x,))
    grow(model, "0", "affine")
    grow(model, "1", "low_rank")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"esper_fx": esper_fx, "torch": torch, "model": model}
    exec(source, names)
    loaded = torch.load("plain.pt", weights_only=False)
    for module in (names["plain"], names["small"], loaded):
        torch.testing.assert_close(module(x), model(x))
    assert len(list(names["plain"].grown.children())) == 2
    assert len(list(names["small"].grown.children())) == 1
    outcomes = [site["outcome"] for site in json.loads(Path("lineage.json").read_text(encoding="utf-8"))["sites"]]
    assert outcomes == ["module grown.site_0", "module grown.site_1"]


def test_the_example_of_adapters_swaps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)), torch.randn(4, 6)
    adapters = {
        folder: {site: matrices(net.get_submodule(site), 2, seed=seed + int(site)) for site in ("0", "2")}
        for seed, folder in enumerate(("summaries", "questions"))
    }
    for folder, loras in adapters.items():
        write_checkpoint(tmp_path / folder, loras, lora_alpha=2)
    source = next(example for example in EXAMPLES if "load_adapter" in example)
    names: dict[str, Any] = {"esper_fx": esper_fx, "torch": torch, "net": net, "x": x}
    exec(source, names)
    torch.testing.assert_close(names["summary"], with_lora(net, adapters["summaries"])(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(names["answer"], with_lora(net, adapters["questions"])(x), rtol=1e-5, atol=1e-5)
    assert names["model"].stats().recompiles == 0
    assert esper_fx.adapter_modules("copy") == ["0", "2"]


def test_the_examples_of_looking_inside_and_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    x = torch.randn(4, 3)
    model = esper_fx.morph(net, sites="1", example_inputs=(x,))
    names: dict[str, Any] = {"esper_fx": esper_fx, "model": model}
    exec(next(example for example in EXAMPLES if "inspect.summary" in example), names)
    assert "0 of 1 seeds live" in capsys.readouterr().out
    assert Path("report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert Path("model.dot").exists()

    watching, reading = next(example for example in EXAMPLES if "telemetry.watch" in example).split("for record")
    exec(watching.replace("every=50", "every=1"), names)
    model(x).sum().backward()
    names["watch"].flush()
    exec(f"for record{reading}", names)
    site, deviation, *_ = capsys.readouterr().out.split()
    assert site == "1"
    assert float(deviation) > 0
    assert Path("sites.jsonl").read_text(encoding="utf-8").startswith('{"site": "1"')
