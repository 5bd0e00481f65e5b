"""Running the plans of a program without compiling them: the regions' graphs stand for their kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from esper_fx.engine.build import Ambient
from esper_fx.engine.executable import Executable
from esper_fx.engine.plan import Layout, Plan, Slot
from esper_fx.engine.probes import ProbedKernel, Sampler
from esper_fx.engine.region import Variant
from esper_fx.passes.metas import SizeMeta, TensorMeta
from esper_fx.passes.record import record


class Scale(nn.Module):
    """A body with a parameter and a buffer."""

    def __init__(self, seed: int, reads_source: bool = False) -> None:
        super().__init__()
        self.reads_source = reads_source
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.register_buffer("shift", torch.randn(4, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) + self.shift


class LiveSeed:
    """What an executable needs of a seed."""

    def __init__(self, body: Scale, alpha: Tensor, gate: Tensor) -> None:
        self.tensors = [alpha, gate, body.weight, body.shift]

    def kernel_inputs(self) -> Callable[[], list[Tensor]]:
        return lambda: self.tensors


@cache
def ambient() -> Ambient:
    """The state around the tests; reading it takes long."""
    return Ambient.current()


def run_plan(
    layout: Layout, plan: Plan, args: list[Any], bodies: dict[int, Scale], sampler: Sampler | None = None
) -> Any:
    """Run a plan with these bodies, by site, and with probes where there is a sampler to take what they measure."""
    recorded = tuple(
        record(bodies[slot.site], what_is_read(slot, bodies[slot.site]), training=slot.training)
        if slot.site in bodies
        else None
        for slot in layout.slots
    )
    probes = None if sampler is None else layout.probes(plan, sampler.directions, [1] * len(layout.slots))
    variants = layout.variants(plan, recorded, probes=probes)
    assert variants is not None
    assert layout.variants(plan, recorded, known=True, probes=probes) == variants
    seeds: list[Any] = [
        LiveSeed(bodies[s.site], args[3][s.site], args[4][s.site]) if s.site in bodies else None for s in layout.slots
    ]
    kernels: list[Any] = [partial(checked, variant) for variant in variants]
    for i, (variant, region) in enumerate(zip(variants, plan.regions, strict=True)):
        own = None if probes is None else probes[i]
        if own is not None and sampler is not None:
            sites = [layout.slots[slot].site for slot in region.slots]
            kernels[i] = ProbedKernel(kernels[i], own, variant.leaves, variant.rows, len(region.inputs), sites, sampler)
    executable = Executable(plan, kernels, seeds, recorded, () if probes is None else layout.shown)
    assert executable.takes(args)
    return executable(args)


def what_is_read(slot: Slot, body: Scale) -> TensorMeta:
    """What a body reads at a slot."""
    meta = slot.input_of(body)
    assert meta is not None
    return meta


def checked(variant: Variant, *values: Any) -> Any:
    """Run a variant as a kernel that was compiled for its inputs would, which must then be as announced."""
    pairs = list(zip(variant.inputs, values, strict=True))
    names = {meta.name: value for meta, value in pairs if isinstance(meta, SizeMeta)}
    for meta, value in pairs:
        assert isinstance(meta, SizeMeta) or TensorMeta.of(value) == meta.fixed(names)
    results = variant.module(*values)
    own = results[:-1] if variant.leaves else results
    assert [result.requires_grad for result in own] == list(variant.output_grads)
    return results


def gradients_of(outputs: Any, leaves: list[Tensor]) -> list[Tensor | None]:
    """Gradients of a loss of a program's outputs."""
    loss = sum((value * (i + 1)).sum() for i, value in enumerate(outputs[:2]))
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, leaves, allow_unused=True)) if loss.requires_grad else [None] * len(leaves)
