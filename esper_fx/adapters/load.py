"""load_adapter: put a LoRA checkpoint onto the seeds of a morphed model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from esper_fx import blueprints
from esper_fx.adapters.checkpoint import Lora, read_checkpoint
from esper_fx.adapters.match import match
from esper_fx.checks import path_of
from esper_fx.errors import AdapterError, BlueprintError, LifecycleError
from esper_fx.germination import Germination
from esper_fx.growth import Order
from esper_fx.lifecycle import Stage
from esper_fx.model import MorphableModel
from esper_fx.morphing.branch import NAMESPACE
from esper_fx.seed import KasminaSeed


def load_adapter(
    model: MorphableModel, path: str | os.PathLike[str], *, trainable: bool = False, alpha: float = 1.0
) -> dict[str, Germination]:
    """Put a LoRA adapter that PEFT has saved onto the seeds at its modules; the model then computes what PEFT's would.

    Each seed becomes a ``low_rank`` body that reads its module's input, with the adapter's weights, and goes straight to
    ACTIVE. All go live in one step: at once without compiled programs, else when their kernels are there. The tensors take
    the dtype and the device of their sites. Dropout of the adapter acts in training mode, as PEFT's does.

    Args:
        model: A morphed model with sites at the adapter's modules, asleep: see :func:`adapter_modules`.
        path: The folder that PEFT's ``save_pretrained`` wrote.
        trainable: Whether the adapter's weights get gradients and join an attached optimizer.
        alpha: Factor on all that the adapter adds.

    Returns:
        For each site its germination; ``wait()`` on one of them waits for all.

    Raises:
        AdapterError: The checkpoint cannot be read, is not a LoRA adapter of the supported kind, or does not fit the model.
        LifecycleError: A seed is not DORMANT, or ``alpha`` is no finite number.
        SiteError: Nothing has flowed through a site yet, so that its shape is not known.
        MissingDependencyError: safetensors is not installed.
        Nothing has changed then.
    """
    if not isinstance(model, MorphableModel):
        raise AdapterError(
            f"load_adapter() needs a morphed model, not a {type(model).__name__}; call esper_fx.morph first"
        )
    folder = path_of(path, "the folder of an adapter", AdapterError)
    adapter = f"the adapter in {folder}"
    loras = read_checkpoint(folder)
    names = {name for name, _ in model.named_modules() if name and not _is_ours(name)}
    sites = match(adapter, list(loras), model.seeds, names)
    with model.growth.lock:
        seeds = {model.seeds[site]: loras[module] for module, site in sites.items()}
        awake = [f"{seed.name!r} is {seed.stage.name}" for seed in seeds if seed.stage != Stage.DORMANT]
        if awake:
            raise LifecycleError(
                f"{adapter} needs seeds that are DORMANT, but {', '.join(awake[:5])}"
                f"{f' and {len(awake) - 5} more are awake' if len(awake) > 5 else ''}. Take away what is there: "
                "unload_adapter(model) frees the sites of an adapter for the next step, prune() after the embargo"
            )
        orders = [_order(adapter, seed, lora, trainable, alpha) for seed, lora in seeds.items()]
        germinations = model.growth.germinate_together(orders)
    return {germination.seed.name: germination for germination in germinations}


def _order(adapter: str, seed: KasminaSeed, lora: Lora, trainable: bool, alpha: float) -> Order:
    rank = lora.down.shape[0]
    config = {"rank": rank, "reads": "input", "scale": lora.scale, "dropout": lora.dropout}
    weights = {"down.weight": lora.down, "up.weight": lora.up}
    for name, shape in _expected(adapter, seed, config).items():
        if weights[name].shape != shape:
            raise AdapterError(
                f"{adapter} does not fit module {seed.name!r}: its {_PEFT_NAMES[name]} has shape {list(weights[name].shape)}, "
                f"expected {list(shape)} for rank {rank} there"
            )
    return Order(seed, "low_rank", config, weights, alpha, trainable)


def _expected(adapter: str, seed: KasminaSeed, config: Mapping[str, Any]) -> dict[str, torch.Size]:
    kind, site = blueprints.get("low_rank"), seed.site
    reason = kind.fits(site)
    try:
        if reason is not None:
            raise BlueprintError(reason)
        with torch.device("meta"):
            body = kind.function(site, **kind.bind(config))
    except BlueprintError as error:
        raise AdapterError(f"{adapter} does not fit module {seed.name!r}: {error}") from error
    return {name: tensor.shape for name, tensor in body.state_dict().items()}


def _is_ours(name: str) -> bool:
    return name == NAMESPACE or name.startswith(f"{NAMESPACE}.")


_PEFT_NAMES = {"down.weight": "lora_A", "up.weight": "lora_B"}
