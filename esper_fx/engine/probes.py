"""Regions with probes: what they are compiled with beside a region's own inputs, and where what they measure goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from esper_fx.ops.probe import GRADIENTS, gradient_row, site_gradient, site_values
from esper_fx.passes.record import TensorMeta


@dataclass(frozen=True)
class Probes:
    """The probes of a region.

    Attributes:
        gradients: For each of its seeds whether the gradient at its site is measured too.
        device: Where its sites are.
    """

    gradients: tuple[bool, ...]
    device: torch.device

    def leaf(self, requires_grad: bool = False) -> TensorMeta:
        """What takes the gradients' measurements; see :mod:`esper_fx.ops.probe`."""
        fields = len(GRADIENTS)
        return TensorMeta((len(self.gradients), fields), (fields, 1), torch.float64, self.device, requires_grad)


@dataclass(frozen=True, eq=False)
class Taken:
    """What a region has measured, and will have when its backward pass is over.

    Attributes:
        seeds: For each row the seed, by its place in the state arrays.
        values: Float64 ``[len(seeds), len(VALUES)]``.
        leaf: Its gradient, float64 ``[len(seeds), len(GRADIENTS)]``, comes with the backward pass; None where none comes.
        rows: Which rows of that gradient are measured.
    """

    seeds: tuple[int, ...]
    values: Tensor
    leaf: Tensor | None
    rows: tuple[int, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing more comes."""
        return self.leaf is None or self.leaf.grad is not None


class Sampler(Protocol):
    """Takes what is measured at the sites of one model.

    Attributes:
        sampling: Whether the step that is under way is to be measured.
    """

    sampling: bool

    def begin_step(self, clock: int) -> None:
        """A step begins on the thread that runs the model.

        Args:
            clock: Training steps seen.
        """

    def take(self, taken: Taken) -> None:
        """Keep what a region has measured."""


class ProbedKernel:
    """A kernel of a region with probes, as one of the region: it hands on what is measured.

    Args:
        kernel: It.
        leaf: What it takes for gradients' measurements.
        place: Where among its inputs, which are the region's own before and the bodies' tensors after.
        rows: For which of its sites these are made.
        seeds: For each site of the region its seed, by its place in the state arrays.
        sampler: Takes what is measured.
    """

    def __init__(
        self,
        kernel: Any,
        leaf: TensorMeta,
        place: int,
        seeds: Sequence[int],
        rows: Sequence[int],
        sampler: Sampler,
    ) -> None:
        self._kernel = kernel
        self._leaf = leaf
        self._place = place
        self._seeds = tuple(seeds)
        self._rows = tuple(rows)
        self._sampler = sampler

    def __call__(self, *values: Any) -> Sequence[Any]:
        """Run the region; returns its own outputs."""
        leaf = torch.zeros(self._leaf.shape, dtype=self._leaf.dtype, device=self._leaf.device)
        leaf.requires_grad_(self._leaf.requires_grad)
        *results, measured = self._kernel(*values[: self._place], leaf, *values[self._place :])
        self._sampler.take(Taken(self._seeds, measured, leaf if leaf.requires_grad else None, self._rows))
        return results


def measure_eagerly(sampler: Sampler, seed: int, x: Tensor, y: Tensor) -> Tensor:
    """Measure at one site that no region holds; returns what the model goes on with instead of ``y``.

    The gradient is not measured where the value is changed in place later.

    Args:
        sampler: Takes what is measured.
        seed: The seed, by its place in the state arrays.
        x: The value before it.
        y: The value after it.
    """
    values = site_values(x, y).unsqueeze(0)
    if not (y.requires_grad and torch.is_grad_enabled()):
        sampler.take(Taken((seed,), values, None, ()))
        return y
    leaf = torch.zeros(1, len(GRADIENTS), dtype=torch.float64, device=y.device)
    before, after = x.detach(), y.detach()
    versions = before._version, after._version

    def measure(gradient: Tensor) -> None:
        if (before._version, after._version) == versions:
            with torch.no_grad():
                row = gradient_row(gradient, before, after).unsqueeze(0)
                leaf.grad = row if leaf.grad is None else leaf.grad + row

    through = y.view_as(y)  # users of the seed, and not those of the value before it
    through.register_hook(measure)
    sampler.take(Taken((seed,), values, leaf, (0,)))
    return through


def measures_gradients(graph: fx.Graph) -> bool:
    """Whether a probe of an annotated graph sits where gradients flow."""
    return any(
        node.target is site_gradient and node.args[0].meta["example_value"].requires_grad for node in graph.nodes
    )
