"""Every builtin blueprint against NumPy in float64: values, gradients by hand, and what a body is like at birth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_fx import blueprints
from esper_fx.errors import BlueprintError
from esper_fx.site import SiteSpec

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = dict[str, Array]
# The derivative of each activation beside it.
ACTIVATIONS: dict[str | None, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    None: (lambda a: a, np.ones_like),
    "relu": (lambda a: np.where(a > 0, a, 0.0), lambda a: np.where(a > 0, 1.0, 0.0)),
    "silu": (
        lambda a: a / (1 + np.exp(-a)),
        lambda a: (1 + a * np.exp(-a) / (1 + np.exp(-a))) / (1 + np.exp(-a)),
    ),
    "gelu": (
        lambda a: a * (1 + np.vectorize(math.erf)(a / math.sqrt(2))) / 2,
        lambda a: (1 + np.vectorize(math.erf)(a / math.sqrt(2))) / 2 + a * np.exp(-(a**2) / 2) / math.sqrt(2 * math.pi),
    ),
}


def site_of(shape: tuple[int, ...], feature_dim: int, dtype: torch.dtype = torch.float64) -> SiteSpec:
    return SiteSpec("layers.3", shape, dtype, torch.device("cpu"), feature_dim)


# References: from input, parameters and the gradient of the delta to the delta, the gradient of the input and those of
# the parameters. Features are the last dimension here, and [positions, D] the shape, also for maps.


def perceptron(x: Array, p: Arrays, g: Array, activation: str | None) -> tuple[Array, Array, Arrays]:
    act, slope = ACTIVATIONS[activation]
    a = x @ p["down.weight"].T + p.get("down.bias", 0.0)
    delta = act(a) @ p["up.weight"].T + p.get("up.bias", 0.0)
    g_a = (g @ p["up.weight"]) * slope(a)
    grads = {"up.weight": g.T @ act(a), "up.bias": g.sum(0), "down.weight": g_a.T @ x, "down.bias": g_a.sum(0)}
    return delta, g_a @ p["down.weight"], {name: grads[name] for name in p}


def reference_low_rank(x: Array, p: Arrays, g: Array, **config: Any) -> tuple[Array, Array, Arrays]:
    assert set(p) == {"down.weight", "up.weight"}
    return perceptron(x, p, g, config.get("activation"))


def reference_bottleneck(x: Array, p: Arrays, g: Array, **config: Any) -> tuple[Array, Array, Arrays]:
    assert set(p) == {"down.weight", "down.bias", "up.weight", "up.bias"}
    return perceptron(x, p, g, config.get("activation", "gelu"))


def reference_channel_gate(x: Array, p: Arrays, g: Array, **config: Any) -> tuple[Array, Array, Arrays]:
    # x: [N, positions, D], one gate for all positions; y = x + delta = x * 2 sigmoid(s).
    s: Array
    s, _, _ = perceptron(x.mean(1), p, np.zeros_like(x[:, 0]), "relu")
    sigmoid = 1 / (1 + np.exp(-s))
    delta = x * 2 * sigmoid[:, None] - x
    g_s = (g * x).sum(1) * 2 * sigmoid * (1 - sigmoid)
    _, g_mean, grads = perceptron(x.mean(1), p, g_s, "relu")
    g_x = g * (2 * sigmoid[:, None] - 1) + np.broadcast_to(g_mean[:, None] / x.shape[1], x.shape)
    return delta, g_x, grads


def reference_depthwise_conv(x: Array, p: Arrays, g: Array, **config: Any) -> tuple[Array, Array, Arrays]:
    weight = p["weight"]
    k = weight.shape[-1]
    margin = ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2))
    padded, g_padded = np.pad(x, margin), np.zeros_like(np.pad(x, margin))
    height, width = x.shape[2:]
    delta = np.zeros_like(x) + p["bias"][:, None, None]
    g_weight = np.zeros_like(weight)
    for i in range(k):
        for j in range(k):
            window = np.s_[:, :, i : i + height, j : j + width]
            delta += padded[window] * weight[:, 0, i, j][:, None, None]
            g_weight[:, 0, i, j] = (g * padded[window]).sum((0, 2, 3))
            g_padded[window] += g * weight[:, 0, i, j][:, None, None]
    g_x = g_padded[:, :, k // 2 : k // 2 + height, k // 2 : k // 2 + width]
    return delta, g_x, {"weight": g_weight, "bias": g.sum((0, 2, 3))}


REFERENCES = {
    "low_rank": reference_low_rank,
    "bottleneck": reference_bottleneck,
    "channel_gate": reference_channel_gate,
    "depthwise_conv": reference_depthwise_conv,
}


def to_reference(name: str, site: SiteSpec, array: Array) -> Array:
    """The layout that a reference works in."""
    if name == "depthwise_conv":
        return array
    if site.is_channel_first:
        rows: Array = np.moveaxis(array, 1, -1).reshape(array.shape[0], -1, array.shape[1])
        return rows if name == "channel_gate" else rows.reshape(-1, array.shape[1])
    rows = array.reshape(-1, array.shape[-1])
    return rows[:, None, :] if name == "channel_gate" else rows


def from_reference(name: str, site: SiteSpec, array: Array) -> Array:
    if name == "depthwise_conv" or not site.is_channel_first:
        return array.reshape(site.shape)
    n, c, *positions = site.shape
    return np.moveaxis(array.reshape(n, *positions, c), -1, 1)


def reference(case: Case, x: Tensor, parameters: Mapping[str, Tensor], g: Tensor) -> tuple[Array, Array, Arrays]:
    """Delta, gradient of x and gradients of the parameters, in the shapes of the body."""
    name, site = case.name, case.site
    arrays = {key: value.detach().numpy().copy() for key, value in parameters.items()}
    shapes = {key: value.shape for key, value in arrays.items()}
    if name != "depthwise_conv":  # 1x1 convolutions are matrices
        arrays = {key: value.reshape(value.shape[:2]) for key, value in arrays.items()}
    forth = [to_reference(name, site, tensor.detach().numpy()) for tensor in (x, g)]
    delta, g_x, grads = REFERENCES[name](forth[0], arrays, forth[1], **case.config)
    back = [from_reference(name, site, array) for array in (delta, g_x)]
    return back[0], back[1], {key: value.reshape(shapes[key]) for key, value in grads.items()}


@dataclass
class Case:
    name: str
    site: SiteSpec
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def body(self) -> nn.Module:
        return blueprints.get(self.name).build(self.site, self.config, seed=self.seed)

    def tensors(self, count: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.randn(self.site.shape, dtype=torch.float64, generator=generator) for _ in range(count)]


sizes = st.integers(1, 5)
features = st.integers(1, 9)
vectors = st.builds(lambda n, d: site_of((n, d), 1), sizes, features)
tokens = st.builds(lambda n, t, d: site_of((n, t, d), 2), sizes, sizes, features)
maps = {
    ndim: st.builds(lambda n, c, *rest: site_of((n, c, *rest), 1), sizes, features, *[sizes] * (ndim - 2))
    for ndim in (3, 4, 5)
}
any_site = vectors | tokens | maps[3] | maps[4] | maps[5]
activations = st.sampled_from([None, "relu", "gelu", "silu"])
seeds = st.integers(0, 2**32 - 1)
CASES = {
    "low_rank": st.builds(
        Case,
        st.just("low_rank"),
        any_site,
        st.fixed_dictionaries({}, optional={"rank": st.integers(1, 12), "activation": activations}),
        seeds,
    ),
    "bottleneck": st.builds(
        Case,
        st.just("bottleneck"),
        any_site,
        st.fixed_dictionaries({}, optional={"width": st.integers(1, 12), "activation": activations}),
        seeds,
    ),
    "channel_gate": st.builds(
        Case,
        st.just("channel_gate"),
        any_site,
        st.fixed_dictionaries({}, optional={"reduction": st.integers(1, 12)}),
        seeds,
    ),
    "depthwise_conv": st.builds(
        Case,
        st.just("depthwise_conv"),
        maps[4],
        st.fixed_dictionaries({}, optional={"kernel_size": st.sampled_from([1, 3, 5])}),
        seeds,
    ),
}
BUILTIN = sorted(CASES)
SHAPES = [((6, 16), 1), ((2, 5, 16), 2), ((2, 16, 5), 1), ((2, 16, 4, 5), 1), ((2, 16, 3, 4, 2), 1)]
FITTING = [
    (name, *shape)
    for name in BUILTIN
    for shape in SHAPES
    if name != "depthwise_conv" or (len(shape[0]) == 4 and shape[1] == 1)
]


@pytest.mark.parametrize("name", BUILTIN)
@given(data=st.data())
@settings(max_examples=25)
def test_value_and_gradients_equal_the_reference(name: str, data: st.DataObject) -> None:
    case = data.draw(CASES[name])
    body = case.body()
    x, g = case.tensors(2)
    generator = torch.Generator().manual_seed(case.seed + 1)
    with torch.no_grad():
        for parameter in body.parameters():  # away from zero
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator), alpha=0.5)
    x.requires_grad_()
    delta = body(x)
    delta.backward(g)
    expected, g_x, grads = reference(case, x, dict(body.named_parameters()), g)
    assert x.grad is not None
    np.testing.assert_allclose(delta.detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), g_x, rtol=1e-10, atol=1e-12)
    assert set(grads) == {key for key, _ in body.named_parameters()}
    for key, parameter in body.named_parameters():
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.numpy(), grads[key], rtol=1e-10, atol=1e-12, err_msg=key)


@pytest.mark.parametrize(("name", "shape", "feature_dim"), FITTING)
def test_training_follows_the_reference_step_by_step_and_learns(
    name: str, shape: tuple[int, ...], feature_dim: int
) -> None:
    case = Case(name, site_of(shape, feature_dim), seed=3)
    body, (x, target) = case.body(), case.tensors(2)
    shadow = {key: parameter.detach().clone() for key, parameter in body.named_parameters()}
    optimizer = torch.optim.SGD(body.parameters(), lr=0.5)
    losses = []
    for _ in range(12):
        loss = ((body(x) - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        error = reference(case, x, shadow, x)[0] - target.numpy()
        grads = reference(case, x, shadow, torch.from_numpy(2 * error / error.size))[2]
        shadow = {key: value - 0.5 * torch.from_numpy(grads[key]) for key, value in shadow.items()}
    for key, parameter in body.named_parameters():
        assert not torch.equal(parameter, case.body().get_parameter(key))
        torch.testing.assert_close(parameter.detach(), shadow[key], rtol=1e-8, atol=1e-10)
    assert sorted(losses, reverse=True) == losses


# At birth.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "shape", "feature_dim"), FITTING)
def test_a_body_is_zero_at_birth_in_the_sites_dtype(
    name: str, shape: tuple[int, ...], feature_dim: int, dtype: torch.dtype
) -> None:
    body = Case(name, site_of(shape, feature_dim, dtype)).body()
    assert {parameter.dtype for parameter in body.parameters()} == {dtype}
    assert all(parameter.requires_grad for parameter in body.parameters())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    delta = body(x)
    assert (delta.shape, delta.dtype) == (x.shape, dtype)
    assert torch.equal(delta, torch.zeros_like(x))


@pytest.mark.parametrize(("name", "shape", "feature_dim"), FITTING)
def test_gradient_reaches_the_last_layer_at_once_and_all_layers_after_a_step(
    name: str, shape: tuple[int, ...], feature_dim: int
) -> None:
    case = Case(name, site_of(shape, feature_dim))
    body, (x, target) = case.body(), case.tensors(2)
    last = {key for key, _ in body.named_parameters() if name == "depthwise_conv" or key.startswith("up.")}
    assert {key for key, parameter in body.named_parameters() if not parameter.any()} == last
    optimizer = torch.optim.SGD(body.parameters(), lr=0.1)

    def reached() -> set[str]:
        optimizer.zero_grad()
        (body(x) * target).sum().backward()
        return {
            key for key, parameter in body.named_parameters() if parameter.grad is not None and parameter.grad.any()
        }

    assert reached() == last
    optimizer.step()
    assert reached() == {key for key, _ in body.named_parameters()}


@pytest.mark.parametrize("name", sorted(set(BUILTIN) - {"depthwise_conv"}))
def test_the_seed_alone_decides_the_initial_values(name: str) -> None:
    case = Case(name, site_of((2, 5, 16), 2), seed=5)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = case.body().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    again = case.body().state_dict()
    with torch.inference_mode(), torch.device("meta"):
        elsewhere = case.body()
    case.seed = 6
    other = case.body().state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(torch.equal(first[key], value) for key, value in elsewhere.state_dict().items())
    assert not any(parameter.is_inference() for parameter in elsewhere.parameters())
    assert not torch.equal(first["down.weight"], other["down.weight"])


@pytest.mark.parametrize(("name", "shape", "feature_dim"), FITTING)
def test_bodies_pass_their_own_validation(name: str, shape: tuple[int, ...], feature_dim: int) -> None:
    case = Case(name, site_of(shape, feature_dim, torch.float32))
    blueprints.validate_body(name, case.body(), case.site)


@pytest.mark.parametrize("name", ["low_rank", "bottleneck", "channel_gate"])
def test_on_tokens_a_body_looks_at_one_token_at_a_time(name: str) -> None:
    case = Case(name, site_of((2, 6, 8), 2))
    body, (x, other) = case.body(), case.tensors(2)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(0.3)
        mixed = torch.cat([x[:, :3], other[:, 3:]], 1)
        delta, delta_mixed = body(x), body(mixed)
    torch.testing.assert_close(delta[:, :3], delta_mixed[:, :3], rtol=1e-12, atol=0)
    assert not torch.allclose(delta[:, 3:], delta_mixed[:, 3:])


@pytest.mark.parametrize(("name", "shape", "feature_dim"), FITTING)
def test_a_body_takes_other_sizes_than_the_sites(name: str, shape: tuple[int, ...], feature_dim: int) -> None:
    body = Case(name, site_of(shape, feature_dim)).body()
    other = [size if dim == feature_dim else size + 1 for dim, size in enumerate(shape)]
    assert body(torch.ones(other, dtype=torch.float64)).shape == tuple(other)


def test_default_widths() -> None:
    def widths(features: int) -> dict[str, int]:
        cases = [Case(name, site_of((2, features), 1)) for name in ("bottleneck", "channel_gate", "low_rank")]
        return {case.name: case.body().get_parameter("down.weight").shape[0] for case in cases}

    assert widths(256) == {"bottleneck": 64, "channel_gate": 16, "low_rank": 8}
    assert widths(32) == {"bottleneck": 8, "channel_gate": 8, "low_rank": 8}
    assert widths(3) == {"bottleneck": 1, "channel_gate": 3, "low_rank": 8}


# Bad input.

TOKENS, IMAGE = site_of((2, 5, 8), 2), site_of((2, 8, 4, 4), 1)


@pytest.mark.parametrize(
    ("name", "site", "config", "message"),
    [
        ("low_rank", TOKENS, {"rank": 0}, "rank=0 for blueprint 'low_rank': expected a whole number from 1"),
        ("low_rank", TOKENS, {"rank": 2.0}, "rank=2.0 for blueprint 'low_rank': expected a whole number from 1"),
        ("low_rank", TOKENS, {"rank": True}, "rank=True for blueprint 'low_rank': expected a whole number from 1"),
        (
            "low_rank",
            TOKENS,
            {"activation": "tanh"},
            "activation='tanh' for blueprint 'low_rank': expected None, 'relu', 'gelu', 'silu'",
        ),
        ("bottleneck", TOKENS, {"width": -3}, "width=-3 for blueprint 'bottleneck': expected a whole number from 1"),
        (
            "bottleneck",
            TOKENS,
            {"activation": nn.ReLU},
            "activation=<class 'torch.nn.modules.activation.ReLU'> for blueprint 'bottleneck': "
            "expected None, 'relu', 'gelu', 'silu'",
        ),
        (
            "channel_gate",
            IMAGE,
            {"reduction": 0},
            "reduction=0 for blueprint 'channel_gate': expected a whole number from 1",
        ),
        (
            "depthwise_conv",
            IMAGE,
            {"kernel_size": 0},
            "kernel_size=0 for blueprint 'depthwise_conv': expected a whole number from 1",
        ),
        (
            "depthwise_conv",
            IMAGE,
            {"kernel_size": 4},
            "kernel_size=4 for blueprint 'depthwise_conv': expected an odd number",
        ),
        (
            "depthwise_conv",
            TOKENS,
            {},
            "blueprint 'depthwise_conv' does not fit site 'layers.3': its shape is [2, 5, 8] with features in "
            "dimension 2, expected a map [N, C, *] with 3 to 5 dimensions",
        ),
        (
            "low_rank",
            site_of((2, 3, 4, 4, 4, 4), 1),
            {},
            "blueprint 'low_rank' does not fit site 'layers.3': it is a map with 6 dimensions, expected 3 to 5",
        ),
        (
            "bottleneck",
            site_of((2, 3, 4, 4), 2),
            {},
            "blueprint 'bottleneck' does not fit site 'layers.3': its features are dimension 2 of 4, expected 1 or the "
            "last one",
        ),
        *(
            (
                name,
                site_of(IMAGE.shape, 1, torch.int64),
                {},
                f"blueprint {name!r} does not fit site 'layers.3': its dtype is torch.int64, expected a floating one",
            )
            for name in BUILTIN
        ),
    ],
)
def test_what_a_blueprint_rejects(name: str, site: SiteSpec, config: dict[str, Any], message: str) -> None:
    with pytest.raises(BlueprintError) as refusal:
        blueprints.get(name).build(site, config, seed=0)
    assert str(refusal.value) == message
