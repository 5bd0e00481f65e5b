"""Builds kernels ahead of time in a process that is not interpreting, and prints, as JSON, what became of them.

python -m tests.support.kernel_builds cuda:90,hip:gfx942 FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from esper_fx import ArtifactStore
from esper_fx.commands.kernel_build import build_kernels
from esper_fx.kernels.build_cases import BuildCase, build_cases


def first_of_each_file() -> Iterator[BuildCase]:
    """The first example call of every file with kernels."""
    for _, cases in groupby(build_cases(), key=lambda case: case.call.__module__):
        yield next(cases)


if __name__ == "__main__":
    rows = build_kernels(sys.argv[1], ArtifactStore(Path(sys.argv[2])), cases=list(first_of_each_file()), processes=2)
    json.dump([asdict(row) for row in rows], sys.stdout)
