"""Jobs of the kernel compiler: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from esper_fx.checks import shown
from esper_fx.errors import SettingsError


@dataclass(frozen=True)
class Job:
    """A function call for a worker process.

    Attributes:
        target: ``"package.module:function"``, importable in a fresh interpreter; the function maps bytes to bytes.
        payload: Its argument.
        priority: Lower is more urgent; jobs of equal priority run first in, first out. Above 0 is background work: a
            job that nobody waits for, which takes a smaller share of processors that a training loop keeps busy.
    """

    target: str
    payload: bytes = field(repr=False)
    priority: int = 0

    def __post_init__(self) -> None:
        check_target(self.target)

    @property
    def urgent(self) -> bool:
        """Whether somebody waits for it."""
        return self.priority <= 0


@dataclass(frozen=True)
class JobResult:
    """What a job returned, with its wall-clock and CPU seconds (children that ended included) in the worker."""

    data: bytes = field(repr=False)
    seconds: float
    cpu_seconds: float


def check_target(target: str) -> None:
    """Raises SettingsError unless a worker process could look this name up."""
    module, separator, function = target.partition(":") if isinstance(target, str) else ("", "", "")
    if not (module and separator and function):
        raise SettingsError(f"job target {shown(target)}: expected 'package.module:function'")
    if module == "__main__":
        raise SettingsError(
            f"job target {target!r}: a worker process cannot import the main script; move the function into a module"
        )
