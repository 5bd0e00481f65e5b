"""Keyed kernels: in memory (KernelCache), as bytes on disk (ArtifactStore), and the processes that make them.

Moves artifacts without knowing what they mean. Imports the standard library, platformdirs and esper_fx.errors only.
"""

from __future__ import annotations

from esper_fx.cache.cache import CacheStats, KernelCache
from esper_fx.cache.compiler import CompilerStats, KernelCompiler
from esper_fx.cache.job import Job, JobResult
from esper_fx.cache.key import KernelKey, explain_miss
from esper_fx.cache.manifest import Manifest
from esper_fx.cache.store import ArtifactStore

__all__ = [
    "ArtifactStore",
    "CacheStats",
    "CompilerStats",
    "Job",
    "JobResult",
    "KernelCache",
    "KernelCompiler",
    "KernelKey",
    "Manifest",
    "explain_miss",
]
