"""How many examples a property gets."""

from __future__ import annotations

from hypothesis import settings


def examples(percent: int) -> settings:
    """Settings with this share of the profile's examples, so that the nightly profile still runs many."""
    assert settings.default is not None
    return settings(max_examples=max(1, settings.default.max_examples * percent // 100))


def property_examples() -> settings:
    """Settings of the property lane: 200 examples in CI, 10,000 in the nightly profile, else as many as the profile says."""
    assert settings.default is not None
    counts = {"ci": 200, "nightly": 10_000}
    name = settings.get_current_profile_name()
    return settings(max_examples=counts.get(name, settings.default.max_examples))
