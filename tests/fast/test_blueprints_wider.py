"""The blueprints beyond the first four: values against plain formulas in float64, gradients against differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from esper_fx import blueprints
from esper_fx.errors import BlueprintError
from esper_fx.site import SiteSpec

Parameters = dict[str, Tensor]


def site_of(shape: tuple[int, ...], feature_dim: int, dtype: torch.dtype = torch.float64) -> SiteSpec:
    return SiteSpec("layers.3", shape, dtype, torch.device("cpu"), feature_dim)


TOKENS = site_of((2, 5, 8), 2)
VECTORS = site_of((3, 8), 1)
SEQUENCE_MAP = site_of((2, 8, 7), 1)
IMAGE = site_of((2, 8, 4, 5), 1)
VOLUME = site_of((2, 8, 3, 2, 4), 1)
SITES = [TOKENS, VECTORS, SEQUENCE_MAP, IMAGE, VOLUME]


# Formulas over features in the last dimension: [N, positions, D].


def affine(x: Tensor, p: Parameters) -> Tensor:
    return x * (1 + p["scale"]) + p["shift"] - x


def gated_mlp(x: Tensor, p: Parameters) -> Tensor:
    gate, up = (x @ p[name].flatten(1).T for name in ("gate.weight", "up.weight"))
    return (gate / (1 + torch.exp(-gate)) * up) @ p["down.weight"].flatten(1).T


def attention(x: Tensor, p: Parameters, heads: int, causal: bool) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    normal = (x - mean) / torch.sqrt(variance + 1e-5) * p["norm.weight"] + p["norm.bias"]
    query, key, value = (normal @ p["qkv.weight"].T + p["qkv.bias"]).chunk(3, -1)
    width = query.shape[-1] // heads
    mixed = torch.zeros_like(query)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for t in range(x.shape[1]):
            seen = slice(0, t + 1) if causal else slice(None)
            scores = (query[:, t : t + 1, part] * key[:, seen, part]).sum(-1) / math.sqrt(width)
            mixed[:, t, part] = (torch.softmax(scores, 1)[..., None] * value[:, seen, part]).sum(1)
    return mixed @ p["out.weight"].T + p["out.bias"]


def by_features(site: SiteSpec, formula: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a formula for [N, positions, D] at a site of any kind."""
    if site.is_channel_first:
        n, c, *positions = x.shape
        return formula(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(n, c, *positions)
    return formula(x.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape)


def body_of(name: str, site: SiteSpec, **config: Any) -> nn.Module:
    """A body away from zero."""
    body = blueprints.get(name).build(site, config, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator), alpha=0.4)
    return body


def input_of(site: SiteSpec) -> Tensor:
    return torch.randn(site.shape, dtype=site.dtype, generator=torch.Generator().manual_seed(0))


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A dense convolution of the same size, position by position."""
    k, rank = weight.shape[-1], x.ndim - 2
    padded = functional.pad(x, [k // 2] * 2 * rank)
    windows = padded
    for dim in range(rank):
        windows = windows.unfold(2 + dim, k, 1)
    windows = windows.flatten(2 + rank)  # [N, C, *positions, kᵈ]
    return torch.einsum("nc...k,dck->nd...", windows, weight.flatten(2)) + bias.view(-1, *[1] * rank)


FORMULAS: list[tuple[str, SiteSpec, dict[str, Any], Callable[[Tensor, Parameters], Tensor]]] = [
    *[("affine", site, {}, lambda x, p, site=site: by_features(site, lambda v: affine(v, p), x)) for site in SITES],
    *[
        ("gated_mlp", site, {"width": 6}, lambda x, p, site=site: by_features(site, lambda v: gated_mlp(v, p), x))
        for site in SITES
    ],
    *[
        (
            "attention",
            site,
            {"heads": 2, "width": 6, "causal": causal},
            lambda x, p, site=site, causal=causal: by_features(site, lambda v: attention(v, p, 2, causal), x),
        )
        for site in (TOKENS, SEQUENCE_MAP, IMAGE)
        for causal in (False, True)
    ],
    *[
        (
            "conv",
            site,
            {"width": 3, "activation": "silu"},
            lambda x, p: convolve(
                functional.silu(
                    convolve(functional.silu(convolve(x, p["0.weight"], p["0.bias"])), p["2.weight"], p["2.bias"])
                ),
                p["4.weight"],
                p["4.bias"],
            ),
        )
        for site in (SEQUENCE_MAP, IMAGE, VOLUME)
    ],
    *[
        (
            "depthwise_conv",
            site,
            {},
            lambda x, p: convolve(x, _spread(p["weight"]), p["bias"]),
        )
        for site in (SEQUENCE_MAP, IMAGE, VOLUME)
    ],
]


def _spread(weight: Tensor) -> Tensor:
    """The dense filters that equal depthwise ones."""
    dense = weight.new_zeros(weight.shape[0], weight.shape[0], *weight.shape[2:])
    for channel in range(weight.shape[0]):
        dense[channel, channel] = weight[channel, 0]
    return dense


def ids(entry: Any) -> str | None:
    return str(list(entry.shape)) if isinstance(entry, SiteSpec) else None


@pytest.mark.parametrize(("name", "site", "config", "formula"), FORMULAS, ids=ids)
def test_value_equals_the_formula_and_gradients_the_differences(
    name: str, site: SiteSpec, config: dict[str, Any], formula: Callable[[Tensor, Parameters], Tensor]
) -> None:
    body, x = body_of(name, site, **config), input_of(site)
    parameters = dict(body.named_parameters())
    torch.testing.assert_close(body(x), formula(x, parameters), rtol=1e-9, atol=1e-9)

    def as_function(value: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(body, dict(zip(parameters, tensors, strict=True)), (value,))

    free = [tensor.detach().clone().requires_grad_() for tensor in (x, *parameters.values())]
    assert torch.autograd.gradcheck(as_function, free, fast_mode=True)


@pytest.mark.parametrize("name", ["affine", "gated_mlp", "attention", "conv", "depthwise_conv"])
@pytest.mark.parametrize("site", SITES, ids=ids)
def test_zero_at_birth_and_learns(name: str, site: SiteSpec) -> None:
    blueprint = blueprints.get(name)
    if blueprint.fits(site) is not None:
        pytest.skip(f"{name} does not fit {list(site.shape)}")
    body = blueprint.build(site, {}, seed=0)
    blueprints.validate_body(name, body, site)
    before = [parameter.detach().clone() for parameter in body.parameters()]
    optimizer = torch.optim.SGD(body.parameters(), lr=0.1)
    x, target = input_of(site), torch.ones(site.shape, dtype=site.dtype)
    for _ in range(3):
        optimizer.zero_grad()
        functional.mse_loss(x + body(x), target).backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, body.parameters(), strict=True))


def test_attention_on_tokens_sees_nothing_ahead_by_default() -> None:
    body, x = body_of("attention", TOKENS), input_of(TOKENS)
    changed = x.clone()
    changed[:, 3:] += 1
    assert torch.equal(body(x)[:, :3], body(changed)[:, :3])
    assert not torch.equal(body(x)[:, 3:], body(changed)[:, 3:])
    image, pixels = body_of("attention", IMAGE), input_of(IMAGE)
    changed = pixels.clone()
    changed[..., -1, -1] += 1
    assert not torch.equal(image(pixels)[..., 0, 0], image(changed)[..., 0, 0])


def test_a_sequence_is_its_parts_one_on_top_of_the_other() -> None:
    body = body_of("sequence", IMAGE, parts=["affine", ("conv", {"width": 2}), ["low_rank", {"rank": 3}]])
    x = input_of(IMAGE)
    value = x
    for part in body.bodies:  # type: ignore[union-attr]
        value = value + part(value)
    torch.testing.assert_close(x + body(x), value)
    assert blueprints.get("low_rank").build(IMAGE, {}, seed=0)  # the registry is as it was
    blueprints.validate_body("sequence", blueprints.get("sequence").build(IMAGE, {"parts": ["affine"]}, seed=0), IMAGE)


@pytest.mark.parametrize(
    ("name", "site", "config", "message"),
    [
        ("gated_mlp", TOKENS, {"width": 0}, r"width=0 for blueprint 'gated_mlp': expected a whole number from 1"),
        ("conv", IMAGE, {"kernel_size": 4}, r"kernel_size=4 for blueprint 'conv': expected an odd number"),
        ("conv", TOKENS, {}, r"'conv' does not fit site 'layers.3': its shape is \[2, 5, 8\] .* expected a map"),
        ("attention", TOKENS, {"heads": 3, "width": 8}, r"width=8 .*expected a multiple of heads=3"),
        ("attention", VECTORS, {}, r"does not fit site 'layers.3': its shape is \[3, 8\] .* expected tokens"),
        ("sequence", TOKENS, {"parts": []}, r"parts=\[\] for blueprint 'sequence': expected a list of names"),
        ("sequence", TOKENS, {"parts": ["conv"]}, r"'conv', a part of 'sequence', does not fit site 'layers.3'"),
        ("sequence", TOKENS, {"parts": ["afine"]}, r"no blueprint is registered under 'afine'.*did you mean 'affine'"),
        ("sequence", TOKENS, {"parts": [("affine", 3)]}, r"part \('affine', 3\) .* expected a blueprint's name"),
        ("sequence", TOKENS, {"parts": [("affine", {"x": 3})]}, r"'affine' has no parameter 'x'"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, site: SiteSpec, config: dict[str, Any], message: str) -> None:
    with pytest.raises(BlueprintError, match=message):
        blueprints.get(name).build(site, config, seed=0)


# Costs, by hand: 2 operations for each multiply-add.
N, T, D = TOKENS.shape
PIXELS = 2 * 4 * 5
COSTS: list[tuple[str, SiteSpec, dict[str, Any], int, int]] = [
    ("low_rank", TOKENS, {"rank": 3}, 2 * D * 3, 2 * N * T * (D * 3 + 3 * D)),
    ("bottleneck", TOKENS, {"width": 3}, 2 * D * 3 + 3 + D, 2 * N * T * (D * 3 + 3 * D)),
    ("affine", TOKENS, {}, 2 * D, 0),
    ("gated_mlp", TOKENS, {"width": 5}, 3 * D * 5, 2 * N * T * 3 * D * 5),
    ("conv", IMAGE, {"width": 3}, 8 * 3 + 3 + 9 * 3 * 3 + 3 + 3 * 8 + 8, 2 * PIXELS * (8 * 3 + 9 * 3 * 3 + 3 * 8)),
    ("depthwise_conv", IMAGE, {}, 9 * 8 + 8, 2 * PIXELS * 9 * 8),
    ("channel_gate", IMAGE, {}, 2 * 8 * 8 + 16, 2 * 2 * 2 * 8 * 8),
    (
        "attention",
        TOKENS,
        {"heads": 2, "width": 6},
        2 * D + 3 * 6 * (D + 1) + D * (6 + 1),
        2 * N * T * (3 * 6 * D + 6 * D) + 2 * N * 2 * T * T * 6,
    ),
    ("sequence", TOKENS, {"parts": ["affine", ("low_rank", {"rank": 3})]}, 2 * D + 6 * D, 2 * N * T * 6 * D),
]


@pytest.mark.parametrize(("name", "site", "config", "parameters", "flops"), COSTS, ids=ids)
def test_cost(name: str, site: SiteSpec, config: dict[str, Any], parameters: int, flops: int) -> None:
    cost = blueprints.get(name).cost(site, **config)
    assert (cost.parameters, cost.flops) == (parameters, flops)


def test_activation_memory_is_what_autograd_keeps_besides_parameters_and_input() -> None:
    bytes_of = {torch.float32: 4, torch.float64: 8}
    for dtype, size in bytes_of.items():
        site = site_of((2, 5, 8), 2, dtype)
        cost = blueprints.get("low_rank").cost(site, rank=3)
        assert cost.activation_bytes == 2 * 5 * 3 * size  # the narrow value between the two matrices
        assert blueprints.get("affine").cost(site).activation_bytes == 0
    big = site_of((512, 4096, 4096), 2, torch.float32)  # 32 GiB, of which none is allocated
    assert blueprints.get("low_rank").cost(big, rank=8).activation_bytes == 512 * 4096 * 8 * 4


def test_cost_on_a_device_that_is_not_there() -> None:
    site = SiteSpec("a", (2, 5, 8), torch.float32, torch.device("cuda", 0), 2)
    assert blueprints.get("low_rank").cost(site).parameters == 2 * 8 * 8
