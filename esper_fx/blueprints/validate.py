"""Check of a freshly built body before it may join a model."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from esper_fx.blueprints.registry import seeded
from esper_fx.checks import cause
from esper_fx.errors import BlueprintError
from esper_fx.ops import reads_source
from esper_fx.site import SiteSpec


def validate_body(blueprint_name: str, body: nn.Module, site: SiteSpec, *, allow_nonzero: bool = False) -> None:
    """Run a copy of a body once on a small random input of the site's kind, and refuse it unless it is a delta.

    A copy runs, without gradients and with a random state of its own: parameters, gradients, buffers such as
    BatchNorm's statistics and the global random state stay as they are. On an accelerator this waits for the device.

    Args:
        blueprint_name: Name of the blueprint, for messages.
        body: What it built, on the site's device and in its dtype.
        site: Where the body will sit. The input has its shape, or its source's where the body reads that, with at most two
            rows in the batch.
        allow_nonzero: Accept a body that is not zero at birth, as for trained weights.

    Raises:
        BlueprintError: If the body fails, returns anything but a tensor of the site's shape, dtype and device, writes
            into its input, or is not zero at birth.
    """
    source = site.source if reads_source(body) else None
    expected_shape = _small(site.shape, site.feature_dim)
    shape = expected_shape if source is None else _small(source.shape, source.feature_dim)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(site.device, site.dtype)
    x_before = x.clone()
    what = f"the body that blueprint {blueprint_name!r} built for site {site.name!r}"
    try:
        with (
            torch.no_grad(),
            torch.autocast(site.device.type, enabled=False),
            seeded(site.device, 0),
        ):
            delta = copy.deepcopy(body)(x)
    except Exception as error:
        raise BlueprintError(f"{what} failed on an input of shape {shape}: {cause(error)}") from error
    if not isinstance(delta, Tensor):
        raise BlueprintError(
            f"{what} returned {type(delta).__name__}: expected one tensor of the {'input' if source is None else 'site'}'s "
            f"shape {expected_shape}"
        )
    for kind, given, was, expected in (
        ("shape", shape, list(delta.shape), expected_shape),
        ("dtype", x.dtype, delta.dtype, x.dtype),
        ("device", x.device, delta.device, x.device),
    ):
        if was != expected:
            raise BlueprintError(
                f"{what} maps an input of {kind} {given} to one of {kind} {was}: expected "
                + (f"the same {kind}" if source is None else f"{expected}")
                + f", because it is added to {'its input' if source is None else 'the value at its site'}"
            )
    if not torch.equal(x, x_before):
        raise BlueprintError(f"{what} changes its input in place: expected it to leave it alone (inplace=False)")
    if not allow_nonzero and int(delta.count_nonzero()):
        raise BlueprintError(
            f"{what} is not zero at birth (its largest value is {float(delta.abs().max()):.3g}): zero-initialise its "
            "last layer, so that germination does not change what the model computes"
        )


def _small(shape: tuple[int, ...], feature_dim: int) -> list[int]:
    """The shape with at most two rows in the batch: two, because BatchNorm refuses to train on one."""
    return [min(shape[0], 2) if feature_dim else shape[0], *shape[1:]]
