"""The address of a kernel: a cryptographic digest of everything that its compilation reads."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from esper_fx.checks import shown
from esper_fx.errors import ArgumentError

# Part of every digest: a change of the encoding below must give new keys.
_ENCODING = "esper_fx.kernel_key/1"
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class KernelKey:
    """What a kernel is addressed by, in memory and on disk.

    Two keys are equal when their digests are.

    Attributes:
        digest: SHA-256 over all parts, 64 lower-case hexadecimal digits.
        parts: Name and SHA-256 of every part, sorted by name. They say *what* differs between two keys.

    Raises:
        ArgumentError: ``digest`` or ``parts`` is something else.
    """

    digest: str
    parts: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        # The digest becomes a file name: nothing but hexadecimal digits may get through.
        if not isinstance(self.digest, str) or _DIGEST.match(self.digest) is None:
            raise ArgumentError(f"kernel key digest {shown(self.digest)}: expected 64 lower-case hexadecimal digits")
        if not isinstance(self.parts, tuple) or not all(
            isinstance(part, tuple) and len(part) == 2 for part in self.parts
        ):
            raise ArgumentError(f"kernel key parts {shown(self.parts)}: expected a tuple of pairs, name and SHA-256")

    @classmethod
    def of(cls, **parts: Any) -> KernelKey:
        """Makes the key of these parts.

        The order of the parts and of dictionaries inside them does not matter; everything else does, types included:
        ``1``, ``True``, ``1.0`` and ``"1"`` are four different values. Lists and tuples of equal items are equal.

        Args:
            **parts: At least one. Values are None, bool, int, float, str, bytes, and lists, tuples and dictionaries
                (with str keys) of them.

        Raises:
            ArgumentError: A value has another type (the message says where), or no part was given. Sets are refused because
                their order is not stable between processes: sort them first.
        """
        if not parts:
            raise ArgumentError("kernel key without parts: expected at least one, such as KernelKey.of(graph=...)")
        digests = tuple((name, _sha256(_tagged(parts[name], name))) for name in sorted(parts))
        return cls(_sha256([_ENCODING, *map(list, digests)]), digests)

    def __str__(self) -> str:
        return self.digest[:12]


def digest_of(key: KernelKey) -> str:
    """The digest of a kernel's key.

    Raises:
        ArgumentError: It is no key.
    """
    try:
        return key.digest
    except AttributeError:
        raise ArgumentError(
            f"{shown(key)} is no kernel key: expected a KernelKey, such as KernelKey.of(graph=...)"
        ) from None


def explain_miss(wanted: KernelKey, found: KernelKey) -> list[str]:
    """Names the parts in which two keys differ, sorted; a part that only one of them has counts as different."""
    ours, theirs = dict(wanted.parts), dict(found.parts)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def _sha256(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _tagged(value: Any, where: str) -> Any:
    """Rewrites a value so that its JSON text is one to one: JSON objects serve as type tags only."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, list | tuple):
        return [_tagged(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ArgumentError(
                    f"kernel key part {where}: its key {shown(key)} is of type {type(key).__name__}, expected str"
                )
        return {"map": [[key, _tagged(value[key], f"{where}[{key!r}]")] for key in sorted(value)]}
    advice = "; sort it into a list" if isinstance(value, set | frozenset) else ""
    raise ArgumentError(
        f"kernel key part {where} has a value of type {type(value).__name__}: expected None, bool, int, float, str, "
        f"bytes, or lists, tuples and dictionaries of them{advice}"
    )
