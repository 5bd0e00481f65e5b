"""The structure that a checkpoint describes: verified against the model, and its bodies built, before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from esper_fx import blueprints
from esper_fx.checkpoint.manifest import BodyRecord, Manifest, trainable
from esper_fx.errors import BlueprintError, CheckpointError, SiteError
from esper_fx.growth import body_seed
from esper_fx.lifecycle import Stage
from esper_fx.morphing.branch import NAMESPACE, mangled
from esper_fx.state import FIELDS

if TYPE_CHECKING:
    from esper_fx.growth import Growth
    from esper_fx.seed import KasminaSeed

MANIFEST = "_extra_state"
"""Key of the manifest, after the name of the branch."""

ADVICE = f"To load only the network's own weights, leave out the keys that begin with {NAMESPACE!r}"


@dataclass
class Structure:
    """What had grown when a checkpoint was made.

    Attributes:
        manifest: What the checkpoint says of it.
        bodies: For every seed of the model the body it gets, its own where that is alike, or None.
    """

    manifest: Manifest
    bodies: dict[KasminaSeed, nn.Module | None]


def read_structure(growth: Growth, state_dict: Mapping[str, Any], root: str) -> Structure:
    """Read and verify a checkpoint's structure, and build what bodies it takes.

    Args:
        growth: The life of the model's seeds; it stays as it is.
        state_dict: The checkpoint, with all state arrays and the manifest.
        root: What the keys of the seeds begin with.

    Raises:
        CheckpointError: The structure cannot be read, or does not fit the model.
    """
    manifest = Manifest.from_tensor(state_dict[root + MANIFEST])
    _check_sites(growth, manifest)
    _check_feature_dims(growth, manifest)
    for field in FIELDS:
        key, expected = f"{root}state.{field}", [len(growth.by_index)]
        shape = list(getattr(state_dict[key], "shape", ("no tensor",)))
        if shape != expected:
            raise CheckpointError(
                f"the checkpoint does not fit this model, and nothing of it was loaded: {key} has shape {shape}, expected "
                f"{expected}, one number for every seed"
            )
    germinations = [int(count) for count in state_dict[f"{root}state.germinations"].tolist()]
    bodies: dict[KasminaSeed, nn.Module | None] = {}
    for seed in growth.by_index:
        record = manifest.bodies.get(seed.name)
        bodies[seed] = None
        if record is not None and record.stage != Stage.EMBARGOED:
            prefix = body_prefix(seed, root)
            saved = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
            number = germinations[seed.index] - 1
            bodies[seed] = _same_body(seed, record, saved) or _new_body(seed, record, manifest, number, growth)
    return Structure(manifest, bodies)


def body_prefix(seed: KasminaSeed, root: str) -> str:
    """What the keys of a seed's body begin with."""
    return f"{root}seeds.{mangled(seed.name)}.body."


def check_stages(growth: Growth, manifest: Manifest, stages: Tensor) -> None:
    """The state arrays and the manifest must tell the same of every seed.

    Args:
        growth: The life of the model's seeds.
        manifest: The checkpoint's.
        stages: The checkpoint's state array ``stage``, ``[n_seeds]``.

    Raises:
        CheckpointError: They do not.
    """
    for seed, number in zip(growth.by_index, stages.tolist(), strict=True):
        record = manifest.bodies.get(seed.name)
        expected = {Stage.DORMANT, Stage.EMBARGOED} if record is None else {record.stage}
        if number not in expected:
            stage = Stage(number).name if number in tuple(Stage) else repr(number)
            raise CheckpointError(
                f"the checkpoint contradicts itself, and nothing of it was loaded: the seed at {seed.name!r} is {stage} by its "
                f"state arrays, {' or '.join(item.name for item in sorted(expected))} by its manifest. state_dict() holds "
                "the model's own tensors, which change as training goes on: save it at once, or copy it with "
                "copy.deepcopy()"
            )


def _check_sites(growth: Growth, manifest: Manifest) -> None:
    mine = tuple(seed.name for seed in growth.by_index)
    if manifest.sites == mine:
        return
    there = [site for site in manifest.sites if site not in mine]
    here = [site for site in mine if site not in manifest.sites]
    if there or here:
        differences = f"only in the checkpoint: {_names(there)}; only in this model: {_names(here)}"
    else:
        differences = f"the checkpoint has them in another order: {_names(manifest.sites)}; this model: {_names(mine)}"
    raise CheckpointError(
        f"the checkpoint is of a model with other sites, and nothing of it was loaded. {differences}. Morph the model with "
        f"the same sites. {ADVICE}"
    )


def _check_feature_dims(growth: Growth, manifest: Manifest) -> None:
    """Bodies were made for the dimension that held features; where there is none, the model's own stays."""
    for seed in growth.by_index:
        body, theirs = manifest.bodies.get(seed.name), manifest.feature_dims.get(seed.name)
        if body is None or body.stage == Stage.EMBARGOED or theirs is None:
            continue
        shape = manifest.values[seed.name][0]
        try:
            mine = seed.feature_dim_of(shape)
        except SiteError as error:
            raise CheckpointError(f"the checkpoint does not fit, and nothing of it was loaded: {error}") from error
        if mine not in (None, theirs):
            raise CheckpointError(
                f"the checkpoint does not fit this model, and nothing of it was loaded: at site {seed.name!r} its body was "
                f"made for values of shape {list(shape)} with features in dimension {theirs}, and this model has them in "
                f"dimension {mine}. Morph the model with feature_dim={{{seed.name!r}: {theirs}}}. {ADVICE}"
            )


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _same_body(seed: KasminaSeed, record: BodyRecord, saved: Mapping[str, Any]) -> nn.Module | None:
    """The body that the seed has now if the checkpoint's is alike: its parameters stay who they are."""
    if seed.body is None or seed.blueprint != record.blueprint:
        return None
    kind = blueprints.get(record.blueprint)
    try:
        if kind.config_key(seed.config) != kind.config_key(record.config):
            return None
    except BlueprintError:
        return None
    if trainable(seed.body) != record.trainable:
        return None
    mine = {name: getattr(value, "shape", None) for name, value in seed.body.state_dict().items()}
    return seed.body if mine == {name: getattr(value, "shape", None) for name, value in saved.items()} else None


def _new_body(seed: KasminaSeed, record: BodyRecord, manifest: Manifest, number: int, growth: Growth) -> nn.Module:
    probe = seed
    if seed._spec is None:
        probe = copy.copy(seed)  # so that the seed learns nothing from a checkpoint that is refused
        shape, dtype, source = manifest.values[seed.name]
        dim = manifest.feature_dims.get(seed.name)
        probe.note_value(shape, dtype, growth.state.step.device, source, dim)
    try:
        kind = blueprints.get(record.blueprint)
        body = kind.build(probe.site, record.config, seed=body_seed(manifest.model_seed, seed.name, number))
    except BlueprintError as error:
        raise CheckpointError(
            f"the body that the checkpoint has at site {seed.name!r} cannot be built here, and nothing of the checkpoint was "
            f"loaded: {error}. A blueprint of your own must be registered before a checkpoint is loaded"
        ) from error
    if not record.trainable:
        body.requires_grad_(False)
    return body.train(seed.training)
