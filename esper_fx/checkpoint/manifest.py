"""The manifest of a checkpoint: what tensors cannot say of a model's growth, as JSON in one uint8 tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esper_fx.checks import shown
from esper_fx.errors import CheckpointError
from esper_fx.lifecycle import Ledger, Stage
from esper_fx.site import SiteSpec

if TYPE_CHECKING:
    from esper_fx.growth import Growth

FORMAT = 1
"""Version of the manifest that this version of esper_fx writes, and the newest it reads."""


Value = tuple[tuple[int, ...], torch.dtype, tuple[int, ...] | None]
"""What flows through a site: shape, dtype, and the shape of its source or None."""


@dataclass(frozen=True)
class BodyRecord:
    """A seed's body.

    Attributes:
        blueprint: Name of its blueprint.
        config: The blueprint's parameters, defaults filled in.
        stage: Where the seed is in its life. EMBARGOED: the body was on its way out.
        trainable: Whether any of its parameters gets a gradient.
    """

    blueprint: str
    config: dict[str, Any]
    stage: Stage
    trainable: bool = True


@dataclass(frozen=True)
class Manifest:
    """What tensors cannot say of a model's growth.

    Attributes:
        sites: Names of all sites, in the order of the state arrays.
        values: What flows through a site, where that is known: shape, dtype, and the shape of its source or None.
        bodies: The bodies by site.
        model_seed: Where the initial values of further bodies come from.
        clock: Training steps seen.
        ledger: What has happened.
        feature_dims: Which dimension of a site's value holds features, where that is known.
    """

    sites: tuple[str, ...]
    values: dict[str, Value]
    bodies: dict[str, BodyRecord]
    model_seed: int
    clock: int
    ledger: Ledger
    feature_dims: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, growth: Growth) -> Manifest:
        """The manifest of a model as it is now."""
        with growth.lock:
            return cls(
                sites=tuple(seed.name for seed in growth.by_index),
                values={s.name: _value(s._spec) for s in growth.by_index if s._spec is not None},
                bodies={
                    seed.name: BodyRecord(seed.blueprint, dict(seed.config), seed.stage, trainable(seed.body))
                    for seed in growth.by_index
                    if seed.body is not None and seed.blueprint is not None
                },
                model_seed=int(growth.model_seed),
                clock=growth.clock,
                ledger=Ledger(growth.ledger),
                feature_dims={s.name: s._spec.feature_dim for s in growth.by_index if s._spec is not None},
            )

    def to_tensor(self) -> Tensor:
        """The manifest as uint8 ``[bytes of its JSON]``, on the CPU.

        Raises:
            CheckpointError: A parameter of a blueprint has a value that JSON cannot hold.
        """
        record = {
            "format": FORMAT,
            "model_seed": self.model_seed,
            "clock": self.clock,
            "sites": self.sites,
            "values": {
                site: [shape, str(dtype).removeprefix("torch."), source]
                for site, (shape, dtype, source) in self.values.items()
            },
            "feature_dims": self.feature_dims,
            "bodies": {site: _encode_body(site, body) for site, body in self.bodies.items()},
            "ledger": self.ledger.to_json(),
        }
        return torch.frombuffer(bytearray(json.dumps(record, allow_nan=False).encode()), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, tensor: Any) -> Manifest:
        """The manifest that `to_tensor` made this tensor of.

        Raises:
            CheckpointError: It is not such a tensor, is damaged, or comes from a newer version of esper_fx.
        """
        try:
            record = json.loads(_bytes_of(tensor))
            written = _expect(int, record["format"])
            if written > FORMAT:
                raise CheckpointError(
                    f"this checkpoint was written by a newer version of esper_fx: its format is {written}, this version "
                    f"reads up to {FORMAT}; install a newer esper_fx"
                )
            sites = tuple(_expect(str, site) for site in _expect(list, record["sites"]))
            manifest = cls(
                sites=sites,
                values={site: _decode_value(*value) for site, value in _expect(dict, record["values"]).items()},
                bodies={site: _decode_body(body) for site, body in _expect(dict, record["bodies"]).items()},
                model_seed=_expect(int, record["model_seed"]),
                clock=_expect(int, record["clock"]),
                ledger=Ledger.from_json(_expect(list, record["ledger"])),
                feature_dims={
                    site: _expect(int, dim) for site, dim in _expect(dict, record.get("feature_dims", {})).items()
                },
            )
            for site, dim in manifest.feature_dims.items():
                if site not in manifest.values or not 0 <= dim < len(manifest.values[site][0]):
                    raise ValueError(f"it says of {site!r} that dimension {dim} holds features, and there is none")
            for site in manifest.bodies:
                if site not in sites or site not in manifest.values:
                    raise ValueError(f"it has a body at {site!r}, of which it says nothing else")
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"what this checkpoint says of the seeds (its _extra_state) cannot be read ({type(error).__name__}: {error}): "
                "it is damaged, or was not written by esper_fx"
            ) from error
        return manifest


def _bytes_of(tensor: Any) -> bytes:
    if not isinstance(tensor, Tensor) or tensor.ndim != 1:
        raise TypeError(f"expected a uint8 tensor with one dimension, not {shown(tensor)}")
    whole = tensor.detach().cpu().to(torch.uint8)
    # A checkpoint that was cast to half precision as a whole still holds every byte exactly.
    if not torch.equal(whole.to(tensor.dtype), tensor.detach().cpu()):
        raise ValueError(f"it holds {tensor.dtype} values that are no bytes")
    return bytes(whole.tolist())


def _expect(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, not {shown(value)}")
    return value


def _encode_body(site: str, body: BodyRecord) -> dict[str, Any]:
    config = []
    for name, value in body.config.items():
        try:
            config.append([name, encode(value)])
        except TypeError as error:
            raise CheckpointError(
                f"the seed at {site!r} cannot be saved: parameter {name!r} of blueprint {body.blueprint!r} is {shown(value)}, "
                f"and {error}; expected None, True, False, int, float, str, or lists, tuples and dicts of them"
            ) from None
    return {"blueprint": body.blueprint, "config": config, "stage": body.stage.name, "trainable": body.trainable}


def _decode_body(record: Mapping[str, Any]) -> BodyRecord:
    config = {_expect(str, name): decode(value) for name, value in record["config"]}
    trainable = _expect(bool, record["trainable"])
    return BodyRecord(_expect(str, record["blueprint"]), config, Stage[record["stage"]], trainable)


def _value(spec: SiteSpec) -> Value:
    return spec.shape, spec.dtype, None if spec.source is None else spec.source.shape


def trainable(body: nn.Module) -> bool:
    """Whether any parameter of a body gets a gradient; true where it has none."""
    parameters = list(body.parameters())
    return not parameters or any(parameter.requires_grad for parameter in parameters)


def _decode_value(shape: Sequence[int], dtype: str, source: Sequence[int] | None) -> Value:
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"a seed cannot sit where values are {dtype}")
    sizes, source_sizes = (
        None if size is None else tuple(_expect(int, item) for item in size) for size in (shape, source)
    )
    if sizes is None:
        raise ValueError("a value has no shape")
    return sizes, kind, source_sizes


def encode(value: Any) -> Any:
    """A value as JSON that keeps its exact type: lists as they are, what JSON lacks as an object that names its kind.

    Raises:
        TypeError: JSON cannot hold it.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is list:
        return [encode(item) for item in value]
    if kind is tuple:
        return {"tuple": [encode(item) for item in value]}
    if kind is dict:
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    raise TypeError(f"a checkpoint cannot hold a {kind.__qualname__}")


def decode(value: Any) -> Any:
    """The value that `encode` made this JSON of.

    Raises:
        ValueError: It made it of none.
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"float": str(text), **rest} if not rest:
            return float(text)
        case {"tuple": list(items), **rest} if not rest:
            return tuple(decode(item) for item in items)
        case {"dict": list(items), **rest} if not rest:
            return {decode(key): decode(item) for key, item in items}
    raise ValueError(f"{shown(value)} is no value of a parameter")
