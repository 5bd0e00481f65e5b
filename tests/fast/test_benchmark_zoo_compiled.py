"""What `zoo --compiled` calls a difference, and how it makes a training step repeatable."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import esper_fx
from benchmarks.zoo import Miss
from benchmarks.zoo_compiled import (
    Exact,
    Outcome,
    choose,
    difference,
    judge,
    rows,
    step,
    without_dropout,
    without_zeros,
)


def test_a_difference_is_beside_the_largest_element_of_its_tensor() -> None:
    expected = {"output 0": torch.tensor([1.0, -4.0]), "gradient of a": torch.tensor([100.0])}
    found = {"output 0": torch.tensor([1.5, -4.0]), "gradient of a": torch.tensor([100.0])}
    assert difference(found, expected) == (0.125, "output 0")
    assert difference(expected, expected) == (0.0, "")


def test_what_is_tiny_beside_the_others_of_its_kind_is_measured_by_a_thousandth_of_them() -> None:
    expected = {
        "gradient of a": torch.tensor([100.0]),
        "gradient of b": torch.tensor([1e-7]),
        "output 0": torch.ones(1),
    }
    found = expected | {"gradient of b": torch.tensor([-1e-3])}
    worst, where = difference(found, expected)
    assert worst == pytest.approx(1e-2, rel=1e-3)
    assert where == "gradient of b"


@pytest.mark.parametrize("odd", [{}, {"output 0": torch.ones(3)}, {"output 0": torch.tensor([1.0, math.nan])}])
def test_what_is_missing_misshapen_or_not_finite_is_a_miss(odd: dict[str, torch.Tensor]) -> None:
    with pytest.raises(Miss, match="output 0"):
        difference(odd, {"output 0": torch.ones(2)})


def test_infinities_at_the_same_places_are_none() -> None:
    same = {"output 0": torch.tensor([math.inf, 2.0])}
    assert difference(same, same) == (0.0, "")


def test_where_the_two_differ_float64_decides() -> None:
    torch.manual_seed(0)
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), sites="0")
    x = torch.randn(3, 4)
    expected = step(model, (x,), 0)
    exact = Exact(model, (x,), 0)
    assert judge(expected, expected, exact) == (0.0, "", "")
    assert "found" not in vars(exact)
    wrong = {name: tensor * 1.5 for name, tensor in expected.items()}
    figure, _, arbiter = judge(expected, wrong, exact)
    assert figure < 1e-6
    assert arbiter.startswith("differs from eager by 3.3e-01; from float64 by ")
    figure, _, _ = judge(wrong, expected, exact)
    assert figure == pytest.approx(0.5, rel=1e-5)


def test_nothing_is_dropped_and_nothing_begins_as_zero() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.TransformerEncoderLayer(4, 2, 4, dropout=0.3))
    nn.init.zeros_(net[0].weight)
    without_zeros(without_dropout(net)).train()
    x = torch.randn(2, 3, 4)
    assert torch.equal(net(x), net(x))
    assert all(bool(parameter.any()) for parameter in net.parameters())


def test_weights_are_zero_nowhere_and_equal_for_equal_seeds() -> None:
    import random

    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4)), sites="0", example_inputs=(torch.ones(2, 4),))
    (name, weights), (again, others) = (choose(model.seeds["0"], random.Random(3), 1) for _ in range(2))
    assert name == again
    assert all(bool(weight.all()) and torch.equal(weight, others[key]) for key, weight in weights.items())
    model.seeds["0"].germinate(name, weights=weights)


def test_the_table_has_the_worst_and_names_what_was_missed() -> None:
    outcomes = [
        Outcome("timm", "a", whole=1e-6, blocks=3e-5, regions=2),
        Outcome("timm", "b", whole=2e-6),
        Outcome("timm", "c", whole=1.0, missed="it is random"),
    ]
    table = rows(outcomes)
    assert [row.figure for row in table[:4]] == [1.0, 3e-5, 3e-5, 2e-6]
    assert math.isnan(table[4].figure)
    assert [row.verdict for row in table] == ["missed", "met", "met", "aim met", "missed"]
    assert "c: it is random" in table[0].note
