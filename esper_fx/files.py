"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from esper_fx.errors import EsperError


def write_whole(target: Path, text: str, what: str, error: type[EsperError]) -> None:
    """Write a text file so that whoever reads it meanwhile finds all of it, or what was there before.

    Args:
        target: The file; its folder must be there.
        text: What it holds then.
        what: What that is, for a message: "the lineage".
        error: What to raise where it cannot be written; the file is as before then.
    """
    temporary = target.parent / f"{target.name}.{os.getpid()}.tmp"  # with_name has no answer for paths without a name
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    except OSError as problem:
        with contextlib.suppress(OSError):
            temporary.unlink()
        missing = "" if target.parent.is_dir() else f": there is no folder {target.parent}"
        why = ": that is a folder, give a file's name" if target.is_dir() else missing
        raise error(f"{what} cannot be written to {target}{why} ({problem.strerror or problem})") from problem
