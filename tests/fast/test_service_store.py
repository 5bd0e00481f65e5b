"""A store that cannot be used: refused where the user has named its folder, done without where it is the usual one."""

from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

import esper_fx
from esper_fx.engine.service import service
from esper_fx.errors import StoreError


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def test_a_folder_that_was_named_is_refused(shared: Path) -> None:
    with esper_fx.configure(cache_dir=shared, workers=0), pytest.raises(StoreError, match="is writable by others"):
        service()


def test_without_the_usual_folder_kernels_are_not_kept(
    shared: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(shared))
    with esper_fx.configure(cache_dir=None, workers=0, max_entries=17):
        assert service().cache.store is None
    assert "kernels are not kept on disk" in caplog.text


def test_settings_that_differ_in_what_the_store_keeps_have_services_of_their_own(tmp_path: Path) -> None:
    with esper_fx.configure(cache_dir=tmp_path, workers=0):
        one = service()
        with esper_fx.configure(store_bytes=1000):
            assert service() is not one
        assert service() is one
