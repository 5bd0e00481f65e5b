"""The manifest of a stored artifact: what is known of it without opening it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esper_fx.cache.key import KernelKey

_FORMAT = 1
# What reading a manifest may raise when its text is anything but one.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Manifest:
    """What the store knows of an artifact without opening it.

    Attributes:
        key: The kernel's key, with its parts where the writer knew them.
        sha256: Digest of the artifact's bytes.
        nbytes: Their number.
        created: When they were stored, seconds since the epoch.
        metadata: What the writer added.
    """

    key: KernelKey
    sha256: str
    nbytes: int
    created: float
    metadata: Mapping[str, str | int | float]

    def to_json(self) -> str:
        """The manifest as it stands in its file."""
        fields = {
            "format": _FORMAT,
            "key": self.key.digest,
            "parts": dict(self.key.parts),
            "sha256": self.sha256,
            "nbytes": self.nbytes,
            "created": self.created,
            "metadata": dict(self.metadata),
        }
        return json.dumps(fields, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads a manifest; raises one of ``MALFORMED`` for anything else."""
        fields: dict[str, Any] = json.loads(text)
        if fields["format"] != _FORMAT:
            raise ValueError(f"its format is {fields['format']!r}, expected {_FORMAT}")
        key = KernelKey(fields["key"], tuple(sorted((str(k), str(v)) for k, v in fields["parts"].items())))
        sha256 = KernelKey(fields["sha256"]).digest  # becomes a file name: hexadecimal digits only
        return cls(key, sha256, int(fields["nbytes"]), float(fields["created"]), dict(fields["metadata"]))
