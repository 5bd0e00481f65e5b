"""Which errors are about half a C++ library, and that such a one is removed once."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch._inductor.runtime import cache_dir_utils

from esper_fx._torch import inductor


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache_dir_utils, "cache_dir", lambda: str(tmp_path))
    return tmp_path


class _Compiles:
    """Loads these libraries: those of 0 bytes cannot be, those that are not there it builds."""

    def __init__(self, *libraries: Path, good: bool = True) -> None:
        self.libraries = libraries
        self.content = b"whole" if good else b""

    def __call__(self) -> str:
        for library in self.libraries:
            if not library.exists():
                library.write_bytes(self.content)
            if not library.stat().st_size:
                raise RuntimeError(f"while compiling: ImportError: {library}: file too short")
        return "loaded"


def test_broken_libraries_are_removed_and_built_again(folder: Path) -> None:
    libraries = [folder / "one.main.so", folder / "two.main.so"]
    for library in libraries:
        library.touch()
    assert inductor._without_broken_libraries(_Compiles(*libraries)) == "loaded"
    assert all(library.stat().st_size for library in libraries)


def test_one_that_is_broken_again_is_given_up(folder: Path) -> None:
    library = folder / "one.main.so"
    library.touch()
    with pytest.raises(RuntimeError, match="file too short"):
        inductor._without_broken_libraries(_Compiles(library, good=False))


def test_a_library_of_somebody_else_is_left_alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    library = tmp_path_factory.mktemp("elsewhere") / "one.so"
    library.touch()
    with pytest.raises(RuntimeError, match="file too short"):
        inductor._without_broken_libraries(_Compiles(library))
    assert library.exists()


def test_other_errors_are_what_they_were(folder: Path) -> None:
    def fail() -> None:
        raise ValueError(f"{folder}/one.so: no")

    with pytest.raises(ValueError, match="no"):
        inductor._without_broken_libraries(fail)
