"""What compiled code depends on besides graphs: the source of what makes it out of them."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

#: Packages and modules: operators and kernels, and whatever a graph goes through after its key is taken.
SOURCES = (
    "esper_fx.ops",
    "esper_fx.kernels",
    "esper_fx.passes",
    "esper_fx.engine.build",
    "esper_fx.engine.choice",
    "esper_fx._torch",
    "esper_fx.artifact",
)


@cache
def source_digest() -> str:
    """Sha256 of these sources: a kernel that an older esper_fx has compiled is not taken for one of this."""
    digest = hashlib.sha256()
    for name in SOURCES:
        spec = find_spec(name)
        origin = Path(str(spec and spec.origin))
        for path in sorted(origin.parent.glob("*.py")) if origin.name == "__init__.py" else [origin]:
            digest.update(f"{name}/{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()
