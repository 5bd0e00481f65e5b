"""Folders and files of the artifact store: private to their owner, whole or absent."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import time
from pathlib import Path

from esper_fx.errors import StoreError

# How the name of a file begins that is still being written.
TEMPORARY = ".tmp-"


def make_private_folders(folder: Path) -> None:
    """Creates a folder and its missing parents for the owner alone (mkdir's own mode is for the last one only)."""
    try:
        for each in [*reversed(folder.parents), folder]:
            if not each.exists():
                each.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StoreError(f"artifact store {folder} cannot be created: {error}; give another folder") from error


def check_folder(root: Path) -> None:
    """Raises StoreError unless the folder is there, is the user's, and can be written to or replaced by nobody else."""
    if not root.exists():
        raise StoreError(f"artifact store {root} does not exist: create it, or pass create=True")
    if not root.is_dir():
        raise StoreError(f"artifact store {root} is not a folder: give the path of a folder")
    status = root.stat()
    if os.name == "posix":
        if status.st_uid != os.geteuid():
            raise StoreError(
                f"artifact store {root} belongs to user {status.st_uid}, expected {os.geteuid()}: loading an artifact "
                "executes code; give a folder of your own"
            )
        if status.st_mode & 0o022:
            raise StoreError(
                f"artifact store {root} is writable by others (mode {status.st_mode & 0o777:o}): loading an artifact "
                f"executes code; run `chmod go-w {root}` if you trust its content, or give another folder"
            )
        for parent in dict.fromkeys([*root.absolute().parents, *root.resolve().parents]):  # also where links lie
            _check_parent(parent, root)
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        raise StoreError(f"artifact store {root} is not writable: change its mode, or give another folder")


def _check_parent(parent: Path, root: Path) -> None:
    """Raises StoreError if others could put another folder in the place of what lies in this one, as OpenSSH does."""
    status = parent.stat()
    why = f"who can write to it can replace what lies in it, and loading an artifact of {root} executes code"
    if status.st_uid not in (0, os.geteuid()):
        raise StoreError(
            f"{parent}, above the artifact store, belongs to user {status.st_uid}, expected 0 or {os.geteuid()}: {why}; "
            "give a folder of your own"
        )
    others = 0o002 if _is_own_group(status.st_gid) else 0o022
    if status.st_mode & others and not status.st_mode & stat.S_ISVTX:
        raise StoreError(
            f"{parent}, above the artifact store, is writable by others (mode {status.st_mode & 0o7777:o}), expected no "
            f"write permission for group and others, or the sticky bit: {why}; run `chmod go-w {parent}` if you trust its "
            "content, or give another folder"
        )


def _is_own_group(group: int) -> bool:
    """Whether a group is one that systems make for each user, named alike and without other members."""
    import grp
    import pwd

    try:
        user, entry = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_name == user and set(entry.gr_mem) <= {user}


def read(path: Path) -> bytes | None:
    """Reads a file, or returns None where that fails."""
    try:
        return path.read_bytes()
    except OSError:  # missing, or unreadable: either way there is nothing to be had
        return None


def write(path: Path, data: bytes) -> None:
    """Writes a file so that it appears whole or not at all, readable by its owner only."""
    descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def size(path: Path) -> int:
    """Bytes of a file; 0 if it has just gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def modified(path: Path) -> float:
    """When a file was last changed, seconds since the epoch; now, if it has just gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()
