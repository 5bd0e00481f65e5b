"""Write LoRA checkpoints as PEFT lays them out, without PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tests.support.linear_kinds import Matrices

PREFIX = "base_model.model."


def write_checkpoint(folder: Path, loras: Mapping[str, Matrices], **config: Any) -> Path:
    """A checkpoint of these modules; lora_alpha is 1 and scales are what ``config`` and the ranks say, not the matrices'."""
    ranks = {f"^{name}": lora.down.shape[0] for name, lora in loras.items()}
    content = {
        "peft_type": "LORA",
        "r": next(iter(ranks.values()), 8),
        "lora_alpha": 1,
        "rank_pattern": ranks,
        "target_modules": list(loras),
        **config,
    }
    tensors = {}
    for name, lora in loras.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = lora.down
        tensors[f"{PREFIX}{name}.lora_B.weight"] = lora.up
    return write_files(folder, content, tensors)


def write_files(folder: Path, config: Any, tensors: Mapping[str, Tensor]) -> Path:
    """The two files of a checkpoint with whatever content."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder
