"""Regions with probes: what they are compiled with beside a region's own inputs, and where what they measure goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from esper_fx.ops.probe import GRADIENTS, gradient_row, same, site_gradient, site_values, sketch
from esper_fx.passes.instrument import instrument
from esper_fx.passes.metas import TensorMeta, examples


@dataclass(frozen=True)
class Probes:
    """The probes of a region.

    Attributes:
        device: Where its sites are.
        gradients: For each of its seeds whether the gradient at its site is measured too.
        directions: How many directions the sensors have that sit where gradients are measured; 0: there are none.
        features: For each of its seeds how many features there are at its site, and in which dimension. None: it gets no
            sensor.
    """

    device: torch.device
    gradients: tuple[bool, ...]
    directions: int = 0
    features: tuple[tuple[int, int] | None, ...] = ()

    @property
    def rows(self) -> tuple[int, ...]:
        """Numbers of the seeds at whose sites the gradient is measured."""
        return tuple(row for row, measured in enumerate(self.gradients) if measured)

    @property
    def sensors(self) -> tuple[int, ...]:
        """Numbers of the seeds at whose sites there is a sensor."""
        return tuple(row for row in self.rows if self.directions and self.features[row] is not None)

    def into(self, template: fx.Graph) -> fx.Graph:
        """A copy of a region's template with these probes."""
        dims = [None if features is None else features[1] for features in self.features]
        return instrument(template, self.gradients, dims if self.directions else ())

    def leaves(self, requires_grad: bool = False) -> tuple[TensorMeta, ...]:
        """What takes the gradients' measurements, then sketches; see :mod:`esper_fx.ops.probe`."""
        shapes = [(len(self.gradients), len(GRADIENTS), torch.float64)]
        counts = [features[0] for features in map(self.features.__getitem__, self.sensors) if features is not None]
        shapes += [(self.directions, count, torch.float32) for count in counts]
        return tuple(TensorMeta((n, m), (m, 1), dtype, self.device, requires_grad) for n, m, dtype in shapes)


@dataclass(frozen=True, eq=False)
class Taken:
    """What a region has measured, and will have when its backward pass is over.

    Attributes:
        seeds: For each row the seed, by its place in the state arrays.
        values: Float64 ``[len(seeds), len(VALUES)]``.
        leaf: Its gradient, float64 ``[len(seeds), len(GRADIENTS)]``, comes with the backward pass; None where none comes.
        rows: Which rows of that gradient are measured.
        sensors: For which rows there is a sensor.
        sketches: For each of these a leaf whose gradient is the sketch, float32 ``[k, d]``.
    """

    seeds: tuple[int, ...]
    values: Tensor
    leaf: Tensor | None = None
    rows: tuple[int, ...] = ()
    sensors: tuple[int, ...] = ()
    sketches: tuple[Tensor, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether nothing more comes."""
        return self.leaf is None or self.leaf.grad is not None


class Sampler(Protocol):
    """Takes what is measured at the sites of one model.

    Attributes:
        sampling: Whether the step that is under way is to be measured.
        directions: How many directions sensors have; 0: there are none.
    """

    sampling: bool
    directions: int

    def begin_step(self, clock: int) -> None:
        """A step begins on the thread that runs the model.

        Args:
            clock: Training steps seen.
        """

    def join_step(self, clock: int) -> None:
        """Another program of the model runs: a part of the step under way, or what comes after it, such as an evaluation."""

    def take(self, taken: Taken) -> None:
        """Keep what a region has measured."""

    def forget(self) -> None:
        """The model is another one now: what was measured and not taken in yet says nothing of it."""


class ProbedKernel:
    """A kernel of a region with probes, as one of the region: it hands on what is measured.

    Args:
        kernel: It.
        probes: The probes.
        leaves: What it takes for them.
        rows: Numbers of the seeds at whose sites gradients flow.
        place: Where among its inputs, which are the region's own before and the bodies' tensors after.
        seeds: For each site of the region its seed, by its place in the state arrays.
        sampler: Takes what is measured.
    """

    def __init__(
        self,
        kernel: Any,
        probes: Probes,
        leaves: Sequence[TensorMeta],
        rows: Sequence[int],
        place: int,
        seeds: Sequence[int],
        sampler: Sampler,
    ) -> None:
        self._kernel = kernel
        self.guards = getattr(kernel, "guards", ())
        self._rows, self._sensors = tuple(rows), probes.sensors
        self._leaves = tuple(leaves)
        self._place = place
        self._seeds = tuple(seeds)
        self._sampler = sampler

    def __call__(self, *values: Any) -> Sequence[Any]:
        """Run the region; returns its own outputs."""
        leaves = [_zeros(meta) for meta in self._leaves]
        *results, measured = self._kernel(*values[: self._place], *leaves, *values[self._place :])
        if leaves[0].requires_grad:
            self._sampler.take(Taken(self._seeds, measured, leaves[0], self._rows, self._sensors, tuple(leaves[1:])))
        else:
            self._sampler.take(Taken(self._seeds, measured))
        return results


def _zeros(meta: TensorMeta) -> Tensor:
    return torch.zeros(examples(meta.shape), dtype=meta.dtype, device=meta.device).requires_grad_(meta.requires_grad)


def measure_eagerly(sampler: Sampler, seed: int, x: Tensor, y: Tensor, dim: int | None) -> Tensor:
    """Measure at one site that no region holds; returns what the model goes on with instead of ``y``.

    The gradient is not measured where the value is changed in place later.

    Args:
        sampler: Takes what is measured.
        seed: The seed, by its place in the state arrays.
        x: The value before it.
        y: The value after it.
        dim: The dimension that holds features. None: there is no sensor.
    """
    values = site_values(x, y).unsqueeze(0)
    if not (y.requires_grad and torch.is_grad_enabled()):
        sampler.take(Taken((seed,), values))
        return y
    probes = Probes(y.device, (True,), sampler.directions, (None if dim is None else (x.shape[dim], dim),))
    leaf, *sketches = map(_zeros, probes.leaves())
    before, after = x.detach(), y.detach()
    versions = before._version, after._version

    def measure(gradient: Tensor) -> None:
        if (before._version, after._version) == versions:
            with torch.no_grad():
                _add(leaf, gradient_row(gradient, before, after).unsqueeze(0))
                for item in sketches:
                    assert dim is not None
                    _add(item, sketch(before, gradient, item.shape[0], dim))

    through = same(y)  # users of the seed, and not those of the value before it
    through.register_hook(measure)
    sampler.take(Taken((seed,), values, leaf, (0,), probes.sensors, tuple(sketches)))
    return through


def _add(leaf: Tensor, gradient: Tensor) -> None:
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def rows_with_gradients(graph: fx.Graph) -> tuple[int, ...]:
    """The rows of the probes of an annotated graph that sit where gradients flow."""
    probes = (node for node in graph.nodes if node.target is site_gradient)
    return tuple(node.args[3] for node in probes if node.args[0].meta["example_value"].requires_grad)
