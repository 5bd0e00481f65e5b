"""Which dimension of a site's value holds features: what the user says of it, site by site."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from esper_fx.checks import shown, whole
from esper_fx.errors import SiteError
from esper_fx.passes.find_sites import glob_matches

FeatureDim = int | Mapping[str, int] | None
"""One for all sites, or by site: names and globs of sites. None, and sites that none names, are guessed."""


def feature_dims(given: Any, sites: Sequence[str]) -> dict[str, int]:
    """The dimension for every site that one is given for.

    Args:
        given: What the user says. A site's own name goes before globs, earlier globs before later ones.
        sites: Names of all sites.

    Raises:
        SiteError: It is no whole number or mapping to such, or it names a site that there is not.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return dict.fromkeys(sites, _whole(given, ""))
    dims = {pattern: _whole(dim, f" for {shown(pattern)}") for pattern, dim in given.items()}
    for pattern in dims:
        if not isinstance(pattern, str) or not any(glob_matches(pattern, site) for site in sites):
            near = ", ".join(difflib.get_close_matches(str(pattern), sites, n=3, cutoff=0.0))
            raise SiteError(
                f"feature_dim names {shown(pattern)}, which is none of the sites. Nearest sites: {near}. '*' stays within one "
                "level of the dotted name, '**' crosses levels."
            )
    found = {site: next((dim for pattern, dim in dims.items() if glob_matches(pattern, site)), None) for site in sites}
    return {site: dims.get(site, dim) for site, dim in found.items() if dim is not None}


def resolved(dim: int, shape: Sequence[int], site: str) -> int:
    """The dimension of a value as a non-negative number.

    Raises:
        SiteError: The value has no such dimension.
    """
    if not -len(shape) <= dim < len(shape):
        options = f"a whole number from {-len(shape)} to {len(shape) - 1}" if shape else "a value with dimensions"
        raise SiteError(
            f"feature_dim={dim} does not fit site {site!r}: its value has shape {list(shape)}, expected {options}"
        )
    return dim % len(shape)


def _whole(value: Any, where: str) -> int:
    number = whole(value)
    if number is None:
        raise SiteError(
            f"feature_dim={shown(value)}{where}: expected a whole number, such as 1 for maps [N, C, *] or -1 for the last "
            "dimension"
        )
    return number
