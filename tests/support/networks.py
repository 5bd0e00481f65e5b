"""Random networks: models that hypothesis builds from layers, branches, reuse and nesting, and comparisons to the bit.

A network is described by data, so that a failure prints as something short; `Network` runs the description.
Shape letters: B batch, D features, C channels, H and W image sides.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

FEATURES = 4


@dataclass(frozen=True)
class Description:
    """A random network.

    Attributes:
        convolutional: Whether values are maps [B, C, H, W] instead of vectors [B, D].
        layers: Kinds of the layers: "linear", "norm", "relu" or "block"; in wide networks also "tied" (a linear layer
            with the weight of the first one), "pair" (returns two values) and "branch" (cannot be traced).
        steps: In order, what is computed: ("call", layer, value), ("relu", value), ("add", value, value) and so on.
        outputs: The values that are returned.
    """

    convolutional: bool
    layers: tuple[str, ...]
    steps: tuple[tuple[Any, ...], ...]
    outputs: tuple[int, ...]

    def build(self, seed: int = 0) -> Network:
        """The network with random parameters; the global random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Network(self)

    def example(self, seed: int = 1) -> Tensor:
        """A random input that needs a gradient, float32 [2, D] or [2, C, 3, 3]."""
        shape = (2, FEATURES, 3, 3) if self.convolutional else (2, FEATURES)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


class Network(nn.Module):
    """Runs a description: the same few lines for every network, unrolled when it is traced."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.description = description
        self.layers = nn.ModuleList(_layer(kind, description.convolutional) for kind in description.layers)
        linear = [layer for kind, layer in zip(description.layers, self.layers, strict=True) if kind in LINEAR]
        for kind, layer in zip(description.layers, self.layers, strict=True):
            if kind == "tied":
                layer.weight = linear[0].weight

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for kind, *operands in self.description.steps:
            if kind == "call":
                layer = self.layers[operands[0]]
                result = layer(values[operands[1] % len(values)])
                values += result if self.description.layers[operands[0]] == "pair" else (result,)
            elif kind == "relu":
                values.append(F.relu(values[operands[0] % len(values)]))
            elif kind == "scale":
                values.append(values[operands[0] % len(values)] * 0.5)
            else:
                a, b = (values[operand % len(values)] for operand in operands)
                values.append(a + b if kind == "add" else a * b)
        chosen = [values[index % len(values)] for index in self.description.outputs]
        return chosen[0] if len(chosen) == 1 else tuple(chosen)


class Block(nn.Module):
    """A residual block whose last layer's value is not its own."""

    def __init__(self, convolutional: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(_layer("linear", convolutional), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Pair(nn.Module):
    """Returns two values."""

    def __init__(self, convolutional: bool) -> None:
        super().__init__()
        self.one = _layer("linear", convolutional)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), torch.sin(x)


class Branch(nn.Module):
    """Its forward depends on values, so that it cannot be traced, nor can what calls it."""

    def __init__(self, convolutional: bool) -> None:
        super().__init__()
        self.one = _layer("linear", convolutional)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x.sum() > 0 else self.one(-x) * 0.5


LINEAR = ("linear", "tied")
_OTHERS: dict[str, type[nn.Module]] = {"block": Block, "pair": Pair, "branch": Branch}


def _layer(kind: str, convolutional: bool) -> nn.Module:
    if kind in LINEAR:
        return nn.Conv2d(FEATURES, FEATURES, 3, padding=1) if convolutional else nn.Linear(FEATURES, FEATURES)
    if kind == "norm":
        return nn.BatchNorm2d(FEATURES) if convolutional else nn.LayerNorm(FEATURES)
    return nn.ReLU() if kind == "relu" else _OTHERS[kind](convolutional)  # type: ignore[call-arg]


@st.composite
def descriptions(draw: st.DrawFn, *, wide: bool = False) -> Description:
    """Networks with branches, layers that are called more than once, nested blocks and several outputs.

    ``wide``: also with tied weights, layers that return two values, and layers that cannot be traced.
    """
    kinds = ["linear", "norm", "relu", "block"] + ["tied", "pair", "branch"] * wide
    layers = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4 if wide else 3))
    value = st.integers(0, 6)
    call = st.tuples(st.just("call"), st.integers(0, len(layers) - 1), value)
    step = st.one_of(
        call,
        call,
        st.tuples(st.sampled_from(["relu", "scale"]), value),
        st.tuples(st.sampled_from(["add", "multiply"]), value, value),
    )
    steps = [draw(call), *draw(st.lists(step, max_size=5))]
    outputs = draw(st.lists(st.integers(0, 6), min_size=1, max_size=2))
    return Description(draw(st.booleans()), tuple(layers), tuple(steps), (len(steps), *outputs[1:]))


def possible_sites(net: nn.Module) -> list[str]:
    """Names of the modules of a random network that return one tensor."""
    return [name for name, module in net.named_modules() if name and not isinstance(module, Pair | nn.ModuleList)]


def twin(module: nn.Module) -> nn.Module:
    """A copy with parameters of its own, for a comparison in which both run."""
    return copy.deepcopy(module)


def run(module: nn.Module, *inputs: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients of all parameters and inputs by name, for a loss that weighs every output element.

    Gradients that were there before are dropped, and dropped again afterwards: models that share parameters can be compared.
    """
    leaves = dict(module.named_parameters()) | {f"input{i}": x for i, x in enumerate(inputs) if x.requires_grad}
    for leaf in leaves.values():
        leaf.grad = None
    result = module(*inputs)
    outputs = list(result) if isinstance(result, tuple | list) else [result]
    weights = [torch.linspace(0.5, 1.5, output.numel()).reshape(output.shape).to(output.dtype) for output in outputs]
    loss = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    assert isinstance(loss, Tensor)
    if loss.requires_grad:
        loss.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for leaf in leaves.values():
        leaf.grad = None
    return [output.detach() for output in outputs], gradients


def assert_same(
    actual: Sequence[Tensor] | Mapping[str, Tensor], expected: Sequence[Tensor] | Mapping[str, Tensor]
) -> None:
    """Assert that tensors are equal to the bit, dtype and shape included, and named alike where they have names."""
    if isinstance(actual, Mapping):
        assert isinstance(expected, Mapping)
        assert list(actual) == list(expected)
        actual, expected = list(actual.values()), list(expected.values())
    torch.testing.assert_close(list(actual), list(expected), rtol=0, atol=0, equal_nan=True)
