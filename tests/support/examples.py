"""How many examples an expensive property gets."""

from __future__ import annotations

from hypothesis import settings


def examples(percent: int) -> settings:
    """Settings with this share of the profile's examples, so that the nightly profile still runs many."""
    assert settings.default is not None
    return settings(max_examples=max(1, settings.default.max_examples * percent // 100))
