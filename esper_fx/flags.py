"""PyTorch's global flags that change what is compiled, as text: for keys, and for the processes that compile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

#: What computes float32 products and convolutions, by the path of its ``fp32_precision``; the general ones come first.
_PRECISIONS = (
    "",
    "cudnn",
    "cuda.matmul",
    "cudnn.conv",
    "cudnn.rnn",
    "mkldnn",
    "mkldnn.matmul",
    "mkldnn.conv",
    "mkldnn.rnn",
)

#: Implementations of scaled_dot_product_attention that can be switched off; which one is taken is decided while compiling.
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")


def _backend(path: str) -> Any:
    found: Any = torch.backends
    for part in path.split(".") if path else ():
        found = getattr(found, part)
    return found


def _precision(path: str) -> str:
    value = str(_backend(path).fp32_precision)
    return "ieee" if value == "none" and path.endswith("matmul") else value  # the same, said and unsaid


def _set_precision(path: str, value: str) -> None:
    _backend(path).fp32_precision = value


def _matmul() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set through ``fp32_precision``, which this older interface cannot express
        return ""


def _set_matmul(value: str) -> None:
    if value:
        torch.set_float32_matmul_precision(value)


def _deterministic() -> str:
    if not torch.are_deterministic_algorithms_enabled():
        return "no"
    return "warn" if torch.is_deterministic_algorithms_warn_only_enabled() else "yes"


def _set_deterministic(value: str) -> None:
    torch.use_deterministic_algorithms(value != "no", warn_only=value == "warn")


def _attention() -> str:
    return ",".join(name for name in _ATTENTION if getattr(torch.backends.cuda, f"{name}_sdp_enabled")())


def _set_attention(value: str) -> None:
    for name in _ATTENTION:
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(name in value.split(","))


def _set_dtype(value: str) -> None:
    torch.set_default_dtype(getattr(torch, value))


#: How each is read and written. ``matmul`` sets several precisions, so these come after it.
_FLAGS: dict[str, tuple[Callable[[], str], Callable[[str], None]]] = {
    "threads": (lambda: str(torch.get_num_threads()), lambda value: torch.set_num_threads(int(value))),
    "dtype": (lambda: str(torch.get_default_dtype()).removeprefix("torch."), _set_dtype),
    "deterministic": (_deterministic, _set_deterministic),
    "attention": (_attention, _set_attention),
    "matmul": (_matmul, _set_matmul),
    **{
        f"precision {path}".rstrip(): (partial(_precision, path), partial(_set_precision, path)) for path in _PRECISIONS
    },
}


def current() -> dict[str, str]:
    """All flags as they are now."""
    return {name: read() for name, (read, _) in _FLAGS.items()}


@contextlib.contextmanager
def applied(wanted: Mapping[str, str]) -> Iterator[None]:
    """Set all flags, and set them back at the end.

    A flag that is already as wanted is not written: PyTorch can tell, and Dynamo compiles anew.

    Args:
        wanted: What :func:`current` has returned, in this process or another one; whatever else is in it does not matter.
    """
    before = current()
    try:
        _set(wanted)
        yield
    finally:
        _set(before)


def _set(wanted: Mapping[str, str]) -> None:
    for name, (read, write) in _FLAGS.items():
        if wanted[name] != read():
            write(wanted[name])
