"""What is measured at the sites of a model while it runs: on sampled steps only, so that the others pay nothing.

May import the state arrays and operators; the engine knows of it only what takes a step's measurements.
"""

from __future__ import annotations

from esper_fx.telemetry.exporters import JsonLines, TensorBoard
from esper_fx.telemetry.records import SiteRecord, records
from esper_fx.telemetry.watch import Watch, watch

__all__ = ["JsonLines", "SiteRecord", "TensorBoard", "Watch", "records", "watch"]
