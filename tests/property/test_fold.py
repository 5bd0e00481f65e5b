"""unmorph(fold=True): what is linear goes into the weights before it; what is not stays a module, and it says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import esper_fx
from esper_fx.unmorphing.fold import merge
from tests.support.cases import Branching, Tied
from tests.support.examples import examples
from tests.support.growing import assert_same_function, classes_of_ours, grow, randomize

Case = tuple[Callable[[], nn.Module], tuple[int, ...]]

# A layer, and the shape of its input. What it returns has 6 features.
LAYERS: dict[str, Case] = {
    "linear on vectors": (lambda: nn.Linear(4, 6), (3, 4)),
    "linear on tokens": (lambda: nn.Linear(4, 6), (2, 5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), (2, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, (1, 3), dilation=2, bias=False), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, bias=False), (2, 4, 4, 4)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (1, 4, 2, 2, 2)),
}
GROUPED: dict[str, Case] = {
    "conv1d in groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), (2, 6, 5, 5)),
    "transposed in groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 4, 4)),
}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "low_rank": ("low_rank", {"rank": 2}),
    "affine": ("affine", {}),
    "bottleneck without activation": ("bottleneck", {"width": 3, "activation": None}),
    "sequence": ("sequence", {"parts": ["affine", ("low_rank", {"rank": 1}), "affine", ("low_rank", {"rank": 2})]}),
    "sequence in sequence": ("sequence", {"parts": [("sequence", {"parts": ["affine", "affine"]}), "low_rank"]}),
}
ALPHAS = (1.0, 0.4)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


def grown(case: Case, body: str, alpha: float, dtype: torch.dtype) -> tuple[esper_fx.MorphableModel, Tensor]:
    """A layer between others, with a body after it."""
    make, shape = case
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    net = nn.Sequential(nn.Tanh(), make(), nn.Softsign()).to(dtype)
    model = esper_fx.morph(net, sites="1", example_inputs=(x,))
    blueprint, config = BODIES[body]
    grow(model, "1", blueprint, alpha=alpha, **config)
    return model, x


def flops(module: nn.Module, *inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


def entry(plain: nn.Module, site: str) -> dict[str, Any]:
    lineage: Any = plain.lineage
    (found,) = (item for item in lineage["sites"] if item["site"] == site)
    return dict(found)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_folded_model_is_the_host_with_other_weights_and_computes_the_same(
    layer: str, body: str, alpha: float
) -> None:
    model, x = grown(LAYERS[layer], body, alpha, torch.float64)
    plain = esper_fx.unmorph(model, fold=True)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
    assert type(plain) is nn.Sequential
    make, _ = LAYERS[layer]
    host = nn.Sequential(nn.Tanh(), make(), nn.Softsign()).double()
    assert [type(m) for m in plain.modules()] == [type(m) for m in host.modules()]
    assert flops(plain, x) == flops(host, x) < flops(model, x) or body == "affine"
    assert entry(plain, "1")["outcome"] == "folded into 1"
    assert "not_folded" not in entry(plain, "1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", ["linear on tokens", "conv2d"])
def test_a_folded_model_is_as_near_to_the_truth_as_its_dtype_allows(layer: str, dtype: torch.dtype) -> None:
    model, x = grown(LAYERS[layer], "sequence", 0.7, dtype)
    folded, kept = esper_fx.unmorph(model, fold=True), esper_fx.unmorph(model)
    truth = copy.deepcopy(kept).double()(x.double())
    error = float((folded(x).double() - truth).detach().abs().max())
    assert error < 30 * torch.finfo(dtype).eps
    assert all(p.dtype == dtype for p in folded.parameters())


@pytest.mark.parametrize("layer", GROUPED)
def test_a_grouped_convolution_takes_in_what_keeps_its_groups_apart(layer: str) -> None:
    for body, folds in (("affine", True), ("low_rank", False)):
        model, x = grown(GROUPED[layer], body, 0.5, torch.float64)
        plain = esper_fx.unmorph(model, fold=True)
        torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
        assert (type(plain) is nn.Sequential) == folds
        groups = {"depthwise": 6}.get(layer, 2)
        assert entry(plain, "1").get("not_folded") == (
            None if folds else f"its body mixes features across the {groups} groups of the convolution"
        )


def test_blocks_that_stay_within_the_groups_are_folded() -> None:
    model, x = grown(GROUPED["transposed in groups"], "low_rank", 1.0, torch.float64)
    body: Any = model.seeds["1"].body
    with torch.no_grad():  # one rank for the first group, one for the second
        body.down.weight[0, 3:] = 0
        body.down.weight[1, :3] = 0
        body.up.weight[3:, 0] = 0
        body.up.weight[:3, 1] = 0
    plain = esper_fx.unmorph(model, fold=True)
    assert type(plain) is nn.Sequential
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)


@examples(50)
@given(st.data(), st.sampled_from(sorted(LAYERS)), st.floats(-2, 2))
def test_random_chains_fold_into_any_layer(data: st.DataObject, layer: str, alpha: float) -> None:
    make, shape = LAYERS[layer]
    part = st.one_of(
        st.just("affine"),
        st.builds(lambda rank: ("low_rank", {"rank": rank}), st.integers(1, 7)),
        st.builds(lambda width: ("bottleneck", {"width": width, "activation": None}), st.integers(1, 3)),
    )
    parts = data.draw(st.lists(part, min_size=1, max_size=4))
    host = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    y = host(x)
    feature_dim = y.ndim - 1 if isinstance(host, nn.Linear) else 1
    site = esper_fx.SiteSpec("somewhere", tuple(y.shape), y.dtype, y.device, feature_dim)
    body = esper_fx.blueprints.get("sequence").build(site, {"parts": parts}, seed=0)
    randomize(body, data.draw(st.integers(0, 5)))
    expected = y + alpha * body(y)
    merge(host, body, alpha)
    torch.testing.assert_close(host(x), expected, rtol=1e-9, atol=1e-9)


def test_the_new_weights_are_those_of_the_formula() -> None:
    model, _ = grown(LAYERS["linear on vectors"], "bottleneck without activation", 0.4, torch.float64)
    body = model.seeds["1"].body
    assert body is not None
    zero = torch.zeros(1, 6, dtype=torch.float64)
    c = body(zero)[0]
    m = (body(torch.eye(6, dtype=torch.float64)) - c).T  # columns: what becomes of each feature
    weight, bias = model.get_parameter("1.weight"), model.get_parameter("1.bias")
    plain = esper_fx.unmorph(model, fold=True)
    alpha = model.seeds["1"].alpha
    assert abs(alpha - 0.4) < 1e-7
    matrix = torch.eye(6, dtype=torch.float64) + alpha * m
    torch.testing.assert_close(plain.get_parameter("1.weight").data, (matrix @ weight).detach(), rtol=1e-12, atol=1e-12)
    expected = (matrix @ bias + alpha * c).detach()
    torch.testing.assert_close(plain.get_parameter("1.bias").data, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("body", "bias"), [("low_rank", False), ("affine", True)])
def test_a_bias_is_made_only_where_it_is_not_zero(body: str, bias: bool) -> None:
    model, x = grown(LAYERS["linear without bias"], body, 1.0, torch.float64)
    model.get_parameter("1.weight").requires_grad_(False)
    plain = esper_fx.unmorph(model, fold=True)
    layer = plain.get_submodule("1")
    assert (layer.bias is not None) == bias
    assert not any(p.requires_grad for p in layer.parameters())
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)


def test_the_morphed_model_and_the_original_keep_their_weights() -> None:
    model, x = grown(LAYERS["conv2d"], "sequence", 1.0, torch.float32)
    tensors = {name: (id(p), p._version) for name, p in model.named_parameters()}
    values = {name: p.clone() for name, p in model.named_parameters()}
    before = model(x)
    plain = esper_fx.unmorph(model, fold=True)
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == tensors
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert torch.equal(model(x), before)
    assert plain.get_parameter("1.weight") is not model.get_parameter("1.weight")


def test_memory_format_is_kept_and_inference_mode_makes_no_difference() -> None:
    model, x = grown(LAYERS["conv2d"], "affine", 1.0, torch.float32)
    model.get_submodule("1").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.inference_mode():
        plain = esper_fx.unmorph(model, fold=True)
    weight = plain.get_parameter("1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_inference()
    plain(x).sum().backward()
    assert weight.grad is not None


# Several seeds.


class Net(nn.Module):
    """Many ways in which a body may or may not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Tanh(), nn.Linear(4, 4))
        self.read = nn.Linear(4, 4)
        self.weighed = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.drop = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0))
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x)
        x = self.twice(self.twice(x))
        x = self.inner(x)
        y = self.read(x)
        x = y + y
        x = self.weighed(x) + self.weighed.weight.sum()
        return self.last(self.drop(self.norm(x)))


def test_seeds_in_a_row_on_one_layer_fold_one_after_another() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    model = esper_fx.morph(Net().double(), sites=["inner", "inner.1"], example_inputs=(x,))
    grow(model, "inner", "low_rank", alpha=0.5)
    grow(model, "inner.1", "affine", alpha=0.25, seed=1)
    plain = esper_fx.unmorph(model, fold=True)
    assert type(plain) is Net
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
    assert [entry(plain, site)["outcome"] for site in ("inner", "inner.1")] == ["folded into inner.1"] * 2


def test_behind_a_body_that_stays_nothing_is_folded() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    model = esper_fx.morph(Net().double(), sites=["inner", "inner.1"], example_inputs=(x,))
    grow(model, "inner", "affine")
    grow(model, "inner.1", "low_rank", activation="relu", seed=1)
    plain = esper_fx.unmorph(model, fold=True)
    assert_same_function(plain, model, x)
    assert entry(plain, "inner.1")["not_folded"] == "its body has a ReLU, which is not known to be linear"
    assert entry(plain, "inner")["not_folded"] == "the module grown at inner.1 stands between it and the layer"
    assert entry(plain, "inner")["outcome"] == "module grown.inner"


def test_some_are_folded_and_the_others_are_kept() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    model = esper_fx.morph(Net().double(), sites=["plain", "norm"], example_inputs=(x,))
    grow(model, "plain", "low_rank")
    grow(model, "norm", "affine", seed=1)
    plain = esper_fx.unmorph(model, fold=True)
    assert isinstance(plain, fx.GraphModule)
    assert [name for name, _ in plain.get_submodule("grown").named_children()] == ["norm"]
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
    assert entry(plain, "plain")["outcome"] == "folded into plain"
    assert entry(plain, "norm")["not_folded"] == (
        "the value is what a LayerNorm returns, not a Linear or a convolution"
    )
    assert classes_of_ours(plain) == []


REASONS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "activation": ("plain", "low_rank", {"activation": "gelu"}, "its body has a GELU, which is not known to be linear"),
    "own class": ("plain", "gated_mlp", {}, "its body has a GatedMLP, which is not known to be linear"),
    "part of a sequence": (
        "plain",
        "sequence",
        {"parts": ["affine", "channel_gate"]},
        "its body has a ChannelGate, which is not known to be linear",
    ),
    "called twice": ("twice", "affine", {}, "its site is visited 2 times"),
    "weight read elsewhere": ("weighed", "affine", {}, "a weight of the Linear is read elsewhere"),
    "dropout between": ("drop", "affine", {}, "the value is what a Dropout returns, not a Linear or a convolution"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_folded_is_kept_and_it_says_why(reason: str) -> None:
    site, blueprint, config, why = REASONS[reason]
    x = torch.randn(3, 4, requires_grad=True)
    model = esper_fx.morph(Net(), sites=site, example_inputs=(x,))
    grow(model, site, blueprint, **config)
    plain = esper_fx.unmorph(model, fold=True)
    assert_same_function(plain, model, x, gradients_to=1e-5)
    assert entry(plain, site)["not_folded"] == why
    assert entry(plain, site)["outcome"] == f"module grown.{site}"
    assert "not_folded" not in entry(esper_fx.unmorph(model), site)


def test_a_layer_that_is_called_elsewhere_too_is_not_folded() -> None:
    x = torch.randn(3, 4)
    model = esper_fx.morph(Net(), sites=lambda node: node.name == "twice_1", example_inputs=(x,))
    grow(model, "twice_1", "affine")
    plain = esper_fx.unmorph(model, fold=True)
    assert_same_function(plain, model, x)
    assert entry(plain, "twice_1")["not_folded"] == "the Linear is called more than once"


@pytest.mark.parametrize(("kernel_size", "folds"), [(1, True), (3, False)])
def test_convolutions_are_folded_if_they_do_not_mix_positions(kernel_size: int, folds: bool) -> None:
    make, shape = LAYERS["conv2d"]
    x = torch.randn(shape, dtype=torch.float64)
    model = esper_fx.morph(nn.Sequential(make(), nn.Tanh()).double(), sites="0", example_inputs=(x,))
    grow(model, "0", "conv", width=2, kernel_size=kernel_size, activation=None)
    plain = esper_fx.unmorph(model, fold=True)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
    why = None if folds else "its body has a Conv2d that mixes positions"
    assert entry(plain, "0").get("not_folded") == why


def test_a_value_that_something_else_reads_is_folded_only_if_that_reads_the_seed_too() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    model = esper_fx.morph(Net().double(), sites="read", example_inputs=(x,))
    grow(model, "read", "affine")
    plain = esper_fx.unmorph(model, fold=True)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)
    assert entry(plain, "read")["outcome"] == "folded into read"


def test_tied_weights_are_not_folded() -> None:
    x = torch.randn(3, 4)
    for sites, why in (
        ("head", "the Linear shares a weight with another module"),
        ("embed", "its site is visited 2 times"),
    ):
        model = esper_fx.morph(Tied(), sites=sites, example_inputs=(x,))
        grow(model, sites, "low_rank")
        plain = esper_fx.unmorph(model, fold=True)
        assert_same_function(plain, model, x)
        assert entry(plain, sites)["not_folded"] == why
        assert plain.head.weight is plain.embed.weight  # type: ignore[union-attr]


class Twins(nn.Module):
    """Two names for one layer, and a layer whose weight is a view of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.other = self.one
        self.third, self.fourth = nn.Linear(4, 4), nn.Linear(4, 4)
        self.fourth.weight.data = self.third.weight.data

    def forward(self, x: Tensor) -> Tensor:
        return self.fourth(self.third(self.one(x)))


@pytest.mark.parametrize(
    ("site", "why"),
    [("one", "the Linear has 2 names in the model"), ("third", "the Linear shares a weight with another module")],
)
def test_layers_with_two_names_or_shared_memory_are_not_folded(site: str, why: str) -> None:
    x = torch.randn(3, 4)
    model = esper_fx.morph(Twins(), sites=site, example_inputs=(x,))
    grow(model, site, "affine")
    plain = esper_fx.unmorph(model, fold=True)
    assert_same_function(plain, model, x)
    assert entry(plain, site)["not_folded"] == why


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def _hooked(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: _hooked(nn.Linear(4, 4)), "the Linear has hooks"),
        (
            lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
            "the value is what a ParametrizedLinear returns, not a Linear or a convolution",
        ),
        (lambda: Own(4, 4), "the value is what relu returns, not a Linear or a convolution"),
    ],
    ids=["hook", "parametrized", "own class"],
)
def test_layers_whose_weights_are_not_all_there_is_are_not_folded(make: Callable[[], nn.Module], why: str) -> None:
    x = torch.randn(3, 4)
    model = esper_fx.morph(nn.Sequential(make(), nn.Tanh()), sites="0", example_inputs=(x,))
    grow(model, "0", "affine")
    plain = esper_fx.unmorph(model, fold=True)
    assert_same_function(plain, model, x)
    assert entry(plain, "0")["not_folded"] == why


def test_a_body_with_a_hook_or_a_parametrization_is_not_folded() -> None:
    x = torch.randn(3, 4)
    for change, why in (
        (_hooked, "its body has hooks on a Linear"),
        (
            parametrizations.spectral_norm,
            "its body has a ParametrizedLinear, which is not known to be linear",
        ),
    ):
        model = esper_fx.morph(Net(), sites="plain", example_inputs=(x,))
        body: Any = grow(model, "plain", "low_rank").body
        change(body.down)
        plain = esper_fx.unmorph(model.eval(), fold=True)
        assert_same_function(plain, model, x)
        assert entry(plain, "plain")["not_folded"] == why


def test_a_body_along_another_dimension_than_the_layers_is_not_folded() -> None:
    class Windows(nn.Module):
        """Tokens in windows, [B, W, T, D]: a seed at the block takes dimension 1 for the features."""

        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    x = torch.randn(2, 3, 3, 3)
    model = esper_fx.morph(Windows(), sites="block", example_inputs=(x,))
    for blueprint in ("affine", "low_rank"):
        grow(model, "block", blueprint)
        plain = esper_fx.unmorph(model, fold=True)
        assert_same_function(plain, model, x)
        assert entry(plain, "block")["not_folded"] == (
            "its body runs along dimension -3 of the value, the features of the Linear along -1"
        )
        with esper_fx.configure(embargo_steps=0):
            model.seeds["block"].prune()


def test_weights_that_the_dtype_cannot_hold_are_not_made() -> None:
    x = torch.ones(2, 4, dtype=torch.float16)
    model = esper_fx.morph(nn.Sequential(nn.Linear(4, 4).half(), nn.Tanh()), sites="0", example_inputs=(x,))
    body: Any = grow(model, "0", "affine", alpha=1.0).body
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(60000)
        body.scale.fill_(1)
    plain = esper_fx.unmorph(model, fold=True)
    assert entry(plain, "0")["not_folded"] == "the weights would not be finite in torch.float16"


# Layers that are traced on their own, because what calls them cannot be.


def test_a_layer_that_is_a_scope_of_its_own_is_folded() -> None:
    net = Branching().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    model = esper_fx.morph(net, sites="second", example_inputs=(x,))
    model(x)
    grow(model, "second", "low_rank")
    plain = esper_fx.unmorph(model, fold=True)
    assert type(plain) is Branching
    assert type(plain.second) is nn.Linear
    for sign in (1.0, -1.0):
        torch.testing.assert_close(plain(sign * x.abs()), model(sign * x.abs()), rtol=1e-12, atol=1e-12)
    assert entry(plain, "second")["outcome"] == "folded into second"


@pytest.mark.parametrize("layer", ["linear without bias", "conv2d without bias"])
def test_a_model_that_is_one_layer_is_folded(layer: str) -> None:
    make, shape = LAYERS[layer]
    x = torch.randn(shape, dtype=torch.float64)
    model = esper_fx.morph(make().double(), sites=lambda node: node.op == "call_function", example_inputs=(x,))
    (site,) = model.seeds
    grow(model, site, "affine")
    plain = esper_fx.unmorph(model, fold=True)
    assert type(plain) is type(make())
    assert plain.bias is not None
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("host", "shape"),
    [
        (nn.Linear(6, 5), (3, 6)),
        (nn.Linear(6, 5, bias=False), (2, 3, 6)),
        (nn.Conv2d(3, 5, 3, padding=1, stride=2), (2, 3, 6, 6)),
        (nn.Conv1d(3, 4, 3), (2, 3, 7)),
    ],
)
@pytest.mark.parametrize("fold", [False, True])
def test_a_body_that_reads_the_input_is_kept_or_folded(host: nn.Module, shape: tuple[int, ...], fold: bool) -> None:
    net, x = nn.Sequential(host, nn.Tanh()), torch.randn(shape)
    model = esper_fx.morph(net, sites="0", example_inputs=(x,))
    model.seeds["0"].germinate("low_rank", rank=2, reads="input", scale=1.5)
    assert model.seeds["0"].body is not None
    with torch.no_grad():
        for parameter in model.seeds["0"].body.parameters():
            parameter.normal_(0.0, 0.3)
    plain = esper_fx.unmorph(model, fold=fold)
    assert hasattr(plain, "grown") != fold
    assert not torch.allclose(model(x), net(x))
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(net(x), nn.Sequential(host, nn.Tanh())(x))


@pytest.mark.parametrize(
    "host",
    [
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 4, 3, padding="same", dilation=2),
        nn.Conv2d(3, 4, 3, padding=1, groups=1, dilation=1, padding_mode="reflect"),
    ],
    ids=["circular", "dilated", "reflecting"],
)
def test_a_body_that_moves_over_the_input_in_another_way_than_its_convolution_is_kept(host: nn.Module) -> None:
    """LoRA as PEFT has it pads with zeros, and is not dilated where the padding is "same"."""
    net, x = nn.Sequential(host, nn.Tanh()), torch.randn(2, 3, 6, 6)
    model = esper_fx.morph(net, sites="0", example_inputs=(x,))
    model.seeds["0"].germinate("low_rank", rank=2, reads="input")
    with torch.no_grad():
        for parameter in model.seeds["0"].body.parameters():  # type: ignore[union-attr]
            parameter.normal_(0.0, 0.3)
    plain = esper_fx.unmorph(model, fold=True)
    assert "does not move over the input as the Conv2d does" in str(plain.lineage)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(model(x), net(x), atol=1e-2)
