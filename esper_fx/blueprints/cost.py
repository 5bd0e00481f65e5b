"""What a body costs: parameters, floating-point operations and memory for the backward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from esper_fx._torch import CPU_ATTENTION, FakeTensorMode, storage_id
from esper_fx.ops import reads_source
from esper_fx.site import SiteSpec


@dataclass(frozen=True)
class Cost:
    """What one forward of a body costs at a site.

    Attributes:
        parameters: Number of its trainable scalars.
        flops: Floating-point operations of its matrix products, convolutions and attention, two for each
            multiply-add, as `torch.utils.flop_counter` counts them; pointwise operations count as none.
        activation_bytes: Bytes that eager autograd keeps for the backward pass, besides parameters and the value that
            the body reads.
    """

    parameters: int
    flops: int
    activation_bytes: int


def measure(body: nn.Module, site: SiteSpec) -> Cost:
    """The cost of a body, found by running it on tensors without data.

    Args:
        body: Maps a value of the site's shape and dtype, or its source where it reads that, to a delta; on the CPU.
        site: Where it sits.
    """
    mode = FakeTensorMode()
    real = (*body.named_parameters(), *body.named_buffers())
    tensors: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in real}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no later storage gets the identity of a freed one

    def keep(tensor: Tensor) -> Tensor:
        if storage_id(tensor) not in known:
            kept[storage_id(tensor)] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    with mode, torch.enable_grad():
        shape = site.source.shape if reads_source(body) and site.source is not None else site.shape
        x = torch.empty(shape, dtype=site.dtype, requires_grad=True)
        known = {storage_id(tensor) for tensor in (x, *tensors.values())}
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            _counter() as counter,
        ):
            torch.func.functional_call(body, tensors, (x,))
    parameters = sum(parameter.numel() for parameter in body.parameters() if parameter.requires_grad)
    return Cost(parameters, counter.get_total_flops(), sum(kept.values()))


def _counter() -> FlopCounterMode:
    """torch's counter, and what it lacks: the attention that CPU tensors take."""
    return FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: _attention_flops})


def _attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Two matrix products for every head of every sample, as for the attention of other devices; masked or not."""
    *batches, length, width = query
    return 2 * math.prod(batches) * length * key[-2] * (width + value[-1])
