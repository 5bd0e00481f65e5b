"""PyTorch's global flags: read, set for a while, and left alone where they are already as wanted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from esper_fx import flags
from esper_fx.engine.build import Ambient


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with flags.applied(flags.current()):
        yield


def _set_product() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def _set_convolution() -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]


def _set_all() -> None:
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]


CHANGES = {
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "deterministic, warned of": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "attention": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "product": _set_product,
    "convolution": _set_convolution,
    "all": _set_all,
}


@pytest.mark.parametrize("change", CHANGES)
def test_flags_of_another_process_are_set_for_a_while(change: str) -> None:
    before = flags.current()
    with flags.applied(before):
        CHANGES[change]()
        there = flags.current()
    assert flags.current() == before != there
    with flags.applied(there):
        assert flags.current() == there
    assert flags.current() == before


@pytest.mark.parametrize("change", CHANGES)
def test_flags_are_in_keys(change: str) -> None:
    before = Ambient.current().describe()
    CHANGES[change]()
    assert Ambient.current().describe() != before


def test_what_is_as_wanted_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(value: str) -> None:
        raise AssertionError(f"written: {value}")

    monkeypatch.setattr(flags, "_FLAGS", {name: (read, refuse) for name, (read, _) in flags._FLAGS.items()})
    with flags.applied(flags.current()):
        pass


def test_said_and_unsaid_full_precision_is_the_same() -> None:
    before = flags.current()
    torch.set_float32_matmul_precision("highest")
    assert flags.current() == before


def test_flags_are_set_back_after_an_error() -> None:
    before = flags.current()
    with pytest.raises(RuntimeError, match="in between"), flags.applied({**before, "dtype": "float64"}):
        raise RuntimeError("in between")
    assert flags.current() == before
