"""esper_fx: neural networks that change their own structure while they train, inside torch.compile."""

from __future__ import annotations

from esper_fx.blueprints import Blueprint, blueprint
from esper_fx.cache import ArtifactStore, KernelCache, KernelCompiler, KernelKey
from esper_fx.errors import (
    BlueprintError,
    CheckpointError,
    EsperError,
    GerminationError,
    KernelBuildError,
    LifecycleError,
    MorphError,
    OptimizerError,
    SettingsError,
    SiteError,
    StoreError,
    UnknownBlueprintError,
)
from esper_fx.growth import Morphology
from esper_fx.lifecycle import GrowthEvent, Ledger, Stage
from esper_fx.morph import MorphableModel, morph, wrap
from esper_fx.optim import attach
from esper_fx.seed import Germination, KasminaSeed
from esper_fx.settings import Settings, configure, settings
from esper_fx.site import SiteSpec
from esper_fx.state import KasminaStateLayout
from esper_fx.stats import EngineStats

__version__ = "0.1.0"

__all__ = [
    "ArtifactStore",
    "Blueprint",
    "BlueprintError",
    "CheckpointError",
    "EngineStats",
    "EsperError",
    "Germination",
    "GerminationError",
    "GrowthEvent",
    "KasminaSeed",
    "KasminaStateLayout",
    "KernelBuildError",
    "KernelCache",
    "KernelCompiler",
    "KernelKey",
    "Ledger",
    "LifecycleError",
    "MorphError",
    "MorphableModel",
    "Morphology",
    "OptimizerError",
    "Settings",
    "SettingsError",
    "SiteError",
    "SiteSpec",
    "Stage",
    "StoreError",
    "UnknownBlueprintError",
    "attach",
    "blueprint",
    "configure",
    "morph",
    "settings",
    "wrap",
]
