"""The pass that records a body: against eager, and what it must refuse or leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from esper_fx.errors import BlueprintError
from esper_fx.passes import serialize
from esper_fx.passes.metas import TensorMeta
from esper_fx.passes.record import BodyGraph, body_signature, record

CPU = torch.device("cpu")
VECTORS = TensorMeta((3, 4), (4, 1), torch.float32, CPU, True)
TOKENS = TensorMeta((2, 5, 4), (20, 4, 1), torch.float32, CPU, True)
MAPS = TensorMeta((2, 4, 5, 5), (100, 25, 5, 1), torch.float32, CPU, True)


class Function(nn.Module):
    """A module around a function, with a weight and a buffer."""

    def __init__(self, function: Callable[[Function, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(-1, 1, 16).reshape(4, 4))
        self.register_buffer("state", torch.linspace(1, 2, 4))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _in_place(m: Function, x: Tensor) -> Tensor:
    y = x @ m.weight
    y.add_(1).mul_(m.state)
    y[..., 0] = 0.0
    y[..., 1] += 2.0
    y *= 3
    return F.relu(y, inplace=True)


def _without_gradient(m: Function, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = (x @ m.weight).abs().amax()
        with torch.enable_grad():
            kept = x @ m.weight
    return kept / scale + (x * m.weight.sum())


def _changes_buffer(m: Function, x: Tensor) -> Tensor:
    m.state.mul_(0.9).add_(x.detach().mean(), alpha=0.1)
    return x * m.state


def _creates(m: Function, x: Tensor) -> Tensor:
    ramp = torch.arange(4, dtype=x.dtype) + torch.ones_like(m.state) + x.new_full((4,), 2.0)
    return x * ramp + torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.zeros(x.shape[0], 1)


def _indexes(m: Function, x: Tensor) -> Tensor:
    y = x[..., None, ::2].squeeze(-2)
    return torch.cat([y, x[:, torch.tensor([1, 3])]], dim=-1) @ m.weight.mT


FUNCTIONS: dict[str, Callable[[Function, Tensor], Any]] = {
    "identity": lambda m, x: x,
    "operators": lambda m, x: 2.0 - x / 3 + (-x) % 2,
    "powers": lambda m, x: x**2 + 2**x,
    "divisions": lambda m, x: x.detach() // 0.3 + 3 // (1 + x.detach().abs()) + 1.0 / (2.0 + x.abs()),
    "products": lambda m, x: (3 * x) @ m.weight + m.state.__rmatmul__(x).unsqueeze(-1),
    "comparisons": lambda m, x: x * ((x >= 0) & (x < 1) | ~(x != 0)).to(x.dtype),
    "chunk": lambda m, x: torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1) * m.state,
    "split": lambda m, x: torch.stack(torch.split(x, [1, 3], dim=-1)[1].unbind(-1), -1).sum(-1, keepdim=True) * x,
    "named tuple": lambda m, x: x.max(dim=-1, keepdim=True).values * x + torch.sort(x, dim=-1)[0],
    "topk": lambda m, x: x * x.topk(2, dim=-1).values.sum(-1, keepdim=True),
    "property": lambda m, x: (m.weight.T @ x.T).T + x.real + m.weight.mT.sum(),
    "data by detach": lambda m, x: x * m.weight.detach().sum() + x @ m.weight,
    "einsum": lambda m, x: torch.einsum("bi,ij->bj", x, m.weight),
    "keyword arguments": lambda m, x: F.softmax(input=x, dim=-1) + torch.clamp(x, min=-0.5, max=None),
    "dtype and back": lambda m, x: (x.double() * 2).to(x.dtype) + x.to(torch.float64).float(),
    "where": lambda m, x: torch.where(x > 0, x, m.state) + (x > 0).to(x.dtype),
    "shape": lambda m, x: x.reshape(x.shape[1], -1).reshape(x.size()) * x.numel() + x.dim() + len(x),
    "in place": _in_place,
    "no_grad inside": _without_gradient,
    "buffer": _changes_buffer,
    "creates tensors": _creates,
    "indexes": _indexes,
    "weight twice": lambda m, x: (x @ m.weight) @ m.weight,
    "unused weight": lambda m, x: x * 0.0,
}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(4, 4)
        self.up = nn.Linear(4, 4)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.down(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


MODULES: dict[str, tuple[Callable[[], nn.Module], TensorMeta]] = {
    "linear": (lambda: nn.Linear(4, 4), VECTORS),
    "sequential": (lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.0), nn.Linear(8, 4)), TOKENS),
    "in-place activation": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(True), nn.Linear(4, 4), nn.SiLU(True)),
        VECTORS,
    ),
    "layer norm": (lambda: nn.LayerNorm(4), TOKENS),
    "group norm": (lambda: nn.GroupNorm(2, 4), MAPS),
    "batch norm": (lambda: nn.BatchNorm2d(4), MAPS),
    "batch norm with cumulative average": (lambda: nn.BatchNorm2d(4, momentum=0.3, affine=False), MAPS),
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding="same", groups=4), nn.Conv2d(4, 4, 1)), MAPS),
    "pooling": (lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1), nn.Upsample(scale_factor=1)), MAPS),
    "tied": (Tied, TOKENS),
    "attention": (Attention, TOKENS),
    "multihead": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), TOKENS),
    **{name: ((lambda f=f: Function(f)), VECTORS) for name, f in FUNCTIONS.items()},
}


def _example(meta: TensorMeta) -> Tensor:
    return torch.randn(meta.shape, generator=torch.Generator().manual_seed(0), dtype=meta.dtype).requires_grad_()


def _run_recorded(body: BodyGraph, module: nn.Module, x: Tensor) -> Tensor:
    """Inline the body's graph into one of its own, as specialize does, and run that."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    graph = fx.Graph()
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    mapping: dict[fx.Node, fx.Node] = {n: graph.placeholder(f"input{i}") for i, n in enumerate(placeholders)}
    graph.output(graph.graph_copy(body.graph, mapping))
    sent = serialize.loads(serialize.dumps(fx.GraphModule(nn.Module(), graph)))  # a worker must be able to read it
    result: Tensor = sent(x, *[tensors[name] for name in body.names])
    return result


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_a_recorded_body_is_bitwise_the_module_in_value_gradients_and_buffers(name: str, training: bool) -> None:
    make, meta = MODULES[name]
    torch.manual_seed(0)
    module = make().train(training)
    twin = copy.deepcopy(module)
    body = record(module, meta, training=training)
    x, x_twin = _example(meta), _example(meta)
    actual, expected = _run_recorded(body, module, x), twin(x_twin)
    assert torch.equal(actual, expected)
    assert actual.requires_grad == expected.requires_grad
    weight = torch.linspace(-1, 1, expected.numel()).reshape(expected.shape)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(x.grad, x_twin.grad)  # type: ignore[arg-type]
    for (key, parameter), other in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), key
        assert other.grad is None or torch.equal(parameter.grad, other.grad), key  # type: ignore[arg-type]
    for (key, buffer), other in zip(module.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, other), key


@pytest.mark.parametrize("name", MODULES)
def test_recording_describes_inputs_and_output_and_changes_nothing(name: str) -> None:
    make, meta = MODULES[name]
    torch.manual_seed(0)
    module = make().train()
    before, twin = torch.get_rng_state(), copy.deepcopy(module)
    body = record(module, meta, training=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(part.training for part in module.modules())
    assert all(parameter.grad is None and parameter.device == CPU for parameter in module.parameters())
    for (key, value), other in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
    assert list(vars(module)) == list(vars(twin))
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    assert body.names == tuple(tensors)
    assert body.tensors == tuple(TensorMeta.of(tensor) for tensor in tensors.values())
    expected = twin.eval()(_example(meta))
    assert (body.output.shape, body.output.dtype) == (tuple(expected.shape), expected.dtype)


def test_dropout_is_recorded_in_the_mode_asked_for_and_draws_nothing_while_recording() -> None:
    module = nn.Dropout(0.5)
    before = torch.get_rng_state()
    train, evaluate = record(module, VECTORS, training=True), record(module, VECTORS, training=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert train.identity != evaluate.identity
    x = torch.ones(3, 4)
    assert torch.equal(_run_recorded(evaluate, module, x), x)
    torch.manual_seed(5)
    actual = _run_recorded(train, module, x)
    torch.manual_seed(5)
    assert torch.equal(actual, module(x))
    assert 0 < actual.count_nonzero() < actual.numel()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_mode_of_the_thread_that_records_does_not_matter(mode: Callable[[], Any]) -> None:
    module = Function(_without_gradient)
    expected = record(module, VECTORS, training=True)
    with mode():
        body = record(module, VECTORS, training=True)
    assert body.identity == expected.identity
    assert body.output == expected.output
    with torch.enable_grad():
        _run_recorded(body, module, _example(VECTORS))
        assert torch.is_grad_enabled()


class _Cheat(torch.autograd.Function):
    """Forward says 2, backward says 100."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 100


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


@pytest.mark.parametrize("function", [_Cheat, _Straight])
@pytest.mark.parametrize("grad", [True, False], ids=["input with gradient", "input without"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_custom_autograd_function_is_refused(
    function: type[torch.autograd.Function], grad: bool, mode: Callable[[], Any]
) -> None:
    meta = TensorMeta((3, 4), (4, 1), torch.float32, CPU, grad)
    with mode(), pytest.raises(BlueprintError, match="custom autograd function"):
        record(Function(lambda m, x: function.apply(x @ m.weight)), meta, training=True)


OUTSIDE = torch.ones(4)


@pytest.mark.parametrize(
    ("function", "wording"),
    [
        (lambda m, x: x if x.sum() > 0 else -x, "body Function cannot be recorded for an input of shape"),
        (lambda m, x: x * x.sum().item(), "body Function cannot be recorded for an input of shape"),
        (lambda m, x: x[x > 0].sum() * x, "body Function cannot be recorded for an input of shape"),
        (lambda m, x: x + OUTSIDE, "body Function cannot be recorded|comes from outside"),
        (lambda m, x: (x, x), "body Function returned a tuple; expected one tensor like its input"),
        (lambda m, x: None, "body Function returned a NoneType; expected one tensor like its input"),
        (lambda m, x: setattr(x, "data", x * 2) or x, "must not assign to tensor attribute 'data'"),
        (lambda m, x: x @ m.missing, "body Function cannot be recorded .*missing"),
    ],
    ids=["branch", "item", "mask", "outside tensor", "tuple", "none", "data", "attribute error"],
)
def test_what_a_graph_cannot_hold_is_refused(function: Callable[[Function, Tensor], Any], wording: str) -> None:
    with pytest.raises(BlueprintError, match=wording):
        record(Function(function), VECTORS, training=True)


def test_a_body_that_switches_autocast_is_refused() -> None:
    def switches(m: Function, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ m.weight

    with pytest.raises(BlueprintError, match="must not change autocast inside its forward"):
        record(Function(switches), VECTORS, training=True)


# Identity and signature.


def test_bodies_that_compile_to_the_same_code_have_one_identity_and_others_do_not() -> None:
    def identity(module: nn.Module, meta: TensorMeta = VECTORS, training: bool = True) -> str:
        return record(module, meta, training=training).identity

    base = identity(nn.Linear(4, 4))
    assert identity(nn.Linear(4, 4)) == base  # other values, same code
    assert identity(Function(lambda m, x: F.linear(x, m.weight, m.state))) != base
    others = [
        identity(nn.Linear(4, 4, bias=False)),
        identity(nn.Linear(4, 4).double(), TensorMeta((3, 4), (4, 1), torch.float64, CPU, True)),
        identity(nn.Linear(4, 4), TensorMeta((5, 4), (4, 1), torch.float32, CPU, True)),
        identity(nn.Linear(4, 4), TensorMeta((3, 4), (1, 3), torch.float32, CPU, True)),
        identity(nn.Linear(4, 4), TensorMeta((3, 4), (4, 1), torch.float32, CPU, False)),
        identity(nn.Linear(4, 4).requires_grad_(False)),
        identity(nn.Sequential(nn.Linear(4, 4), nn.ReLU())),
    ]
    assert len({base, *others}) == 1 + len(others)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(4, 4),
        lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)),
        lambda: nn.BatchNorm2d(4),
        lambda: nn.Conv2d(4, 4, 3, padding="same"),
        Tied,
    ],
)
def test_bodies_made_alike_have_equal_signatures_that_can_be_keys(make: Callable[[], nn.Module]) -> None:
    assert body_signature(make()) is not None
    assert hash(body_signature(make())) == hash(body_signature(make()))
    assert body_signature(make()) == body_signature(make())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (nn.Linear(4, 4), nn.Linear(4, 4, bias=False)),
        (nn.Linear(4, 4), nn.Linear(4, 4).double()),
        (nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)),
        (nn.GELU(), nn.GELU("tanh")),
        (nn.LeakyReLU(1), nn.LeakyReLU(1.0)),
        (nn.ReLU(), nn.ReLU(inplace=True)),
        (nn.ReLU(), nn.Tanh()),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), nn.Sequential(nn.Tanh(), nn.ReLU())),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Tied()),
        (nn.BatchNorm1d(4), nn.BatchNorm1d(4, eps=1e-3)),
    ],
)
def test_bodies_that_differ_have_different_signatures(one: nn.Module, other: nn.Module) -> None:
    assert body_signature(one) != body_signature(other)


def test_layers_that_share_a_weight_differ_from_layers_that_do_not() -> None:
    class Two(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(4, 4), nn.Linear(4, 4)
            if tied:
                self.up.weight = self.down.weight

    assert body_signature(Two(True)) != body_signature(Two(False))


def test_a_module_that_cannot_be_told_from_another_has_no_signature() -> None:
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    assert body_signature(hooked) is None
    assert body_signature(Function(lambda m, x: x)) is None
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x  # type: ignore[method-assign,assignment]
    assert body_signature(nn.Sequential(patched)) is None
