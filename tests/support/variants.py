"""Regions with one live seed, as the engine compiles them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from esper_fx import blueprints
from esper_fx.engine.annotate import annotate
from esper_fx.passes.metas import TensorMeta
from esper_fx.passes.record import record
from esper_fx.passes.specialize import specialize
from esper_fx.site import SiteSpec

SCALAR = TensorMeta((), (), torch.float32, torch.device("cpu"), False)


def site_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> SiteSpec:
    """A site of tokens ``[B, T, D]`` (three dimensions) or of a map ``[N, C, *]`` (the first of four or more)."""
    return SiteSpec("site", shape, dtype, torch.device("cpu"), 1 if len(shape) > 3 else len(shape) - 1)


def region_of(body: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """cos(seed(sin(x))) with this body, annotated: inputs are x, alpha, gate and the body's tensors."""
    x = TensorMeta.of(torch.empty(shape, dtype=dtype), True)
    recorded = record(body, x, training=True)
    template = fx.Graph()
    value = template.call_function(torch.sin, (template.placeholder("x"),))
    seed = template.call_function(torch.ops.esper.seed.default, (value, value, value, 0, 0, True))
    template.output((template.call_function(torch.cos, (seed,)),))
    module = fx.GraphModule(nn.Module(), specialize(template, [recorded]))
    annotate(module, (x, SCALAR, SCALAR, *recorded.tensors))
    return module


def grown(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """A blueprint's body for a site of this shape, with all its parameters random."""
    body = blueprints.get(name).build(site_of(shape, dtype), config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5)
    return body


def run(module: fx.GraphModule, body: nn.Module, x: Tensor, alpha: float, gate: float) -> list[Tensor]:
    """The region's value, and the gradients of x and of the body's parameters."""
    x = x.detach().requires_grad_()
    tensors = [*body.parameters(), *body.buffers()]
    (y,) = module(x, torch.tensor(alpha), torch.tensor(gate), *tensors)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *body.parameters()], upstream)]
