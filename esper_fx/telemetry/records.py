"""A record: what telemetry says of one site, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from esper_fx.state_fields import MEASURED

if TYPE_CHECKING:
    from esper_fx.growth import Growth
    from esper_fx.model import MorphableModel


@dataclass(frozen=True)
class SiteRecord:
    """What was measured at a site, smoothed over the steps that were measured; NaN where nothing was.

    x is the value before the seed, y after it, g the gradient of the loss with respect to y.

    Attributes:
        site: Name of the site.
        stage: Name of the seed's stage.
        blueprint: Name of its body's blueprint, or None.
        alpha: The factor on what the body returns.
        samples: How many steps were measured.
        sampled_at: Clock of the last of them, or -1.
        health: First-order estimate of how much the loss would rise without the seed's body: minus the sum of g (y - x), the
            criterion of Molchanov et al. (2017) with its sign kept. In units of what was differentiated, such as a scaled loss.
            NaN for a seed that changes nothing.
        value_mean: Mean of x.
        value_std: Standard deviation of x.
        value_absmax: Largest absolute value of x.
        nonfinite: Number of values of x that are NaN or infinite.
        change: Norm of y - x, in norms of x.
        grad_rms: Root mean square of g.
        grad_absmax: Largest absolute value of g.
        grad_value: Sum of g x: minus what the loss would rise by, to first order, if the value were 0.
        potential: How much there is to gain from a linear map at this site: the estimated sum of squares of the gradient xᵀg
            that its weight would get, which is how fast the loss would fall per unit of its learning rate. What GradMax (Evci
            et al. 2022) makes large; only where sketches are made.
    """

    site: str
    stage: str
    blueprint: str | None
    alpha: float
    samples: int
    sampled_at: int
    health: float
    value_mean: float
    value_std: float
    value_absmax: float
    nonfinite: float
    change: float
    grad_rms: float
    grad_absmax: float
    grad_value: float
    potential: float

    def to_dict(self) -> dict[str, Any]:
        """The same as a dictionary."""
        return asdict(self)


def records(model: MorphableModel) -> list[SiteRecord]:
    """What is known of every site, from host memory, in the order of ``model.seeds``."""
    return records_of(model.growth)


def records_of(growth: Growth) -> list[SiteRecord]:
    """The same of a model's growth."""
    fields, columns = ("alpha", "samples", "sampled_at", *MEASURED), growth.state.columns()
    rows = zip(*(columns[field] for field in fields), strict=True)
    return [
        SiteRecord(seed.name, seed.stage.name, seed.blueprint, **dict(zip(fields, row, strict=True)))
        for seed, row in zip(growth.by_index, rows, strict=True)
    ]
