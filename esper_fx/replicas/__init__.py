"""Data-parallel training: what grows is kept alike in all processes that train replicas of one model."""

from __future__ import annotations

from esper_fx.replicas.synchronize import Replicas, synchronize_growth, warn_of_other_processes

__all__ = ["Replicas", "synchronize_growth", "warn_of_other_processes"]
