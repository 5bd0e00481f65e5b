"""What compiled code depends on besides graphs: the source of our operators and kernels."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("esper_fx.ops", "esper_fx.kernels")


@cache
def source_digest() -> str:
    """Sha256 of the sources of all operators and kernels: compiled code that contains one of them depends on it."""
    digest = hashlib.sha256()
    for name in PACKAGES:
        spec = find_spec(name)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            for path in sorted(Path(folder).glob("*.py")):
                digest.update(f"{name}/{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()
