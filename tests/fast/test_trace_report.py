"""What a model says about how its modules were traced, and sites by regular expression."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.errors import SiteError
from esper_fx.passes.trace_report import How
from tests.support.models import residual_cnn


class Noisy(nn.Module):
    """Reads self.training, so that it is called as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2 if self.training else self.inner(x)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.noisy = Noisy()
        self.spare = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.noisy(x)


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Part()
        self.hooked = nn.Sequential(nn.ReLU())
        self.hooked[0].register_forward_hook(lambda module, inputs, output: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) if x.sum() > 0 else self.hooked(x)


def test_every_module_is_reported_with_how_and_why() -> None:
    model = esper_fx.morph(Branching(), sites="part.layers.*")
    report = {entry.name: entry for entry in model.trace_report()}
    assert {name: entry.how for name, entry in report.items()} == {
        "": How.PYTHON,
        "part": How.TRACED,
        "part.layers": How.TRACED,
        "part.layers.0": How.LEAF,
        "part.layers.1": How.LEAF,
        "part.noisy": How.LEAF,
        "part.noisy.inner": How.INSIDE,
        "part.spare": How.UNUSED,
        "hooked": How.TRACED,
        "hooked.0": How.LEAF,
    }
    assert "control flow" in report[""].why
    assert "self.training" in report["part.noisy"].why
    assert "hooks" in report["hooked.0"].why
    assert report["part"].kind == "Part"
    lines = str(model.trace_report()).splitlines()
    assert lines[0].split() == ["module", "class", "how", "why"]
    assert lines[1].startswith("(the model)")
    assert len(lines) == 1 + len(report)


def test_a_model_traced_whole() -> None:
    example = residual_cnn()
    model = esper_fx.morph(example.model, sites="blocks.*", example_inputs=example.inputs)
    assert {entry.how for entry in model.trace_report()} == {How.TRACED, How.LEAF}
    assert [entry.name for entry in model.trace_report()] == [name for name, _ in example.model.named_modules()]


@pytest.mark.parametrize(
    ("sites", "found"),
    [
        (re.compile(r"part\.layers\.[01]"), ["part.layers.0", "part.layers.1"]),
        ([re.compile(r".*\.0"), "part"], ["part.layers.0", "part", "hooked.0"]),
    ],
)
def test_sites_by_regular_expression(sites: object, found: list[str]) -> None:
    model = esper_fx.morph(Branching(), sites=sites)  # type: ignore[arg-type]
    assert list(model.seeds) == found
    assert torch.equal(model(torch.ones(2, 4)), model(torch.ones(2, 4)))


def test_a_regular_expression_matches_whole_names() -> None:
    with pytest.raises(
        SiteError, match=r"sites=re.compile\('layers'\) selects no module .* Nearest names: .*part.layers"
    ):
        esper_fx.morph(Branching(), sites=re.compile("layers"))
