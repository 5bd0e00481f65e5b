"""What is serialised with a compiled region, and what loading does with it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_fx import _torch
from esper_fx._torch import inductor
from esper_fx.artifact import pack, relocated, unpack
from esper_fx.kernels.launch import HiddenLaunch
from tests.support.regions import compiled_region

low_rank = pytest.importorskip("esper_fx.kernels.low_rank")


class Region(nn.Module):
    def forward(self, x: Tensor, down: Tensor, up: Tensor, alpha: Tensor) -> tuple[Tensor]:
        config = len(low_rank.CONFIGS)  # the first of those that are such an operator
        y, _ = torch.ops.esper.low_rank.default(x.relu(), down.t(), up.t(), alpha, alpha, "identity", -1, config, False)
        return (y * 2,)


class Plain(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x.relu(),)


def test_what_it_will_compile_goes_with_it_and_is_compiled_when_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launching operator is computed here by other means; all else is as on a GPU."""
    operator = importlib.import_module("esper_fx.ops.low_rank")
    monkeypatch.setattr(operator, "_runs_kernels", lambda x, down: True)
    seen: list[HiddenLaunch] = []
    monkeypatch.setattr(inductor, "compile_hidden", seen.append)
    x, down, up = (torch.randn(shape).bfloat16() for shape in ((6, 32), (8, 32), (32, 8)))
    inputs = (x, down, up, torch.tensor(0.5))
    with torch.library._scoped_library("esper", "IMPL") as library:
        library.impl("low_rank_rows", _computed, "CPU")
        data = compiled_region(Region(), inputs)
        assert seen == []
        (y,) = _torch.load_graph(data)(*inputs)
    (launch,) = seen
    assert launch.kernel == "esper_fx.kernels.low_rank_rows:rows_kernel"
    assert (launch.args[-2:], launch.constants["SAVE"]) == ([32, 8], False)
    expected, _ = _computed(x.relu(), down.t(), up.t(), inputs[-1])
    torch.testing.assert_close(y, expected * 2)


def test_what_cannot_be_compiled_does_not_keep_a_region_from_loading(caplog: pytest.LogCaptureFixture) -> None:
    inputs = (torch.randn(3),)
    artifact = unpack(compiled_region(Plain(), inputs))
    assert artifact.hidden == []
    artifact.hidden.append(HiddenLaunch("esper_fx.kernels.nowhere:kernel", [], {}))
    with caplog.at_level("WARNING"):
        loaded = _torch.load_graph(pack(artifact))
    assert "esper_fx.kernels.nowhere:kernel is not compiled ahead of its first launch" in caplog.text
    (y,) = loaded(*inputs)
    assert torch.equal(y, inputs[0].relu())


def test_python_that_was_compiled_with_it_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._functorch._aot_autograd.aot_autograd_result import BundledAOTAutogradResult
    from torch._inductor.runtime import compile_tasks

    compiled: list[str] = []

    def noting(source: str, path: str, *args: Any, **kwargs: Any) -> Any:
        compiled.append(path)
        return compile(source, path, *args, **kwargs)

    inputs = (torch.randn(3, requires_grad=True),)
    data = compiled_region(Plain(), inputs)
    monkeypatch.setattr(inductor, "compile", noting, raising=False)
    (y,) = _torch.load_graph(data)(*inputs)
    assert compiled == []
    expected = torch.autograd.grad(inputs[0].relu().sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), inputs), expected, rtol=0, atol=0)
    artifact = unpack(data)
    artifact.code.clear()  # as from another version of Python
    (y,) = _torch.load_graph(pack(artifact))(*inputs)
    assert len(compiled) >= 2, "forward and backward"
    torch.testing.assert_close(torch.autograd.grad(y.sum(), inputs), expected, rtol=0, atol=0)
    assert "compile" not in vars(compile_tasks)
    assert "__deepcopy__" not in vars(BundledAOTAutogradResult)


def test_a_kernel_of_a_pytorch_that_lies_elsewhere_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    here = _torch.compile_environment()
    monkeypatch.setattr(torch, "__file__", "/elsewhere/torch/__init__.py")
    assert _torch.compile_environment() == {**here, "folder": "/elsewhere/torch"}


def test_code_that_came_from_elsewhere_says_where_it_is_now() -> None:
    code = compile("def f():\n    return lambda: 1", "/there/a.py", "exec")
    moved = relocated(code, "/here/b.py")
    space: dict[str, Any] = {}
    exec(moved, space)
    assert space["f"].__code__.co_filename == space["f"]().__code__.co_filename == "/here/b.py"
    assert relocated(moved, "/here/b.py") is moved


def _computed(x: Tensor, down: Tensor, up: Tensor, alpha: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    assert x.is_contiguous()
    assert down.t().is_contiguous()  # as the kernel takes it
    assert up.t().is_contiguous()
    return (x + alpha * ((x @ down) @ up)).to(x.dtype), x.new_empty((0, down.shape[1]))
