"""Errors of esper_fx: one base, and for each kind the built-in that a caller would expect."""

from __future__ import annotations


class EsperError(Exception):
    """Base of every error that esper_fx raises on purpose."""


class ArgumentError(EsperError, TypeError, ValueError):
    """An argument has a type or a value that cannot be used."""


class MorphError(EsperError, ValueError):
    """A model cannot be morphed as asked."""


class SiteError(EsperError, ValueError):
    """A site does not exist, or cannot carry a seed."""


class UnknownSiteError(SiteError, KeyError):
    """The model has no site of this name."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class BlueprintError(EsperError, ValueError):
    """A blueprint, its parameters or the module it built do not fit."""


class UnknownBlueprintError(BlueprintError, KeyError):
    """No blueprint is registered under this name."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class LifecycleError(EsperError, RuntimeError):
    """A seed was asked for a transition that its stage does not allow."""


class GerminationError(EsperError, RuntimeError):
    """A germination did not come to life; the seed went back to sleep and training went on."""


class KernelBuildError(EsperError, RuntimeError):
    """A kernel could not be compiled.

    Attributes:
        worker_traceback: The traceback as the worker process printed it, or None where no worker was involved.
    """

    def __init__(self, message: str, *, worker_traceback: str | None = None) -> None:
        super().__init__(message)
        self.worker_traceback = worker_traceback


class TargetError(EsperError, ValueError):
    """Kernels cannot be compiled for this kind of GPU."""


class ReplicaError(EsperError, RuntimeError):
    """Processes that train replicas of a model are not, or cannot be kept, alike."""


class CheckpointError(EsperError, RuntimeError):
    """A checkpoint does not fit the model, or a model cannot be saved; nothing was changed."""


class LineageError(EsperError, OSError):
    """A lineage cannot be written."""


class StoreError(EsperError, OSError):
    """An artifact store's folder cannot be used."""


class AdapterError(EsperError, ValueError):
    """An adapter cannot be loaded or saved as asked."""


class AdapterFileError(AdapterError, OSError):
    """A file of an adapter is missing or cannot be read."""


class MissingDependencyError(EsperError, ImportError):
    """A package is needed that is not installed."""


class InspectionError(EsperError, ValueError):
    """There is nothing to look into, or not in the way that was asked for."""


class ReportFileError(InspectionError, OSError):
    """A report cannot be written where it was to be."""


class OptimizerError(EsperError, ValueError):
    """An optimizer cannot be attached to this model, or a saved state does not fit it."""


class SettingsError(EsperError, ValueError):
    """A setting is unknown or has a value out of range."""


class TelemetryError(EsperError, ValueError):
    """A model cannot be watched as asked."""
