"""Find the sites of a model that an adapter's modules are: by name, or by name behind one prefix."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from esper_fx.errors import AdapterError


def match(adapter: str, modules: Sequence[str], sites: Collection[str], model: Collection[str]) -> Mapping[str, str]:
    """The site of each of an adapter's modules.

    The names are the same, or all differ by one prefix, because the adapter was trained on a wrapper of the model, or on a
    part of it.

    Args:
        adapter: What to call the adapter in messages.
        modules: Names of the modules that it is for; at least one.
        sites: Names of the model's sites.
        model: Names of the model's modules.

    Raises:
        AdapterError: A module is not there, or is no site, or the prefix is ambiguous.
    """
    same = {module: module for module in modules}
    renamings = [same, *_renamings(modules, model)]
    fitting = [renaming for renaming in renamings if all(site in sites for site in renaming.values())]
    if same in fitting or len(fitting) == 1:
        return fitting[0]
    if len(fitting) > 1:
        first = modules[0]
        readings = " or ".join(repr(renaming[first]) for renaming in fitting)
        raise AdapterError(
            f"{adapter} does not say which modules it is for: {first!r} may be {readings}. Morph the model that it was trained "
            "on, so that the names are the same"
        )
    best = max(renamings, key=lambda renaming: sum(name in model for name in renaming.values()))
    raise AdapterError(f"{adapter} does not fit: " + "; ".join(_problems(best, sites, model)))


def _renamings(modules: Sequence[str], model: Collection[str]) -> Iterator[dict[str, str]]:
    """All ways to take one prefix from every name, or to put one before every name, that give some module of the model."""
    first = modules[0]
    parts = first.split(".")
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length]) + "."
        if all(module.startswith(prefix) for module in modules):
            yield {module: module.removeprefix(prefix) for module in modules}
    prefixes = (name.removesuffix(module) for module in modules for name in model if name.endswith(f".{module}"))
    for prefix in sorted(set(prefixes)):
        yield {module: prefix + module for module in modules}


def _problems(renaming: Mapping[str, str], sites: Collection[str], model: Collection[str]) -> Iterator[str]:
    absent = [module for module, name in renaming.items() if name not in model]
    if absent:
        yield f"the model has no module {_listed(_with_nearest(module, model) for module in absent)}"
    others = [name for name in renaming.values() if name in model and name not in sites]
    if others:
        same = all(module == name for module, name in renaming.items())
        example = ", for example sites=esper_fx.adapter_modules(path)" if same else ""
        yield f"no seed sits at {_listed(map(repr, others))}: pass these modules to morph(){example}"


def _with_nearest(module: str, model: Collection[str]) -> str:
    nearest = difflib.get_close_matches(module, sorted(model), n=2, cutoff=0.0)
    return f"{module!r} (nearest: {', '.join(map(repr, nearest)) or 'none'})"


def _listed(items: Iterable[str], most: int = 5) -> str:
    every = list(items)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
