"""What PEFT's adapter_config.json says of a LoRA adapter, and what of it is not supported here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from esper_fx.errors import AdapterError, AdapterFileError

T = TypeVar("T")

CONFIG_FILE = "adapter_config.json"

_UNSUPPORTED = {
    "use_dora": "DoRA, which also scales each output by a learnt magnitude",
    "use_qalora": "QA-LoRA, which pools its input",
    "lora_bias": "a bias inside LoRA",
    "modules_to_save": "modules that were trained whole",
    "trainable_token_indices": "tokens of an embedding that were trained",
    "target_parameters": "LoRA on parameters instead of modules",
    "layer_replication": "layers that are there several times",
    "alora_invocation_tokens": "LoRA that begins at certain tokens",
    "arrow_config": "routing between adapters",
}
# These begin from changed weights of the model itself, which the checkpoint does not hold.
_CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraConfig:
    """The settings that decide what a LoRA adapter computes.

    Attributes:
        rank: Rank where ``ranks`` says nothing else.
        alpha: lora_alpha where ``alphas`` says nothing else.
        ranks: Ranks by pattern, a regular expression for the end of a module's name.
        alphas: The same for lora_alpha.
        rank_stabilised: Whether the result is multiplied by alpha / sqrt(rank) instead of alpha / rank.
        dropout: Probability that a feature is dropped in training.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rank_stabilised: bool
    dropout: float

    def rank_of(self, module: str) -> int:
        """The rank that a module, named as in the checkpoint, should have."""
        return _by_pattern(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor on what a module's LoRA returns."""
        rank = self.rank_of(module)
        return _by_pattern(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_config(path: Path) -> LoraConfig:
    """Read and check adapter_config.json.

    Raises:
        AdapterFileError: It is not there, cannot be read, or is not JSON.
        AdapterError: It does not describe a LoRA adapter, or one that is not supported.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFileError(
            f"{path} cannot be read ({type(error).__name__}: {error}): expected the JSON file that PEFT's save_pretrained "
            "writes beside the tensors"
        ) from error
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if kind != "LORA":
        raise AdapterError(f"{path} describes no LoRA adapter: peft_type is {kind!r}, expected 'LORA'")
    _refuse_unsupported(path, content)
    try:
        return LoraConfig(
            rank=_whole(content.get("r", 8), "r"),
            alpha=_real(content.get("lora_alpha", 8), "lora_alpha"),
            ranks={k: _whole(v, "rank_pattern") for k, v in _patterns(content.get("rank_pattern"), "rank_pattern")},
            alphas={k: _real(v, "alpha_pattern") for k, v in _patterns(content.get("alpha_pattern"), "alpha_pattern")},
            rank_stabilised=bool(content.get("use_rslora", False)),
            dropout=_real(content.get("lora_dropout") or 0.0, "lora_dropout"),
        )
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from error


def _refuse_unsupported(path: Path, content: Mapping[str, Any]) -> None:
    found = [f"{name}={content[name]!r} ({what})" for name, what in _UNSUPPORTED.items() if content.get(name)]
    if content.get("bias", "none") != "none":
        found.append(f"bias={content['bias']!r} (biases of the model that were trained)")
    begun = content.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(_CHANGES_THE_MODEL):
        found.append(
            f"init_lora_weights={begun!r} (it changes the model's own weights; PEFT's save_pretrained converts such an "
            "adapter with path_initial_model_for_weight_conversion)"
        )
    if found:
        raise AdapterError(f"{path} asks for what is not supported: {'; '.join(found)}")


def _by_pattern(patterns: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first pattern that matches the end of a module's name, from a dot on, as PEFT matches."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _patterns(value: Any, name: str) -> list[tuple[str, Any]]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r}: expected an object")
    for pattern in value or ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name} has the pattern {pattern!r}, which is no regular expression: {error}") from error
    return list((value or {}).items())


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number from 1")
    return value


def _real(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: expected a finite number")
    return value
