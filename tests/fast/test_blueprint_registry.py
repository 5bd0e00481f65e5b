"""The registry of blueprints, canonical configs, building, and the check of a built body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_fx import blueprints
from esper_fx.blueprints import Blueprint, blueprint, registry, validate_body
from esper_fx.errors import BlueprintError, UnknownBlueprintError
from esper_fx.site import SiteSpec

SITE = SiteSpec("layers.3", (4, 5, 8), torch.float32, torch.device("cpu"), 2)


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def zeros(site: SiteSpec, *, width: int = 3, mode: str = "fast") -> nn.Module:
    """A body that is zero at birth."""
    layer = nn.Linear(site.features, site.features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# Registering and finding.


def test_a_users_blueprint_is_found_by_its_name_and_stays_a_function() -> None:
    assert blueprint("mine", fits=lambda site: "too big" if site.features > 8 else None)(zeros) is zeros
    mine = blueprints.get("mine")
    assert mine.function is zeros
    assert mine.fits(SITE) is None
    assert mine.fits(SiteSpec("a", (2, 9), torch.float32, torch.device("cpu"), 1)) == "too big"
    assert set(blueprints.names()) >= {"bottleneck", "channel_gate", "depthwise_conv", "low_rank", "mine"}
    assert isinstance(mine.build(SITE, {"width": 5}, seed=0), nn.Linear)


def test_a_name_is_taken_once_unless_it_is_to_be_replaced() -> None:
    with pytest.raises(
        BlueprintError,
        match=r"^a blueprint 'low_rank' is already registered \(low_rank\): choose another name, or pass replace=True$",
    ):
        blueprint("low_rank")(zeros)
    assert blueprints.get("low_rank").function is not zeros
    blueprint("low_rank", replace=True)(zeros)
    assert blueprints.get("low_rank").function is zeros


def test_an_unknown_name_lists_what_there_is_and_the_nearest() -> None:
    with pytest.raises(UnknownBlueprintError) as refusal:
        blueprints.get("lowrank")
    assert str(refusal.value) == (
        f"no blueprint is registered under 'lowrank': there are {', '.join(blueprints.names())} (did you mean 'low_rank'?)"
    )
    assert isinstance(refusal.value, KeyError)
    with pytest.raises(UnknownBlueprintError, match=r"low_rank"):
        blueprints.get("zzz")


def _no_arguments() -> nn.Module:
    return zeros(SITE)


def _keyword_site(*, site: SiteSpec) -> nn.Module:
    return zeros(SITE)


def _star(site: SiteSpec, *sizes: int) -> nn.Module:
    return zeros(SITE)


def _double_star(site: SiteSpec, **options: int) -> nn.Module:
    return zeros(SITE)


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("x", _no_arguments, r"^blueprint 'x' must take the site as its first argument: def x\(site, \*, \.\.\.\)$"),
        ("x", _keyword_site, r"^blueprint 'x' must take the site as its first argument"),
        ("x", _star, r"^blueprint 'x' takes \*sizes: expected parameters with names of their own"),
        (
            "x",
            _double_star,
            r"^blueprint 'x' takes \*\*options: expected parameters with names of their own",
        ),
        ("", zeros, r"^a blueprint's name is a non-empty string, not '': write @blueprint\('my_adapter'\)$"),
        (zeros, zeros, r"^a blueprint's name is a non-empty string, not <function zeros"),
    ],
)
def test_what_cannot_be_a_blueprint(name: Any, function: Callable[..., nn.Module], message: str) -> None:
    with pytest.raises(BlueprintError, match=message):
        blueprint(name)(function)
    assert "x" not in blueprints.names()


# Configs.

values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
    max_leaves=4,
)


def canonical(value: Any) -> Any:
    """An independent notion of equal values: by type and repr, whatever the order of a dict."""
    if isinstance(value, dict):
        return {key: canonical(item) for key, item in value.items()}
    return [canonical(item) for item in value] if isinstance(value, list) else (type(value), repr(value))


@given(a=st.tuples(values, values), b=st.tuples(values, values))
def test_config_keys_are_equal_exactly_if_the_configs_are(a: tuple[Any, Any], b: tuple[Any, Any]) -> None:
    mine = Blueprint("mine", zeros)
    keys = [mine.config_key({"width": width, "mode": mode}) for width, mode in (a, b)]
    assert (keys[0] == keys[1]) == (canonical(list(a)) == canonical(list(b)))
    swapped = {"mode": a[1], "width": a[0]}
    assert mine.config_key(swapped) == keys[0]
    assert hash(mine.config_key(swapped)) == hash(keys[0])


LOOKALIKES = [
    0,
    0.0,
    -0.0,
    False,
    1,
    1.0,
    True,
    "1",
    None,
    "None",
    float("nan"),
    (),
    [],
    {},
    [1],
    [1.0],
    {"a": 1},
    {"a": True},
]


@pytest.mark.parametrize("value", LOOKALIKES, ids=repr)
def test_config_keys_tell_values_apart_that_python_takes_for_equal(value: Any) -> None:
    keys = [Blueprint("mine", zeros).config_key({"width": other}) for other in LOOKALIKES]
    key = Blueprint("mine", zeros).config_key({"width": value})
    assert [repr(other) for other, other_key in zip(LOOKALIKES, keys, strict=True) if other_key == key] == [repr(value)]


def test_a_config_gets_the_defaults_in_the_order_of_the_signature() -> None:
    mine = Blueprint("mine", zeros)
    assert list(mine.bind({"mode": "slow"}).items()) == [("width", 3), ("mode", "slow")]
    assert mine.config_key({}) == mine.config_key({"mode": "fast", "width": 3}) == mine.config_key({"width": 3})
    assert mine.config_key({}) != mine.config_key({"width": 4})
    assert mine.config_key({"width": {"a": 1, "b": 2}}) == mine.config_key({"width": {"b": 2, "a": 1}})


def needy(site: SiteSpec, *, depth: int) -> nn.Module:
    return zeros(site)


def plain(site: SiteSpec) -> nn.Module:
    return zeros(site)


@pytest.mark.parametrize(
    ("function", "config", "message"),
    [
        (
            zeros,
            {"widht": 9},
            "blueprint 'mine' has no parameter 'widht' (given widht=9): it accepts width=3, mode='fast' "
            "(did you mean 'width'?)",
        ),
        (
            zeros,
            {"site": 1},
            "blueprint 'mine' has no parameter 'site' (given site=1): it accepts width=3, mode='fast'",
        ),
        (needy, {}, "blueprint 'mine' needs the parameter 'depth', which is missing: it accepts depth"),
        (
            plain,
            {"rank": 1},
            "blueprint 'mine' has no parameter 'rank' (given rank=1): it accepts no parameters",
        ),
    ],
)
def test_parameters_that_do_not_fit(function: Callable[..., nn.Module], config: dict[str, Any], message: str) -> None:
    mine = Blueprint("mine", function)
    for attempt in (mine.bind, mine.config_key, lambda config: mine.build(SITE, config, seed=0)):
        with pytest.raises(BlueprintError) as refusal:
            attempt(config)
        assert str(refusal.value) == message


def test_a_value_that_cannot_be_hashed_is_named() -> None:
    with pytest.raises(
        BlueprintError,
        match=r"^parameter 'width' of blueprint 'mine' is \{1\}, which cannot be hashed: expected numbers",
    ):
        Blueprint("mine", zeros).config_key({"width": [2, {1}]})


# Building.


def test_errors_of_the_function_are_wrapped_and_say_where_and_with_what() -> None:
    def broken(site: SiteSpec, *, depth: int = 2) -> nn.Module:
        raise ZeroDivisionError("of all things")

    with pytest.raises(BlueprintError) as refusal:
        Blueprint("mine", broken).build(SITE, {}, seed=0)
    assert str(refusal.value) == (
        "blueprint 'mine' failed to build a body for site 'layers.3' [4, 5, 8] with depth=2: "
        "ZeroDivisionError: of all things"
    )
    assert isinstance(refusal.value.__cause__, ZeroDivisionError)


def test_what_was_built_must_be_a_module() -> None:
    with pytest.raises(
        BlueprintError, match=r"^blueprint 'mine' returned str for site 'layers\.3': expected an nn\.Module$"
    ):
        Blueprint("mine", cast(Any, lambda site: "zeros")).build(SITE, {}, seed=0)


def test_a_failing_build_gives_the_random_state_back_too() -> None:
    def broken(site: SiteSpec) -> nn.Module:
        torch.rand(3)
        raise RuntimeError

    before = torch.get_rng_state()
    with pytest.raises(BlueprintError):
        Blueprint("mine", broken).build(SITE, {}, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_body_for_meta_is_built_with_values_first_and_moved() -> None:
    site = SiteSpec("a", (2, 8), torch.bfloat16, torch.device("meta"), 1)
    body = Blueprint("mine", zeros).build(site, {}, seed=0)
    assert {(p.device.type, p.dtype) for p in body.parameters()} == {("meta", torch.bfloat16)}


# Validation.


class Body(nn.Module):
    """A body with everything that validation must leave alone: BatchNorm, dropout, gradients, a counter."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.norm = nn.BatchNorm1d(5)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.function(self.dropout(self.norm(x)) * 0.0)


def test_validation_leaves_no_trace() -> None:
    body = Body(lambda x: x)
    for parameter in body.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {key: value.clone() for key, value in body.state_dict().items()}
    random_state = torch.get_rng_state()
    validate_body("mine", body, SITE)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items())
    assert all(p.grad is not None and torch.equal(p.grad, torch.ones_like(p)) for p in body.parameters())
    assert body.calls == 0
    assert body.training


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x: x[..., :4],
            "maps an input of shape [2, 5, 8] to one of shape [2, 5, 4]: expected the same shape, because it is added "
            "to its input",
        ),
        (
            lambda x: x.double(),
            "maps an input of dtype torch.float32 to one of dtype torch.float64: expected the same dtype, because it "
            "is added to its input",
        ),
        (
            lambda x: x.to("meta"),
            "maps an input of device cpu to one of device meta: expected the same device, because it is added to its "
            "input",
        ),
        (lambda x: (x, x), "returned tuple: expected one tensor of the input's shape [2, 5, 8]"),
        (
            lambda x: x - 2.5,
            "is not zero at birth (its largest value is 2.5): zero-initialise its last layer, so that germination does "
            "not change what the model computes",
        ),
        (
            lambda x: x / 0.0,
            "is not zero at birth (its largest value is nan): zero-initialise its last layer, so that germination does "
            "not change what the model computes",
        ),
        (lambda x: x.view(7), "failed on an input of shape [2, 5, 8]: RuntimeError: shape '[7]' is invalid for input"),
    ],
)
def test_a_body_that_does_not_fit_is_refused(function: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(BlueprintError) as refusal:
        validate_body("mine", Body(function), SITE)
    assert str(refusal.value).startswith(f"the body that blueprint 'mine' built for site 'layers.3' {message}")


def test_a_body_that_writes_into_its_input_is_refused() -> None:
    body = nn.Sequential(nn.ReLU(inplace=True), zeros(SITE))
    with pytest.raises(BlueprintError, match=r"changes its input in place: expected it to leave it alone"):
        validate_body("mine", body, SITE)


def test_trained_bodies_need_not_be_zero_but_must_fit() -> None:
    validate_body("mine", Body(lambda x: x + 1), SITE, allow_nonzero=True)
    with pytest.raises(BlueprintError, match="expected the same shape"):
        validate_body("mine", Body(lambda x: x[0]), SITE, allow_nonzero=True)


@pytest.mark.parametrize("shape", [(1, 5, 8), (1000, 5, 8)])
def test_only_the_batch_is_cut_for_validation(shape: tuple[int, ...]) -> None:
    seen: list[torch.Size] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.shape)
            return torch.zeros_like(x)

    validate_body("mine", Watched(), SiteSpec("a", shape, torch.float32, torch.device("cpu"), 2))
    validate_body("mine", Watched(), SiteSpec("a", (8,), torch.float32, torch.device("cpu"), 0))
    assert seen == [(min(shape[0], 2), 5, 8), (8,)]


def test_validation_looks_past_the_callers_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        validate_body("mine", zeros(SITE), SITE)
