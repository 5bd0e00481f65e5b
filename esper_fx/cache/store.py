"""The artifact store: kernels' bytes in a folder, each beside a JSON manifest."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import platformdirs

from esper_fx.cache import _files
from esper_fx.cache.key import KernelKey, digest_of
from esper_fx.cache.manifest import MALFORMED, Manifest
from esper_fx.checks import path_of, shown, whole
from esper_fx.errors import ArgumentError, SettingsError, StoreError

logger = logging.getLogger(__name__)

_QUARANTINE = "quarantine"
# Files that belong to no entry (a writer was killed, a newer artifact took over, quarantined evidence) go after a day.
_LEFTOVER_AGE_S = 24 * 3600.0
_READ_ATTEMPTS = 5


class ArtifactStore:
    """A folder of artifacts, addressed by ``KernelKey``, shared safely between processes.

    **Loading an artifact executes code.** The store checks that bytes are the ones that were stored, not that whoever
    stored them meant well. It therefore refuses a folder that anyone else owns or can write to, and one below a folder
    in which others can put another in its place; never point it at one whose content you would not run.

    An entry is a data file, named after its content, and a manifest that names the data. Each appears by one atomic
    rename, data first, so that readers and writers in any number of processes need no lock. Nothing is flushed to the
    disk: after a power failure an entry may be damaged, which ``get`` notices. A bad entry is moved to ``quarantine/``.

    Args:
        root: The folder. Defaults to ``kernels`` in the user's cache folder for esper_fx.
        create: Whether to create a missing folder, with access for its owner only.

    Raises:
        StoreError: The folder is missing (with ``create=False``), not a folder, not writable, owned by somebody else,
            or writable by others; or so is a folder above it (root's, and sticky ones like ``/tmp``, will do).
        SettingsError: ``root`` is no path.
    """

    def __init__(self, root: Path | None = None, *, create: bool = True) -> None:
        if root is None:
            self.root = Path(platformdirs.user_cache_dir("esper_fx")) / "kernels"
        else:
            self.root = path_of(root, "the root of an artifact store", SettingsError)
        if create:
            _files.make_private_folders(self.root)
        _files.check_folder(self.root)

    def get(self, key: KernelKey) -> bytes | None:
        """Returns the artifact's bytes after checking length and SHA-256, or None; marks the entry as used.

        A bad entry is quarantined with one logged warning and counts as absent.
        """
        path = self._manifest_path(key)
        for _ in range(_READ_ATTEMPTS):
            text = _files.read(path)
            if text is None:
                return None
            try:
                manifest = _parse(text, key)
                data = _files.read(self._data_path(key, manifest.sha256))
                problem = _problem(manifest, data)
            except MALFORMED as error:
                data, problem = None, f"its manifest cannot be read ({type(error).__name__}: {error})"
            if problem is None:
                with contextlib.suppress(OSError):
                    os.utime(path)  # the manifest's mtime is when the entry was last used
                return data
            if _files.read(path) == text:  # else another process replaced or removed the entry meanwhile: look again
                self.quarantine(key, problem)
                return None
        return None

    def put(self, key: KernelKey, data: bytes, *, metadata: Mapping[str, str | int | float]) -> None:
        """Stores an artifact, in place of the one that the key had.

        Raises:
            ArgumentError: ``data`` is no bytes, or a metadata value is neither str, int nor float.
            StoreError: The files could not be written (a full disk, a folder that went away).
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise ArgumentError(f"data of kernel {key}: expected bytes, not {shown(data)}")
        if not isinstance(metadata, Mapping):
            raise ArgumentError(f"metadata={shown(metadata)}: expected a dict, such as {{'compile_seconds': 1.5}}")
        for name, value in metadata.items():
            if not isinstance(name, str) or not isinstance(value, str | int | float):
                raise ArgumentError(
                    f"metadata {shown(name)}={shown(value)}: expected a str name and a str, int or float value"
                )
        manifest = Manifest(key, hashlib.sha256(data).hexdigest(), len(data), time.time(), metadata)
        try:
            _files.make_private_folders(self._manifest_path(key).parent)
            _files.write(self._data_path(key, manifest.sha256), data)
            _files.write(self._manifest_path(key), manifest.to_json().encode())
        except OSError as error:
            raise StoreError(f"kernel {key} could not be stored in {self.root}: {error}; free or repair it") from error

    def contains(self, key: KernelKey) -> bool:
        """Whether the key has an entry; its bytes are not verified."""
        manifest = self.manifest(key)
        return manifest is not None and self._data_path(key, manifest.sha256).is_file()

    def manifest(self, key: KernelKey) -> Manifest | None:
        """Returns the entry's manifest, or None where there is none or it cannot be read."""
        text = _files.read(self._manifest_path(key))
        with contextlib.suppress(*MALFORMED):
            return _parse(text, key) if text is not None else None
        return None

    def delete(self, key: KernelKey) -> bool:
        """Removes the key's files; returns whether it had an entry."""
        path = self._manifest_path(key)
        existed = path.is_file()
        path.unlink(missing_ok=True)  # first: a manifest never points at nothing
        for data in path.parent.glob(f"{key.digest}-*.bin"):
            data.unlink(missing_ok=True)
        return existed

    def quarantine(self, key: KernelKey, reason: str) -> None:
        """Moves the key's files to ``quarantine/`` and logs a warning with the reason."""
        logger.warning("kernel %s in %s is bad and was moved to %s/: %s", key, self.root, _QUARANTINE, reason)
        path = self._manifest_path(key)
        for file in [path, *path.parent.glob(f"{key.digest}-*.bin")]:
            # Another process may have moved it already, or the folder may be gone: either way it is out of the way.
            with contextlib.suppress(OSError):
                _files.make_private_folders(self.root / _QUARANTINE)
                file.replace(self.root / _QUARANTINE / file.name)

    def entries(self) -> list[Manifest]:
        """Returns the manifests of all entries that can be read, least recently used first."""
        used = sorted((_files.modified(path), path) for path in self.root.glob("??/*.json"))
        found = []
        for _, path in used:
            with contextlib.suppress(OSError, *MALFORMED):
                manifest = Manifest.from_json(path.read_text())
                if self._manifest_path(manifest.key) == path:
                    found.append(manifest)
        return found

    def size_bytes(self) -> int:
        """Returns the bytes of all data files, quarantined ones aside."""
        return sum(_files.size(path) for path in self.root.glob("??/*.bin"))

    def trim(self, max_bytes: int) -> int:
        """Deletes entries, oldest use first, until their data fits into ``max_bytes``; also old leftovers.

        Returns:
            How many entries were deleted.

        Raises:
            ArgumentError: ``max_bytes`` is no whole number from 0.
        """
        if (most := whole(max_bytes)) is None or most < 0:
            raise ArgumentError(f"max_bytes={shown(max_bytes)}: expected a whole number from 0")
        for path in self._leftovers():
            if time.time() - _files.modified(path) > _LEFTOVER_AGE_S:
                path.unlink(missing_ok=True)
        entries = self.entries()
        total = sum(manifest.nbytes for manifest in entries)
        deleted = 0
        for manifest in entries:
            if total <= most:
                break
            deleted += self.delete(manifest.key)
            total -= manifest.nbytes
        return deleted

    def _leftovers(self) -> Iterator[Path]:
        yield from self.root.glob(f"{_QUARANTINE}/*")
        yield from self.root.glob(f"??/{_files.TEMPORARY}*")
        current = {self._data_path(manifest.key, manifest.sha256) for manifest in self.entries()}
        yield from (path for path in self.root.glob("??/*.bin") if path not in current)

    def _manifest_path(self, key: KernelKey) -> Path:
        digest = digest_of(key)
        return self.root / digest[:2] / f"{digest}.json"

    def _data_path(self, key: KernelKey, sha256: str) -> Path:
        return self.root / key.digest[:2] / f"{key.digest}-{sha256[:16]}.bin"


def _parse(text: bytes, key: KernelKey) -> Manifest:
    manifest = Manifest.from_json(text.decode())
    if manifest.key != key:
        raise ValueError(f"it is the manifest of kernel {manifest.key}")
    return manifest


def _problem(manifest: Manifest, data: bytes | None) -> str | None:
    if data is None:
        return "its data file is missing"
    if len(data) != manifest.nbytes:
        return f"its data has {len(data)} bytes, expected {manifest.nbytes}"
    if hashlib.sha256(data).hexdigest() != manifest.sha256:
        return "its data does not have the SHA-256 that its manifest states"
    return None
