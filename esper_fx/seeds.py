"""Seeds, what a model hands out of its seeds: all of them by site, to look up and not to change."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from esper_fx.checks import nearest, shown
from esper_fx.errors import UnknownSiteError
from esper_fx.seed import KasminaSeed


class Seeds(Mapping[str, KasminaSeed]):
    """The seeds of a model by site, in the order of their rows in the state arrays. A view of what the model holds."""

    __slots__ = ("_seeds",)

    def __init__(self, seeds: dict[str, KasminaSeed]) -> None:
        self._seeds = seeds

    def __getitem__(self, site: str) -> KasminaSeed:
        """The seed at a site.

        Raises:
            UnknownSiteError: There is none.
        """
        try:
            return self._seeds[site]
        except (KeyError, TypeError):
            raise UnknownSiteError(
                f"the model has no site {shown(site)}; it has {len(self._seeds)}, of which the nearest are: "
                f"{nearest(site, self._seeds)}"
            ) from None

    # What Mapping would make of __getitem__ takes longer, and here the dictionary's own answers are right.

    def get(self, site: str, default: Any = None) -> Any:
        """The seed at a site, or ``default`` where there is none."""
        return self._seeds.get(site, default)

    def __contains__(self, site: object) -> bool:
        return site in self._seeds

    def __iter__(self) -> Iterator[str]:
        return iter(self._seeds)

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._seeds)

    def __len__(self) -> int:
        return len(self._seeds)

    def keys(self) -> KeysView[str]:
        """The sites."""
        return self._seeds.keys()

    def values(self) -> ValuesView[KasminaSeed]:
        """The seeds."""
        return self._seeds.values()

    def items(self) -> ItemsView[str, KasminaSeed]:
        """Sites and seeds."""
        return self._seeds.items()

    def __repr__(self) -> str:
        return repr(self._seeds)
