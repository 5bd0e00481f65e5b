"""Which dimension holds features: guessed from the producer, or said by the user of `morph`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper_fx
from esper_fx.checkpoint.manifest import Manifest
from esper_fx.errors import CheckpointError, SiteError
from tests.support.networks import assert_same


class Maps(nn.Module):
    """Channels-last maps [B, H, W, D], as Swin has them: from their shape alone they look like maps [N, C, *]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x_BHWD: Tensor) -> Tensor:
        return self.second(self.first(x_BHWD) + x_BHWD)  # type: ignore[no-any-return]


SITES = ["first", "second"]


def example() -> Tensor:
    return torch.randn(2, 6, 5, 6, generator=torch.Generator().manual_seed(0))


def morphed(feature_dim: Any = None, *, known: bool = True) -> esper_fx.MorphableModel:
    torch.manual_seed(0)
    inputs = (example(),) if known else None
    return esper_fx.morph(Maps(), sites=SITES, example_inputs=inputs, feature_dim=feature_dim)


def dims(model: esper_fx.MorphableModel) -> list[int]:
    return [seed.site.feature_dim for seed in model.seeds.values()]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [1, 1]),
        (-1, [3, 3]),
        (2, [2, 2]),
        (-4, [0, 0]),
        ({"first": -1}, [3, 1]),
        ({"*": -1, "first": 2}, [2, 3]),
        ({"sec*": 3, "**": 0}, [0, 3]),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["from example inputs", "from the first call"])
def test_what_the_user_says_goes_before_the_guess(given: Any, expected: list[int], known: bool) -> None:
    model = morphed(given, known=known)
    model(example())
    assert dims(model) == expected
    assert dims(copy.deepcopy(model)) == expected
    assert [seed.site.features for seed in model.seeds.values()] == [example().shape[dim] for dim in expected]


def test_a_copy_made_before_the_first_call_knows_it_too() -> None:
    model = copy.deepcopy(morphed({"second": -1}, known=False))
    model(example())
    assert dims(model) == [1, 3]


def test_a_body_works_along_it() -> None:
    model = morphed(-1)
    shift = torch.arange(6.0)
    model.seeds["second"].germinate("affine", weights={"scale": torch.zeros(6), "shift": shift})
    assert torch.equal(model(example()), Maps.forward(model, example()) + shift)
    assert {"gated_mlp", "low_rank", "attention"} <= set(model.seeds["first"].fits())
    assert "conv" not in model.seeds["first"].fits()
    with torch.no_grad():
        moved = model.double()(example().double())
    assert moved.dtype == torch.float64
    assert dims(model) == [3, 3]


@pytest.mark.parametrize("fold", [False, True])
def test_unmorph_keeps_what_has_grown_along_it(fold: bool) -> None:
    model = morphed(-1)
    model.seeds["first"].germinate("low_rank", rank=2)
    nn.init.normal_(model.seeds["first"].body.up.weight)
    plain = esper_fx.unmorph(model, fold=fold)
    assert torch.equal(plain(example()), model(example()))


@pytest.mark.parametrize(
    ("layer", "x"), [(nn.Linear(4, 4), torch.randn(2, 4, 4)), (nn.Conv1d(4, 4, 1), torch.randn(2, 4, 4))]
)
def test_where_it_is_not_the_producers_own_a_body_cannot_read_the_input(layer: nn.Module, x: Tensor) -> None:
    own = 1 if isinstance(layer, nn.Conv1d) else 2
    for given in (None, 1, 2):
        site = esper_fx.morph(nn.Sequential(layer), sites="0", example_inputs=(x,), feature_dim=given).seeds["0"].site
        assert (site.source is None) == (given not in (None, own))


@pytest.mark.parametrize(
    ("given", "wording"),
    [
        (4, r"feature_dim=4 does not fit site 'first': its value has shape .*, expected a whole number from -4 to 3"),
        ({"second": -5}, r"feature_dim=-5 does not fit site 'second'"),
        (1.0, r"feature_dim=1.0: expected a whole number, such as 1 for maps"),
        (True, r"feature_dim=True: expected a whole number"),
        ("first", r"feature_dim='first': expected a whole number"),
        ({"first": None}, r"feature_dim=None for 'first': expected a whole number"),
        ({"frist": 1}, r"feature_dim names 'frist', which is none of the sites. Nearest sites: first"),
        ({0: 1}, r"feature_dim names 0, which is none of the sites"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(given: Any, wording: str) -> None:
    with pytest.raises(SiteError, match=wording):
        morphed(given)


def test_what_does_not_fit_is_refused_at_the_first_call_where_nothing_was_known_before() -> None:
    model = morphed({"first": 7}, known=False)
    with pytest.raises(SiteError, match=r"feature_dim=7 does not fit site 'first'"):
        model(example())


# Checkpoints.


def _grown(feature_dim: Any = -1) -> esper_fx.MorphableModel:
    model = morphed(feature_dim)
    model.seeds["first"].germinate("low_rank", rank=2)
    nn.init.normal_(model.seeds["first"].body.up.weight)
    return model


def _without_dims(state_dict: dict[str, Any]) -> dict[str, Any]:
    """As a version of esper_fx wrote it that said nothing of it."""
    manifest = Manifest.from_tensor(state_dict["esper._extra_state"])
    manifest.feature_dims.clear()
    return {**state_dict, "esper._extra_state": manifest.to_tensor()}


ALIKE: Mapping[str, Callable[[], esper_fx.MorphableModel]] = {
    "the same": lambda: morphed(-1),
    "spelt otherwise": lambda: morphed({"first": 3, "second": -1}),
    "not called yet": lambda: morphed(-1, known=False),
    "nothing said, not called yet": lambda: morphed(None, known=False),
    "other where nothing has grown": lambda: morphed({"first": -1, "second": 2}),
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_checkpoint_loads_where_it_is_alike(name: str) -> None:
    model, other = _grown(), ALIKE[name]()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert other.seeds["first"].site.feature_dim == 3
    assert other.seeds["second"].site.feature_dim == (2 if "nothing has" in name else 3)
    assert_same([other(example())], [model(example())])


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("given", [None, 1, 2])
def test_a_body_made_for_another_dimension_is_refused(given: Any, known: bool) -> None:
    if given is None and not known:
        return  # then the checkpoint says it
    other = morphed(given, known=known)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=r"nothing of it was loaded: at site 'first' its body was made") as caught:
        other.load_state_dict(_grown().state_dict())
    assert f"in dimension 3, and this model has them in dimension {given or 1}" in str(caught.value)
    assert "feature_dim={'first': 3}" in str(caught.value)
    assert_same(other.state_dict(), before)
    assert other.seeds["first"].body is None


def test_a_dimension_that_the_checkpoints_value_has_not_is_refused() -> None:
    other = morphed(5, known=False)
    with pytest.raises(CheckpointError, match=r"nothing of it was loaded: feature_dim=5 does not fit site 'first'"):
        other.load_state_dict(_grown().state_dict())


def test_a_checkpoint_that_says_nothing_of_it_is_believed() -> None:
    model, other = _grown(), morphed(-1)
    other.load_state_dict(_without_dims(copy.deepcopy(model.state_dict())))
    assert_same([other(example())], [model(example())])
