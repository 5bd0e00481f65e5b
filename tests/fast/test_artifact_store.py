"""ArtifactStore: what comes out is what went in, or nothing; and only its owner may put something in."""

from __future__ import annotations

import grp
import logging
import os
import pwd
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_fx.cache import ArtifactStore, KernelKey, _files
from esper_fx.cache.manifest import Manifest
from esper_fx.errors import EsperError, StoreError
from tests.support.processes import finish, start_script

LogCapture = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch

KEY = KernelKey.of(graph="add", dtype="float32")
OTHER = KernelKey.of(graph="mul", dtype="float32")
DATA = bytes(range(256)) * 4

# Every example starts by writing what it reads: nothing is left over from the one before.
reuses_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "kernels")


def files(store: ArtifactStore, key: KernelKey = KEY) -> tuple[Path, Path]:
    """The manifest's and the data's path of an entry."""
    (manifest,) = store.root.glob(f"??/{key.digest}.json")
    (data,) = store.root.glob(f"??/{key.digest}-*.bin")
    return manifest, data


def quarantined(store: ArtifactStore) -> list[str]:
    return sorted(path.name for path in store.root.glob("quarantine/*"))


class TestEntries:
    @reuses_folder
    @given(data=st.binary(max_size=300), metadata=st.dictionaries(st.text(), st.text() | st.integers() | st.floats()))
    def test_what_was_put_comes_back(self, store: ArtifactStore, data: bytes, metadata: dict[str, Any]) -> None:
        store.put(KEY, data, metadata=metadata)
        again = ArtifactStore(store.root, create=False)
        assert again.get(KEY) == data
        manifest = again.manifest(KEY)
        assert manifest is not None
        assert (manifest.key, manifest.nbytes, repr(manifest.metadata)) == (KEY, len(data), repr(metadata))
        assert manifest.key.parts == KEY.parts

    def test_a_key_that_was_never_put_has_nothing(self, store: ArtifactStore) -> None:
        store.put(OTHER, DATA, metadata={})
        assert store.get(KEY) is None
        assert store.manifest(KEY) is None
        assert not store.contains(KEY)
        assert store.contains(OTHER)
        assert not store.delete(KEY)

    def test_the_last_put_wins(self, store: ArtifactStore) -> None:
        store.put(KEY, b"first", metadata={"try": 1})
        store.put(KEY, b"second", metadata={"try": 2})
        assert store.get(KEY) == b"second"
        assert [manifest.metadata for manifest in store.entries()] == [{"try": 2}]

    def test_delete_removes_every_file_of_the_key(self, store: ArtifactStore) -> None:
        store.put(KEY, b"first", metadata={})
        store.put(KEY, b"second", metadata={})
        store.put(OTHER, DATA, metadata={})
        assert store.delete(KEY)
        assert store.get(KEY) is None
        assert not list(store.root.glob(f"??/{KEY.digest}*"))
        assert store.get(OTHER) == DATA

    def test_metadata_of_another_type_is_refused_before_anything_is_written(self, store: ArtifactStore) -> None:
        with pytest.raises(TypeError, match=r"metadata 'shape'=\(1, 2\): expected a str name and a str, int or float"):
            store.put(KEY, DATA, metadata={"shape": (1, 2)})  # type: ignore[dict-item]
        assert not list(store.root.iterdir())

    def test_a_folder_that_was_deleted_is_made_again(self, store: ArtifactStore) -> None:
        store.root.rmdir()
        assert store.get(KEY) is None
        store.put(KEY, DATA, metadata={})
        assert store.get(KEY) == DATA

    def test_a_failed_write_leaves_the_old_entry_and_no_litter(self, store: ArtifactStore, monkeypatch: Patch) -> None:
        store.put(KEY, b"old", metadata={})
        before = sorted(store.root.rglob("*"))
        monkeypatch.setattr(os, "replace", _no_space)
        with pytest.raises(
            StoreError, match=r"could not be stored in .*: .*No space left on device; free or repair it"
        ):
            store.put(KEY, b"new", metadata={})
        assert sorted(store.root.rglob("*")) == before
        assert store.get(KEY) == b"old"


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


class TestTrim:
    def used_at(self, store: ArtifactStore, times: dict[str, float]) -> dict[str, KernelKey]:
        """Stores one 100-byte entry a name, last used at the given second."""
        keys = {name: KernelKey.of(name=name) for name in times}
        for name, key in keys.items():
            store.put(key, name.encode() * 100, metadata={"name": name})
            os.utime(files(store, key)[0], (times[name], times[name]))
        return keys

    @reuses_folder
    @given(order=st.permutations("abcdef"), limit=st.integers(0, 700))
    def test_the_oldest_go_until_the_rest_fits(self, store: ArtifactStore, order: list[str], limit: int) -> None:
        self.used_at(store, {name: 1000.0 + age for age, name in enumerate(order)})
        assert [manifest.metadata["name"] for manifest in store.entries()] == order
        deleted = store.trim(limit)
        kept = [manifest.metadata["name"] for manifest in store.entries()]
        assert kept == order[deleted:]
        assert store.size_bytes() == 100 * len(kept) <= limit
        assert deleted == 0 or 100 * (len(kept) + 1) > limit

    def test_getting_an_entry_makes_it_the_youngest(self, store: ArtifactStore) -> None:
        keys = self.used_at(store, {"a": 1000.0, "b": 2000.0})
        assert store.get(keys["a"]) == b"a" * 100
        store.trim(100)
        assert [manifest.key for manifest in store.entries()] == [keys["a"]]

    def test_leftovers_go_after_a_day(self, store: ArtifactStore) -> None:
        store.put(KEY, DATA, metadata={})
        folder = files(store)[0].parent
        (store.root / "quarantine").mkdir()
        names = [folder / ".tmp-x", folder / f"{KEY.digest}-{'0' * 16}.bin", store.root / "quarantine" / "bad.bin"]
        for path in names:
            path.write_bytes(b"left over")
        store.trim(1 << 20)
        assert all(path.exists() for path in names)  # they may belong to a writer at work
        for path in [path for path in store.root.rglob("*") if path.is_file()]:
            os.utime(path, (1000.0, 1000.0))
        store.trim(1 << 20)
        assert not any(path.exists() for path in names)
        assert store.get(KEY) == DATA


class TestDamage:
    """A damaged entry is never returned: it moves to quarantine, with one warning, and can be put anew."""

    def check_gone(self, store: ArtifactStore, caplog: LogCapture, reason: str) -> None:
        caplog.clear()
        assert store.get(KEY) is None
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert f"kernel {KEY} in {store.root} is bad and was moved to quarantine/: {reason}" in record.getMessage()
        assert not store.contains(KEY)
        assert not list(store.root.glob(f"??/{KEY.digest}*"))
        assert quarantined(store)
        assert store.get(KEY) is None
        assert len(caplog.records) == 1
        store.put(KEY, DATA, metadata={})
        assert store.get(KEY) == DATA

    @reuses_folder
    @given(length=st.integers(0, len(DATA) - 1))
    def test_truncated_data(self, store: ArtifactStore, caplog: LogCapture, length: int) -> None:
        store.put(KEY, DATA, metadata={})
        os.truncate(files(store)[1], length)
        self.check_gone(store, caplog, f"its data has {length} bytes, expected {len(DATA)}")

    @reuses_folder
    @given(bit=st.integers(0, len(DATA) * 8 - 1))
    def test_a_flipped_bit(self, store: ArtifactStore, caplog: LogCapture, bit: int) -> None:
        store.put(KEY, DATA, metadata={})
        flip(files(store)[1], bit)
        self.check_gone(store, caplog, "its data does not have the SHA-256 that its manifest states")

    @reuses_folder
    @given(position=st.floats(0, 1, exclude_max=True))
    def test_a_truncated_manifest(self, store: ArtifactStore, caplog: LogCapture, position: float) -> None:
        store.put(KEY, DATA, metadata={})
        manifest = files(store)[0]
        os.truncate(manifest, int(position * manifest.stat().st_size))
        self.check_gone(store, caplog, "its manifest cannot be read")

    @reuses_folder
    @given(position=st.floats(0, 1, exclude_max=True))
    def test_a_flipped_bit_in_the_manifest_never_changes_the_bytes(self, store: ArtifactStore, position: float) -> None:
        store.put(KEY, DATA, metadata={})
        manifest = files(store)[0]
        flip(manifest, int(position * manifest.stat().st_size * 8))
        assert store.get(KEY) in (None, DATA)
        store.entries()
        store.trim(1 << 20)
        store.put(KEY, DATA, metadata={})
        assert store.get(KEY) == DATA

    @pytest.mark.parametrize("text", ["", "[]", "null", "{}", "\xff", '{"format": 1}', "[" * 100_000, "Infinity"])
    def test_a_file_that_is_no_manifest(self, store: ArtifactStore, caplog: LogCapture, text: str) -> None:
        store.put(KEY, DATA, metadata={})
        files(store)[0].write_text(text, encoding="latin-1")
        assert store.entries() == []
        assert store.manifest(KEY) is None
        self.check_gone(store, caplog, "its manifest cannot be read")

    @pytest.mark.parametrize(
        ("field", "value"), [("format", 2), ("sha256", "../../etc/passwd"), ("nbytes", float("inf")), ("parts", None)]
    )
    def test_a_manifest_with_a_wrong_field(
        self, store: ArtifactStore, caplog: LogCapture, field: str, value: Any
    ) -> None:
        import json

        store.put(KEY, DATA, metadata={})
        manifest = files(store)[0]
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), field: value}))
        self.check_gone(store, caplog, "its manifest cannot be read")

    def test_missing_data(self, store: ArtifactStore, caplog: LogCapture) -> None:
        store.put(KEY, DATA, metadata={})
        files(store)[1].unlink()
        assert not store.contains(KEY)
        self.check_gone(store, caplog, "its data file is missing")

    def test_a_missing_manifest_is_a_plain_miss(self, store: ArtifactStore, caplog: LogCapture) -> None:
        store.put(KEY, DATA, metadata={})
        files(store)[0].unlink()  # as if a writer had been killed between the two renames
        assert store.get(KEY) is None
        assert not caplog.records
        store.put(KEY, DATA, metadata={})
        assert store.get(KEY) == DATA

    def test_the_manifest_of_another_kernel(self, store: ArtifactStore, caplog: LogCapture) -> None:
        store.put(KEY, DATA, metadata={})
        store.put(OTHER, b"the other's", metadata={})
        files(store)[0].write_bytes(files(store, OTHER)[0].read_bytes())
        self.check_gone(
            store, caplog, f"its manifest cannot be read (ValueError: it is the manifest of kernel {OTHER})"
        )
        assert store.get(OTHER) == b"the other's"

    def test_an_entry_that_a_writer_replaces_meanwhile_is_read_again(
        self, store: ArtifactStore, caplog: LogCapture, monkeypatch: Patch
    ) -> None:
        store.put(KEY, b"bad", metadata={})
        files(store)[1].write_bytes(b"BAD")
        from_json = Manifest.from_json

        def slow_from_json(text: str) -> Manifest:
            monkeypatch.undo()
            store.put(KEY, DATA, metadata={})
            return from_json(text)

        monkeypatch.setattr(Manifest, "from_json", slow_from_json)
        assert store.get(KEY) == DATA
        assert not caplog.records


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_processes_share_a_store(tmp_path: Path) -> None:
    """Writers of different artifacts under the same keys: readers see one of them whole, and nothing is bad."""
    source = """
        import sys
        from pathlib import Path
        from esper_fx.cache.key import KernelKey
        from esper_fx.cache.store import ArtifactStore

        store = ArtifactStore(Path(sys.argv[1]))
        me = sys.argv[2].encode()
        keys = [KernelKey.of(number=number) for number in range(3)]
        for round in range(60):
            key = keys[round % 3]
            store.put(key, me * (10_000 + round), metadata={"writer": sys.argv[2]})
            data = store.get(key)
            assert data is not None and len(set(data)) == 1 and len(data) >= 10_000, data
            if round % 20 == 19:
                store.trim(1 << 30)
    """
    writers = [start_script(tmp_path / f"{name}.py", source, tmp_path / "kernels", name) for name in "abcd"]
    for writer in writers:
        finish(writer)
    store = ArtifactStore(tmp_path / "kernels")
    assert len(store.entries()) == 3
    assert quarantined(store) == []
    for manifest in store.entries():
        data = store.get(manifest.key)
        assert data is not None
        assert data[:1].decode() == manifest.metadata["writer"]
    assert not list(store.root.rglob(".tmp-*"))


class TestFolder:
    def test_it_is_created_for_its_owner_alone_whatever_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            store = ArtifactStore(tmp_path / "new" / "kernels")
            store.put(KEY, DATA, metadata={})
        finally:
            os.umask(before)
        for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]:
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path

    def test_the_default_is_in_the_users_cache_folder(self, tmp_path: Path, monkeypatch: Patch) -> None:
        monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
        store = ArtifactStore()
        assert store.root == tmp_path / "esper_fx" / "kernels"
        assert stat.S_IMODE(store.root.stat().st_mode) == 0o700

    def test_a_missing_folder_is_refused_unless_it_shall_be_made(self, tmp_path: Path) -> None:
        self.check_refused(tmp_path / "no", "does not exist: create it, or pass create=True", create=False)

    def test_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        self.check_refused(tmp_path / "file", "is not a folder: give the path of a folder")
        self.check_refused(tmp_path / "file" / "below", "cannot be created: .*; give another folder")

    @pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o770])
    def test_a_folder_that_others_can_write_to_is_refused(self, tmp_path: Path, mode: int) -> None:
        folder = tmp_path / "shared"
        folder.mkdir()
        folder.chmod(mode)
        message = (
            rf"is writable by others \(mode {mode:o}\): loading an artifact executes code; run `chmod go-w {folder}`"
        )
        self.check_refused(folder, message)
        folder.chmod(0o755)  # others may look
        ArtifactStore(folder)

    def test_a_folder_of_another_user_is_refused(self, tmp_path: Path, monkeypatch: Patch) -> None:
        owner = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
        message = f"belongs to user {owner}, expected {owner + 1}: loading an artifact executes code; give a folder of "
        self.check_refused(tmp_path, message + "your own")

    @pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o775])
    def test_a_folder_below_one_that_others_can_write_to_is_refused(
        self, tmp_path: Path, mode: int, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(_files, "_is_own_group", lambda group: False)
        shared = tmp_path / "shared"
        ArtifactStore(shared / "mine" / "kernels")
        shared.chmod(mode)
        message = (
            rf"{shared}, above the artifact store, is writable by others \(mode {mode:o}\), expected no write permission "
            rf"for group and others, or the sticky bit: .*{shared}/mine/kernels executes code; run `chmod go-w {shared}`"
        )
        with pytest.raises(StoreError, match=message):
            ArtifactStore(shared / "mine" / "kernels")
        shared.chmod(mode | stat.S_ISVTX)  # as /tmp: what lies in it can be replaced by its owner only
        ArtifactStore(shared / "mine" / "kernels")
        shared.chmod(0o755)
        ArtifactStore(shared / "mine" / "kernels")

    @pytest.mark.parametrize(("name", "members"), [("me", ["me"]), ("me", ["me", "other"]), ("users", [])])
    def test_the_group_of_the_user_alone_is_not_others(
        self, tmp_path: Path, name: str, members: list[str], monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(pwd, "getpwuid", lambda user: SimpleNamespace(pw_name="me"))
        monkeypatch.setattr(grp, "getgrgid", lambda group: SimpleNamespace(gr_name=name, gr_mem=members))
        folder = tmp_path / "umask 002"
        ArtifactStore(folder / "kernels")
        folder.chmod(0o775)
        if (name, members) == ("me", ["me"]):
            ArtifactStore(folder / "kernels")
            folder.chmod(0o777)
        with pytest.raises(StoreError, match="is writable by others"):
            ArtifactStore(folder / "kernels")

    @pytest.mark.parametrize("place", ["of the link", "of its target"])
    def test_both_ends_of_a_link_are_looked_at(self, tmp_path: Path, place: str) -> None:
        (tmp_path / "of the link").mkdir(mode=0o700)
        (tmp_path / "of its target" / "target").mkdir(mode=0o700, parents=True)
        (tmp_path / "of the link" / "link").symlink_to(tmp_path / "of its target" / "target")
        store = tmp_path / "of the link" / "link" / "kernels"
        ArtifactStore(store)
        (tmp_path / place).chmod(0o777)
        with pytest.raises(StoreError, match=f"{place}, above the artifact store, is writable by others"):
            ArtifactStore(store)

    def test_a_folder_below_one_of_another_user_is_refused(self, tmp_path: Path, monkeypatch: Patch) -> None:
        other, stat_as_it_is = tmp_path / "other", Path.stat
        ArtifactStore(other / "kernels")

        def stat_of_another(path: Path, **options: Any) -> os.stat_result:
            status = stat_as_it_is(path, **options)
            return os.stat_result([*status[:4], 4711, *status[5:]]) if path == other else status

        monkeypatch.setattr(Path, "stat", stat_of_another)
        message = f"{other}, above the artifact store, belongs to user 4711, expected 0 or {os.geteuid()}: "
        with pytest.raises(StoreError, match=f"{message}.*; give a folder of your own"):
            ArtifactStore(other / "kernels")

    def test_a_folder_that_cannot_be_written_to_is_refused(self, tmp_path: Path, monkeypatch: Patch) -> None:
        # Root may write anywhere, so that a real mode would not do.
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
        self.check_refused(tmp_path, "is not writable: change its mode, or give another folder")

    def check_refused(self, folder: Path, message: str, *, create: bool = True) -> None:
        with pytest.raises(StoreError, match=f"artifact store {folder} {message}") as caught:
            ArtifactStore(folder, create=create)
        assert isinstance(caught.value, EsperError)
        assert isinstance(caught.value, OSError)
