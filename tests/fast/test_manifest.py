"""The manifest: JSON in a tensor that gives back exactly what went in, or says that it cannot."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper_fx.checkpoint.manifest import FORMAT, BodyRecord, Manifest, decode, encode
from esper_fx.errors import CheckpointError
from esper_fx.lifecycle import GrowthEvent, Ledger, Stage
from tests.support.examples import examples
from tests.support.training import assert_same

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.none() | st.booleans() | st.integers() | st.text() | st.tuples(st.integers(), st.text())
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=12,
)


def example(config: dict[str, Any] | None = None) -> Manifest:
    return Manifest(
        sites=("a", "layers.1", "c"),
        values={"a": ((2, 3), torch.float32, None), "layers.1": ((4, 5, 6), torch.bfloat16, (4, 7))},
        bodies={"layers.1": BodyRecord("low_rank", {"rank": 3} if config is None else config, Stage.BLENDING)},
        model_seed=7,
        clock=12,
        ledger=Ledger([GrowthEvent(3, "layers.1", Stage.DORMANT, Stage.GERMINATING, "because “so”", "low_rank")]),
    )


@given(values)
def test_every_value_comes_back_as_it_was(value: Any) -> None:
    assert_same(decode(json.loads(json.dumps(encode(value), allow_nan=False))), value)


@examples(30)
@given(st.dictionaries(st.text(), values))
def test_a_manifest_comes_back_as_it_was(config: dict[str, Any]) -> None:
    back = Manifest.from_tensor(example(config).to_tensor())
    assert_same(back.bodies["layers.1"].config, config)
    assert list(back.bodies["layers.1"].config) == list(config)


def test_all_parts_come_back() -> None:
    assert Manifest.from_tensor(example().to_tensor()) == example()
    assert Manifest.from_tensor(example().to_tensor().to(torch.bfloat16)) == example()


@pytest.mark.parametrize("value", [1j, object, {1}, b"x", torch.float32, range(3), True.__class__])
def test_a_value_that_json_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=rf"a checkpoint cannot hold a {type(value).__qualname__}"):
        encode([value])


class Half(float):
    """A subclass would come back as its base."""


def test_a_subclass_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match=r"parameter 'p' of blueprint 'low_rank' is \(0.5,\), and a checkpoint cannot hold a Half"
    ):
        example({"p": (Half(0.5),)}).to_tensor()


@given(st.data())
def test_damage_is_told(data: st.DataObject) -> None:
    tensor = example().to_tensor()
    damaged = tensor[: data.draw(st.integers(0, len(tensor) - 1))]
    with pytest.raises(CheckpointError, match="cannot be read.*it is damaged, or was not written by esper_fx"):
        Manifest.from_tensor(damaged)


@pytest.mark.parametrize(
    "change",
    [
        {"clock": "12"},
        {"clock": True},
        {"sites": "abc"},
        {"sites": ["a", 2]},
        {"values": {"a": [[2], "int64", None]}},
        {"values": {"a": [[2], "no_dtype", None]}},
        {"values": {}},
        {"bodies": {"layers.1": {"blueprint": "x", "config": [["p", {"set": []}]], "stage": "ACTIVE"}}},
        {"bodies": {"layers.1": {"blueprint": "x", "config": [], "stage": "ASLEEP"}}},
        {"bodies": {"elsewhere": {"blueprint": "x", "config": [], "stage": "ACTIVE"}}},
        {"ledger": [{"step": 1}]},
        {"format": None},
    ],
)
def test_foreign_json_is_told(change: dict[str, Any]) -> None:
    record = json.loads(bytes(example().to_tensor().tolist())) | change
    tensor = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Manifest.from_tensor(tensor)


@pytest.mark.parametrize("tensor", [None, "text", torch.zeros(2, 2), torch.tensor([0.5]), torch.tensor([300])])
def test_what_is_no_tensor_of_bytes_is_told(tensor: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        Manifest.from_tensor(tensor)


def test_a_newer_format_is_told() -> None:
    record = json.loads(bytes(example().to_tensor().tolist())) | {"format": FORMAT + 1}
    tensor = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=rf"its format is {FORMAT + 1}, this version reads up to {FORMAT}"):
        Manifest.from_tensor(tensor)
