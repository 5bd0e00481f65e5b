"""Settings: defaults, environment, scopes, and what is refused."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

import esper_fx
from esper_fx.errors import SettingsError
from esper_fx.settings import Settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("ESPER_FX_"):
            monkeypatch.delenv(name)


def test_a_with_block_changes_settings_for_its_length() -> None:
    before = esper_fx.settings()
    with esper_fx.configure(workers=3, store=False) as inside:
        assert inside is esper_fx.settings()
        assert inside == dataclasses.replace(before, workers=3, store=False)
        with esper_fx.configure(workers=5):
            assert (esper_fx.settings().workers, esper_fx.settings().store) == (5, False)
        assert esper_fx.settings() is inside
    assert esper_fx.settings() is before


def test_a_with_block_that_fails_restores_too() -> None:
    before = esper_fx.settings()
    with pytest.raises(RuntimeError), esper_fx.configure(workers=3):
        raise RuntimeError
    assert esper_fx.settings() is before


def test_without_a_with_block_the_change_stays() -> None:
    before = esper_fx.settings()
    restore = esper_fx.configure(embargo_steps=7)
    try:
        assert esper_fx.settings().embargo_steps == 7
        esper_fx.configure(worker_nice=3)
        assert (esper_fx.settings().embargo_steps, esper_fx.settings().worker_nice) == (7, 3)
    finally:
        restore.__exit__(None, None, None)
    assert esper_fx.settings() is before


def test_a_folder_may_be_a_string() -> None:
    with esper_fx.configure(cache_dir="somewhere") as inside:
        assert inside.cache_dir == Path("somewhere")
    with esper_fx.configure(cache_dir=None) as inside:
        assert inside.cache_dir is None


@pytest.mark.parametrize(
    ("changes", "wording"),
    [
        (
            {"wokers": 2},
            r"there is no setting 'wokers'; did you mean 'workers'\?.*cache_dir, store, .*workers, worker_nice",
        ),
        ({"zzz": 2}, r"there is no setting 'zzz'.*cache_dir, store, .*workers, worker_nice"),
        ({"workers": -1}, r"setting workers=-1: expected a (whole )?number from 0 to 256"),
        ({"workers": 1000}, r"setting workers=1000: expected a (whole )?number from 0 to 256"),
        ({"workers": "two"}, r"setting workers='two': expected a (whole )?number"),
        ({"workers": True}, r"setting workers=True: expected a (whole )?number"),
        ({"workers": 1.5}, r"setting workers=1.5: expected a whole number"),
        ({"worker_nice": 20}, r"setting worker_nice=20: expected a (whole )?number from 0 to 19"),
        ({"worker_threads": 0}, r"setting worker_threads=0: expected a (whole )?number from 1"),
        ({"max_entries": 0}, r"setting max_entries=0: expected a (whole )?number from 1"),
        ({"max_bytes": 0}, r"setting max_bytes=0: expected a (whole )?number from 1"),
        ({"embargo_steps": -1}, r"setting embargo_steps=-1: expected a (whole )?number from 0"),
        ({"job_timeout": 0}, r"setting job_timeout=0: expected a number from 0.001"),
        ({"incubation_alpha": float("nan")}, r"setting incubation_alpha=nan: expected a number from"),
        ({"incubation_alpha": float("inf")}, r"setting incubation_alpha=inf: expected a number from"),
        ({"store": "no"}, r"setting store='no': expected"),
        ({"blocks": 2}, r"setting blocks=2: expected"),
        ({"workers": 2, "embargo_steps": -1}, r"embargo_steps=-1"),
    ],
)
def test_what_does_not_exist_or_is_out_of_range_is_refused_and_changes_nothing(
    changes: dict[str, Any], wording: str
) -> None:
    before = esper_fx.settings()
    with pytest.raises(SettingsError, match=wording) as caught:
        esper_fx.configure(**changes)
    assert isinstance(caught.value, ValueError)
    assert esper_fx.settings() is before


def test_no_path_is_not_the_folder_one_is_in() -> None:
    with pytest.raises(SettingsError, match="cache_dir='': expected the path of a folder"):
        esper_fx.configure(cache_dir="")


def test_the_hint_and_the_list_of_settings_are_two_sentences() -> None:
    with pytest.raises(SettingsError, match=r"there is no setting 'zzz'\. Settings: "):
        esper_fx.configure(zzz=2)
    with pytest.raises(SettingsError, match=r"did you mean 'workers'\? Settings: "):
        esper_fx.configure(wokers=2)


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("ESPER_FX_WORKERS", "3", "workers", 3),
        ("ESPER_FX_WORKER_NICE", "0", "worker_nice", 0),
        ("ESPER_FX_STORE", "0", "store", False),
        ("ESPER_FX_STORE", "True", "store", True),
        ("ESPER_FX_BLOCKS", "no", "blocks", False),
        ("ESPER_FX_CACHE_DIR", "folder/inside", "cache_dir", Path("folder/inside")),
        ("ESPER_FX_JOB_TIMEOUT", "2.5", "job_timeout", 2.5),
        ("ESPER_FX_MAX_BYTES", "1024", "max_bytes", 1024),
    ],
)
def test_every_setting_has_an_environment_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, field: str, value: Any
) -> None:
    monkeypatch.setenv(variable, text)
    found = Settings.from_environment()
    assert getattr(found, field) == value
    assert type(getattr(found, field)) is type(value) or isinstance(value, Path)
    assert dataclasses.replace(found, **{field: getattr(Settings(), field)}) == Settings()


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("ESPER_FX_WORKERS", "many"),
        ("ESPER_FX_STORE", "perhaps"),
        ("ESPER_FX_JOB_TIMEOUT", ""),
        ("ESPER_FX_CACHE_DIR", ""),
        ("ESPER_FX_WORKER_NICE", "99"),
    ],
)
def test_an_environment_variable_that_cannot_be_read_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str
) -> None:
    monkeypatch.setenv(variable, text)
    name = variable.removeprefix("ESPER_FX_")
    with pytest.raises(SettingsError, match=f"(?i){name}.*{text}"):
        Settings.from_environment()


def test_settings_are_immutable_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        esper_fx.settings().workers = 3  # type: ignore[misc]
    assert hash(Settings()) == hash(Settings())
    assert Settings() == Settings()
