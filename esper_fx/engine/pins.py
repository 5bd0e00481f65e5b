"""Pins: the kernels that a program keeps in the cache."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from esper_fx.cache import KernelCache
from esper_fx.cache._background import ForkSafeLock
from esper_fx.engine.region import Variant
from esper_fx.engine.service import Service


class Pins:
    """Variants whose kernels a program keeps in the cache; given back when it goes.

    Attributes:
        variants: Those, each once.
    """

    def __init__(self, owner: Service) -> None:
        self.variants: list[Variant] = []
        self._cache = owner.cache
        self._lock = ForkSafeLock()
        weakref.finalize(self, _unpin, self._cache, self.variants)

    def replace(self, variants: Sequence[Variant]) -> None:
        """Keep these from now on, and no others."""
        with self._lock:
            new, old = list(dict.fromkeys(variants)), list(self.variants)
            for variant in new:
                self._cache.pin(variant.key)
            self.variants[:] = new
        _unpin(self._cache, old)


def _unpin(cache: KernelCache, variants: list[Variant]) -> None:
    for variant in variants:
        cache.unpin(variant.key)
