"""save_adapter: write the live low_rank seeds of a model as a LoRA checkpoint that PEFT loads."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from esper_fx.adapters.checkpoint import KEY_PREFIX, TENSOR_FILE, require_safetensors
from esper_fx.adapters.config import CONFIG_FILE
from esper_fx.checks import names_of, path_of, shown
from esper_fx.errors import AdapterError, AdapterFileError, SiteError
from esper_fx.lifecycle import Stage
from esper_fx.model import MorphableModel
from esper_fx.morphing.branch import NAMESPACE
from esper_fx.seed import KasminaSeed

_NOT_THERE = (Stage.DORMANT, Stage.EMBARGOED, Stage.ERROR)


@dataclass(frozen=True)
class _Saved:
    """A seed's body as LoRA."""

    tensors: Mapping[str, Tensor]
    rank: int
    lora_alpha: float
    dropout: float
    fan_in_fan_out: bool


def save_adapter(
    model: MorphableModel,
    path: str | os.PathLike[str],
    *,
    sites: Iterable[str] | None = None,
    base_model_name_or_path: str | os.PathLike[str] = "",
    prefix: str = "",
) -> list[str]:
    """Write the seeds that are LoRA (``low_rank`` with ``reads="input"``) as an adapter that PEFT loads.

    PEFT's model then computes what this one computes, a seed's alpha included: it becomes part of lora_alpha.

    Args:
        model: A morphed model.
        path: The folder to write to; it is made if need be, and an adapter in it is replaced.
        sites: The sites to save. Default: all that have a body, each of which must then be LoRA.
        base_model_name_or_path: What PEFT notes as the model that the adapter is for.
        prefix: Where the morphed model stands in the model that PEFT will load the adapter onto, such as "model".

    Returns:
        The sites that were saved, sorted.

    Raises:
        AdapterError: There is nothing to save, a seed is not LoRA, is not live yet, or cannot be written for PEFT, or an
            argument is of a wrong type; nothing is written then.
        AdapterFileError: The folder cannot be written to.
        SiteError: There is no such site.
        MissingDependencyError: safetensors is not installed.
    """
    library = require_safetensors()
    if not isinstance(model, MorphableModel):
        raise AdapterError(
            f"save_adapter() needs a morphed model, not a {type(model).__name__}; nothing else has seeds"
        )
    folder = path_of(path, "the folder of an adapter", AdapterError)
    base = base_model_name_or_path
    base = os.fspath(base) if isinstance(base, os.PathLike) else base
    for name, value in (("base_model_name_or_path", base), ("prefix", prefix)):
        if value is not None and not isinstance(value, str):
            raise AdapterError(f"{name}={shown(value)}: expected a text")
    with model.growth.lock:
        saved = {seed.name: _as_lora(seed) for seed in _chosen(model, sites)}
    front = f"{prefix}." if prefix else ""
    config = {
        **_config({front + site: saved[site] for site in saved}),
        "target_modules": _targets([front + site for site in saved], [front + name for name in _module_names(model)]),
        "base_model_name_or_path": base or None,
    }
    tensors = {
        f"{KEY_PREFIX}{front}{site}.{name}": tensor for site in saved for name, tensor in saved[site].tensors.items()
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    _write(folder, {TENSOR_FILE: library.save(tensors, metadata={"format": "pt"}), CONFIG_FILE: text.encode()})
    return sorted(saved)


def _chosen(model: MorphableModel, sites: Iterable[str] | None) -> list[KasminaSeed]:
    if sites is None:
        seeds = [seed for seed in model.seeds.values() if seed.stage not in _NOT_THERE]
    else:
        seeds = [model.seeds[site] for site in names_of(sites, "sites", SiteError)]
    if not seeds:
        raise AdapterError("there is nothing to save: no seed of the model has a body")
    problems = [problem for problem in map(_why_not, seeds) if problem]
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise AdapterError(
            f"not all seeds can be saved as LoRA: {listed}. Name the sites to save, sites=[…], to leave others out"
        )
    dropouts = {seed.name: seed.config["dropout"] for seed in seeds}
    if len(set(dropouts.values())) > 1:
        raise AdapterError(f"an adapter has one dropout, but the seeds have several: {dropouts}. Save them separately")
    return sorted(seeds, key=lambda seed: seed.name)


def _why_not(seed: KasminaSeed) -> str | None:
    if seed.stage in _NOT_THERE:
        return f"{seed.name!r} is {seed.stage.name}"
    if seed.stage == Stage.GERMINATING:
        return f"{seed.name!r} is not live yet; wait for its germination"
    if seed.blueprint != "low_rank":
        return f"{seed.name!r} has become {seed.blueprint}"
    if seed.config["reads"] != "input":
        return f"{seed.name!r} reads the output of its module (reads='output')"
    if seed.config["activation"] is not None:
        return f"{seed.name!r} has an activation, {seed.config['activation']!r}"
    source = seed.site.source
    moves = source.convolution if source is not None else None
    if moves is not None and moves.padding != "same" and any(step != 1 for step in moves.dilation):
        return f"{seed.name!r} is a dilated convolution, which PEFT's LoRA does not follow"
    return None


def _as_lora(seed: KasminaSeed) -> _Saved:
    assert seed.body is not None
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in seed.body.state_dict().items()}
    tensors = {"lora_A.weight": state["down.weight"], "lora_B.weight": state["up.weight"]}
    rank = int(seed.config["rank"])
    lora_alpha = float(seed.config["scale"]) * rank * seed.alpha
    transposed = seed.site.source is not None and seed.site.source.fan_in_fan_out
    return _Saved(tensors, rank, lora_alpha, float(seed.config["dropout"]), transposed)


def _config(saved: Mapping[str, _Saved]) -> dict[str, Any]:
    """The settings; what most modules have in common, and patterns for the others."""
    rank = Counter(lora.rank for lora in saved.values()).most_common(1)[0][0]
    alpha = Counter(lora.lora_alpha for lora in saved.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {_exactly(name): lora.rank for name, lora in saved.items() if lora.rank != rank},
        "alpha_pattern": {
            _exactly(name): _number(lora.lora_alpha) for name, lora in saved.items() if lora.lora_alpha != alpha
        },
        "lora_dropout": next(iter(saved.values())).dropout,
        "fan_in_fan_out": all(lora.fan_in_fan_out for lora in saved.values()),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _exactly(name: str) -> str:
    """A pattern for this module and for no other whose name ends alike."""
    return "^" + re.escape(name)


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _targets(wanted: list[str], names: list[str]) -> list[str] | str:
    """The modules' names or, where PEFT would take those for others too because it compares ends, a regular expression."""
    others = set(names) - set(wanted)
    if not any(other.endswith(f".{name}") for other in others for name in wanted):
        return wanted
    return "|".join(re.escape(name) for name in wanted)


def _module_names(model: MorphableModel) -> list[str]:
    return [name for name, _ in model.named_modules() if name and name.partition(".")[0] != NAMESPACE]


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files so that each is there whole or as it was."""
    temporary = {name: folder / f".{name}.{os.getpid()}" for name in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary[name].write_bytes(content)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    except OSError as error:
        raise AdapterFileError(f"the adapter cannot be written to {folder}: {error}") from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()
