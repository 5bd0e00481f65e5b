"""unload_adapter: take LoRA off the seeds of a model, to make room for another adapter."""

from __future__ import annotations

from collections.abc import Iterable

from esper_fx.checks import names_of
from esper_fx.errors import AdapterError, SiteError
from esper_fx.lifecycle import Stage
from esper_fx.model import MorphableModel
from esper_fx.ops import reads_source

_NOT_THERE = (Stage.DORMANT, Stage.EMBARGOED, Stage.ERROR)


def unload_adapter(model: MorphableModel, sites: Iterable[str] | None = None) -> list[str]:
    """Silence the seeds that are LoRA at once; their bodies go in one step, and their sites are free again without embargo.

    Another adapter may be loaded after that step. Without compiled programs it is over when this returns; with them it comes
    when there are kernels without the bodies: ``model.settle()`` waits for it.

    Args:
        model: A morphed model.
        sites: The sites to free. Default: all whose body reads its module's input.

    Returns:
        The sites that become free.

    Raises:
        AdapterError: ``model`` is not morphed.
        SiteError: There is no such site.
        LifecycleError: A seed cannot be pruned: it is FOSSILIZED, or has no body. Nothing has changed then.
    """
    if not isinstance(model, MorphableModel):
        raise AdapterError(
            f"unload_adapter() needs a morphed model, not a {type(model).__name__}; nothing else has seeds"
        )
    growth = model.growth
    with growth.lock:
        if sites is None:
            seeds = [s for s in model.seeds.values() if s.stage not in _NOT_THERE and reads_source(s.body)]
        else:
            seeds = [model.seeds[site] for site in names_of(sites, "sites", SiteError)]
        growth.prune_together(seeds, "the adapter was unloaded", embargo_steps=0)
    return [seed.name for seed in seeds]
