"""Read a LoRA checkpoint as PEFT writes it: which modules it is for, and the two matrices and the scale of each."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import Tensor

from esper_fx.adapters.config import CONFIG_FILE, LoraConfig, read_config
from esper_fx.checks import cause, path_of
from esper_fx.errors import AdapterError, AdapterFileError, MissingDependencyError

TENSOR_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

_KEY = re.compile(rf"(?:{re.escape(KEY_PREFIX)})?(?P<module>.+?)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_FOREIGN = {
    "lora_embedding_": "LoRA of an embedding, which is not supported",
    "lora_magnitude_vector": "DoRA, which is not supported",
    "lora_B.bias": "a bias inside LoRA, which is not supported",
}


@dataclass(frozen=True)
class Lora:
    """What an adapter adds at one module: scale · up · down · input.

    Attributes:
        down: lora_A, ``[rank, in]`` or a convolution's weight ``[rank, in, *]``.
        up: lora_B, ``[out, rank]`` or a 1x1 convolution's weight.
        scale: Factor on the result.
        dropout: Probability that a feature of the input is dropped in training.
    """

    down: Tensor
    up: Tensor
    scale: float
    dropout: float


def adapter_modules(path: str | os.PathLike[str]) -> list[str]:
    """Names of the modules that an adapter is for, as the checkpoint has them: ``morph(net, sites=adapter_modules(path))``.

    Args:
        path: The folder that PEFT's ``save_pretrained`` wrote.

    Raises:
        AdapterError: The checkpoint cannot be read, or is not a LoRA adapter of the supported kind.
        MissingDependencyError: safetensors is not installed.
    """
    return list(read_checkpoint(path_of(path, "the folder of an adapter", AdapterError)))


def read_checkpoint(folder: Path) -> dict[str, Lora]:
    """Read an adapter, by the modules' names as it has them, sorted.

    Raises:
        AdapterFileError: A file is missing or cannot be read.
        AdapterError: It is not a LoRA adapter of the supported kind, or contradicts itself.
        MissingDependencyError: safetensors is not installed.
    """
    if not folder.is_dir():
        raise AdapterFileError(
            f"{folder} is not a folder: expected the one that PEFT's save_pretrained wrote, with {CONFIG_FILE} and "
            f"{TENSOR_FILE}"
        )
    config = read_config(folder / CONFIG_FILE)
    halves = _halves(folder / TENSOR_FILE, _read_tensors(folder / TENSOR_FILE))
    return {module: _lora(folder, module, halves[module], config) for module in sorted(halves)}


def require_safetensors() -> ModuleType:
    """The module ``safetensors.torch``.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingDependencyError(
            "reading and writing adapters needs the package safetensors: pip install 'esper-fx[adapters]'"
        ) from error
    return safetensors.torch


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    library = require_safetensors()
    if not path.exists():
        old = " There is an adapter_model.bin, which is not read, because loading it would execute code in it."
        raise AdapterFileError(
            f"{path} is missing: expected the tensors of the adapter, as PEFT's save_pretrained writes them."
            + old * (path.parent / "adapter_model.bin").exists()
        )
    try:
        tensors: dict[str, Tensor] = library.load_file(path)
    except Exception as error:
        raise AdapterFileError(
            f"{path} cannot be read as safetensors ({cause(error)}): it is truncated or something else"
        ) from error
    return tensors


def _halves(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors by module and by "A" or "B"."""
    found: dict[str, dict[str, Tensor]] = {}
    adapters: set[str | None] = set()
    foreign: list[str] = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            foreign.append(f"{key!r} ({_what_it_is(key)})")
            continue
        if not tensor.is_floating_point():
            raise AdapterError(f"{path}: {key!r} has dtype {tensor.dtype}, expected a floating one")
        adapters.add(match["adapter"])
        found.setdefault(match["module"], {})[match["half"]] = tensor
    if foreign or not found:
        listed = ", ".join(foreign[:4]) + f" and {len(foreign) - 4} more" * (len(foreign) > 4)
        raise AdapterError(
            f"{path} holds what does not belong to a LoRA adapter: {listed}"
            if foreign
            else f"{path} holds no tensors, expected lora_A.weight and lora_B.weight of some modules"
        )
    if len(adapters) > 1:
        raise AdapterError(f"{path} holds several adapters, {sorted(map(str, adapters))}: expected one")
    return found


def _what_it_is(key: str) -> str:
    known = (what for part, what in _FOREIGN.items() if part in key)
    return next(known, "neither lora_A.weight nor lora_B.weight of a module")


def _lora(folder: Path, module: str, halves: Mapping[str, Tensor], config: LoraConfig) -> Lora:
    missing = [f"lora_{half}.weight" for half in "AB" if half not in halves]
    if missing:
        raise AdapterError(f"{folder / TENSOR_FILE} lacks {missing[0]} of module {module!r}")
    down, up = halves["A"], halves["B"]
    if not 2 <= down.ndim == up.ndim <= 5:
        raise AdapterError(
            f"{folder / TENSOR_FILE}: lora_A of module {module!r} has shape {list(down.shape)} and lora_B {list(up.shape)}: "
            "expected two matrices, or two weights of convolutions"
        )
    if down.shape[0] != config.rank_of(module):
        raise AdapterError(
            f"{folder}: lora_A of module {module!r} has shape {list(down.shape)}, which is rank {down.shape[0]}, but "
            f"{CONFIG_FILE} says rank {config.rank_of(module)} (r and rank_pattern)"
        )
    return Lora(down, up, config.scale_of(module), config.dropout)
