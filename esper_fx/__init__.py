"""esper_fx: neural networks that change their own structure while they train, inside torch.compile."""

from __future__ import annotations

from esper_fx import inspect as inspect
from esper_fx import prebuilt as prebuilt  # from now on launches of kernels look for binaries in the store
from esper_fx import telemetry as telemetry
from esper_fx.adapters import adapter_modules, load_adapter, save_adapter, unload_adapter
from esper_fx.blueprints import Blueprint, blueprint
from esper_fx.cache import ArtifactStore, KernelCache, KernelCompiler, KernelKey
from esper_fx.errors import (
    AdapterError,
    AdapterFileError,
    ArgumentError,
    BlueprintError,
    CheckpointError,
    EsperError,
    GerminationError,
    InspectionError,
    KernelBuildError,
    LifecycleError,
    LineageError,
    MissingDependencyError,
    MorphError,
    OptimizerError,
    ReplicaError,
    ReportFileError,
    SettingsError,
    SiteError,
    StoreError,
    TargetError,
    TelemetryError,
    UnknownBlueprintError,
    UnknownSiteError,
)
from esper_fx.germination import Germination
from esper_fx.growth import Morphology
from esper_fx.lifecycle import GrowthEvent, Ledger, Stage
from esper_fx.lineage import write_lineage
from esper_fx.model import MorphableModel
from esper_fx.morph import morph, wrap
from esper_fx.optim import attach
from esper_fx.replicas import synchronize_growth
from esper_fx.seed import KasminaSeed
from esper_fx.settings import Settings, configure, settings
from esper_fx.site import ConvolutionSpec, SiteSpec, SourceSpec
from esper_fx.state import KasminaStateLayout
from esper_fx.stats import EngineStats
from esper_fx.unmorph import unmorph, unwrap

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "AdapterFileError",
    "ArgumentError",
    "ArtifactStore",
    "Blueprint",
    "BlueprintError",
    "CheckpointError",
    "ConvolutionSpec",
    "EngineStats",
    "EsperError",
    "Germination",
    "GerminationError",
    "GrowthEvent",
    "InspectionError",
    "KasminaSeed",
    "KasminaStateLayout",
    "KernelBuildError",
    "KernelCache",
    "KernelCompiler",
    "KernelKey",
    "Ledger",
    "LifecycleError",
    "LineageError",
    "MissingDependencyError",
    "MorphError",
    "MorphableModel",
    "Morphology",
    "OptimizerError",
    "ReplicaError",
    "ReportFileError",
    "Settings",
    "SettingsError",
    "SiteError",
    "SiteSpec",
    "SourceSpec",
    "Stage",
    "StoreError",
    "TargetError",
    "TelemetryError",
    "UnknownBlueprintError",
    "UnknownSiteError",
    "adapter_modules",
    "attach",
    "blueprint",
    "configure",
    "load_adapter",
    "morph",
    "save_adapter",
    "settings",
    "synchronize_growth",
    "unload_adapter",
    "unmorph",
    "unwrap",
    "wrap",
    "write_lineage",
]
