"""Loading a checkpoint: verify all of it, restore what had grown, then let PyTorch copy the tensors.

``load_state_dict`` of a morphed model calls :func:`before_loading` first, wherever the model sits in what is loaded. Until
everything has been verified nothing changes; afterwards PyTorch's own loading finds a model of the checkpoint's structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from esper_fx import _torch, blueprints
from esper_fx.checkpoint.structure import ADVICE, MANIFEST, Structure, body_prefix, check_stages, read_structure
from esper_fx.checkpoint.trial import hollow, rehearse
from esper_fx.errors import CheckpointError
from esper_fx.lifecycle import HAS_BODY
from esper_fx.morphing.branch import NAMESPACE, Branch, mangled
from esper_fx.state_fields import FIELDS, TELEMETRY

if TYPE_CHECKING:
    from esper_fx.growth import Growth
    from esper_fx.seed import KasminaSeed


def watch_loading(model: nn.Module, branch: Branch) -> None:
    """Have a morphed model verify and restore what is loaded into it."""
    model.register_load_state_dict_pre_hook(before_loading)
    branch.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]


def before_loading(
    model: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    _strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Verify a checkpoint and give the model its structure. A checkpoint without seeds leaves what has grown as it is.

    Raises:
        CheckpointError: It does not fit; nothing has changed.
    """
    branch = model._modules.get(NAMESPACE)
    if not isinstance(branch, Branch):
        return
    root = f"{prefix}{NAMESPACE}."
    strict, metadata = _torch.load_in_progress()
    given = [key for key in state_dict if key.startswith(root)]
    if given:
        _add_telemetry(branch.growth, state_dict, root)
    lacking = [key for key in _indispensable(branch, root) if key not in state_dict] if given else []
    if lacking and strict:
        raise CheckpointError(
            "the checkpoint is not complete, and nothing of it was loaded. What it says of the seeds lacks "
            f"{', '.join(lacking)}. {ADVICE}"
        )
    structure = read_structure(branch.growth, state_dict, root) if given and not lacking else None
    if structure is None:  # it is a bare network's, or cannot tell what had grown: that stays as it is
        unexpected, unused = given, given
        bodies = {seed: seed.body for seed in branch.growth.by_index}
    else:
        leaving, unknown = _keys_of_no_body(structure, state_dict, root)
        unexpected = [] if strict else unknown  # the rehearsal names them where they matter
        unused = leaving + unexpected
        bodies = structure.bodies
    for key in unused:
        del state_dict[key]
    if structure is None:
        state_dict.update(_own_tensors(branch, root))
    branch.accepted = state_dict[root + MANIFEST]
    try:
        replica = _replica(model, bodies)
        what = type(model).__name__
        rehearse(replica, state_dict, prefix, after=before_loading, strict=strict, metadata=metadata, what=what)
        if structure is not None:
            check_stages(branch.growth, structure.manifest, state_dict[f"{root}state.stage"])
    except BaseException:
        branch.accepted = None
        raise
    missing_keys += lacking
    unexpected_keys += unexpected
    if structure is not None:
        _restore(branch.growth, structure)
        branch.restored = True


def _after_loading(branch: nn.Module, _: Any) -> None:
    """The tensors are there: compiled programs get the kernels of the restored structure, germinations go on."""
    if isinstance(branch, Branch):
        branch.accepted = None
        if branch.restored:
            branch.restored = False
            branch.growth.changes.restored()


def _indispensable(branch: Branch, root: str) -> list[str]:
    """Without these keys it cannot be told what had grown."""
    return [root + MANIFEST, *(f"{root}state.{name}" for name, _ in branch.growth.state.named_buffers())]


def _add_telemetry(growth: Growth, state_dict: dict[str, Any], root: str) -> None:
    """A checkpoint from before there was telemetry gets what a model has of which nothing was measured."""
    keys = {f"{root}state.{field}": FIELDS[field] for field in TELEMETRY if field != "health"}
    if not any(key in state_dict for key in keys):
        n = len(growth.by_index)
        state_dict |= {key: torch.full((n,), value, dtype=dtype) for key, (dtype, value) in keys.items()}


def _keys_of_no_body(structure: Structure, state_dict: Mapping[str, Any], root: str) -> tuple[list[str], list[str]]:
    """Keys of bodies that no seed gets: of those that were on their way out, with alpha 0, and of others."""
    without = [seed for seed, body in structure.bodies.items() if body is None]
    leaving = tuple(body_prefix(seed, root) for seed in without if seed.name in structure.manifest.bodies)
    others = tuple(body_prefix(seed, root) for seed in without if seed.name not in structure.manifest.bodies)
    return [key for key in state_dict if key.startswith(leaving)], [key for key in state_dict if key.startswith(others)]


def _own_tensors(branch: Branch, root: str) -> dict[str, Any]:
    """What the branch holds now, to be loaded where a checkpoint has nothing for it: so it stays, and nothing is missing."""
    own: dict[str, Any] = {root + MANIFEST: object()}
    for name, child in branch.named_children():
        own |= child.state_dict(prefix=f"{root}{name}.", keep_vars=True)
    return own


def _replica(model: nn.Module, bodies: Mapping[KasminaSeed, nn.Module | None]) -> nn.Module:
    """A replica of the model without data, with these bodies."""
    replica = hollow(model)
    for seed, body in bodies.items():
        module = replica.get_submodule(f"{NAMESPACE}.seeds.{mangled(seed.name)}")
        if body is None:
            del module._modules["body"]  # PyTorch says nothing of keys below a module that is None
        elif body is not seed.body:
            module.register_module("body", hollow(body))
    return replica


def _restore(growth: Growth, structure: Structure) -> None:
    """Give every seed its body; the state arrays follow with the other tensors."""
    manifest = structure.manifest
    with growth.lock:
        growth.changes.abandon("a checkpoint was loaded before it was live")
        if (sampler := growth.sampler) is not None:
            sampler.forget()
        growth.model_seed = manifest.model_seed
        growth.clock = manifest.clock
        growth.ledger = manifest.ledger
        growth.scheduled = True
        for seed, body in structure.bodies.items():
            if growth.attachment is not None and body is not seed.body:
                growth.attachment.leave(seed)
            record = manifest.bodies.get(seed.name)
            if body is None or record is None:
                seed.set_body(None, None, {})
            elif body is not seed.body:
                config = blueprints.get(record.blueprint).bind(record.config)
                seed.set_body(body, record.blueprint, config)
            seed.live = body is not None and record is not None and record.stage in HAS_BODY
            seed.error = None
            if seed._spec is None and seed.name in manifest.values:
                shape, dtype, source = manifest.values[seed.name]
                dim = manifest.feature_dims.get(seed.name)
                seed.note_value(shape, dtype, growth.state.step.device, source, dim, seen=False)
            if growth.attachment is not None:
                growth.attachment.join(seed)
