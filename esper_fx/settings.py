"""Settings: one typed object, a documented default and an environment variable each, scoped by a context manager."""

from __future__ import annotations

import dataclasses
import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from esper_fx.cache._background import ForkSafeLock
from esper_fx.checks import path_of, real, shown, whole
from esper_fx.errors import SettingsError

_WHOLE = {
    "workers": (0, 256),
    "worker_nice": (0, 19),
    "worker_threads": (1, 1024),
    "max_entries": (1, 1 << 20),
    "max_bytes": (1, 1 << 50),
    "store_bytes": (0, 1 << 60),
    "embargo_steps": (0, 1 << 40),
}
_REAL = {"job_timeout": (1e-3, 1e9), "incubation_alpha": (-1e6, 1e6)}


@dataclass(frozen=True)
class Settings:
    """What can be configured; each field is read from ``ESPER_FX_<FIELD>`` when the process starts.

    Attributes:
        cache_dir: Folder of the artifact store; None is the user's cache folder.
        store: Whether kernels are kept on disk.
        store_bytes: Bytes of kernels kept on disk; the longest unused go first, when a process first compiles.
        workers: Worker processes that compile beside the training loop, 0 or more; with 0 changes run eagerly.
        worker_nice: Niceness of the workers, 0 (compete with the training loop, without pauses) to 19 (only when it idles).
        worker_threads: Threads of numeric libraries in a worker.
        job_timeout: Seconds after which a compilation is given up.
        max_entries: Kernels kept in memory.
        max_bytes: Bytes of kernels kept in memory.
        blocks: Whether the ``blocks`` plan is built, so that a change goes live before the whole program is compiled anew.
        fused_kernels: Whether fused Triton kernels run a seed on a GPU where they are measured to be faster.
        embargo_steps: Clock ticks that a pruned site stays closed.
        incubation_alpha: Alpha of a seed while it incubates.
    """

    cache_dir: Path | None = None
    store: bool = True
    store_bytes: int = 8 << 30
    workers: int = 1
    worker_nice: int = 4
    worker_threads: int = 1
    job_timeout: float = 600.0
    max_entries: int = 256
    max_bytes: int = 1 << 30
    blocks: bool = True
    fused_kernels: bool = True
    embargo_steps: int = 32
    incubation_alpha: float = 1.0

    def __post_init__(self) -> None:
        for name, (low, high) in _WHOLE.items():
            value = getattr(self, name)
            if (number := whole(value)) is None or not low <= number <= high:
                raise SettingsError(f"setting {name}={shown(value)}: expected a whole number from {low} to {high}")
            object.__setattr__(self, name, number)
        for name, (least, most) in _REAL.items():
            value = getattr(self, name)
            if (size := real(value)) is None or not least <= size <= most:
                raise SettingsError(f"setting {name}={shown(value)}: expected a number from {least} to {most}")
            object.__setattr__(self, name, size)
        for name in ("store", "blocks", "fused_kernels"):
            if not isinstance(getattr(self, name), bool):
                raise SettingsError(f"setting {name}={shown(getattr(self, name))}: expected True or False")
        folder: object = self.cache_dir
        if folder == "":
            raise SettingsError("cache_dir='': expected the path of a folder, or None for the user's cache folder")
        if folder is not None:
            object.__setattr__(self, "cache_dir", path_of(folder, "setting cache_dir", SettingsError))

    @classmethod
    def from_environment(cls) -> Settings:
        """Defaults overridden by the environment."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            text = os.environ.get(f"ESPER_FX_{field.name.upper()}")
            if text is not None:
                values[field.name] = _parse(field.name, text, field.default)
        return cls(**values)


def _parse(name: str, text: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
        if default is None and text:
            return Path(text)
        return type(default)(text)
    except (KeyError, TypeError, ValueError):
        kinds = {bool: "1, true, yes, 0, false or no", int: "a whole number", float: "a number"}
        expected = kinds.get(type(default), "the path of a folder")
        raise SettingsError(f"environment variable ESPER_FX_{name.upper()}={text!r}: expected {expected}") from None


_lock = ForkSafeLock()
_current: Settings | None = None


def settings() -> Settings:
    """The settings in force."""
    global _current  # noqa: PLW0603
    with _lock:
        if _current is None:
            _current = Settings.from_environment()
        return _current


class configure:
    """Change settings, for good or for the length of a ``with`` block.

    Example:
        >>> esper_fx.configure(workers=2)
        >>> with esper_fx.configure(store=False):
        ...     fast(x)

    Raises:
        SettingsError: A setting does not exist or its value is out of range; nothing changes then.
    """

    def __init__(self, **changes: Any) -> None:
        global _current  # noqa: PLW0603
        known = [field.name for field in dataclasses.fields(Settings)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise SettingsError(f"there is no setting {name!r}{hint} Settings: {', '.join(known)}")
        self._previous = settings()
        changed = dataclasses.replace(self._previous, **changes)
        with _lock:
            _current = changed

    def __enter__(self) -> Settings:
        return settings()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current  # noqa: PLW0603
        with _lock:
            _current = self._previous
