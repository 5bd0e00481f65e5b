"""What `esper-fx kernels build` knows of GPUs, how it reads what assemblers say, what it reports and what it stores."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import esper_fx
from esper_fx import ArtifactStore, MissingDependencyError, TargetError, cli, prebuilt
from esper_fx.commands import doctor, kernel_build
from esper_fx.kernels import launch
from esper_fx.kernels.build import Built, Job, plan
from esper_fx.kernels.build_cases import BuildCase
from esper_fx.kernels.prebuilt import Binary, pack, unpack
from esper_fx.kernels.resources import Resources, excesses, registers_of_amdgcn, registers_of_ptxas
from esper_fx.kernels.targets import TARGETS, parse_targets

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'backward_weights_kernel' for 'sm_80'
ptxas info    : Function properties for backward_weights_kernel
    440 bytes stack frame, 436 bytes spill stores, 440 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 440 bytes cumulative stack size, 464 bytes cmem[0]
"""
AMDGCN = """\
    .private_segment_fixed_size: 0
    .sgpr_count:     37
    .sgpr_spill_count: 3
    .symbol:         forward_kernel.kd
    .vgpr_count:     81
    .vgpr_spill_count: 5
"""


def test_targets_are_taken_in_order_and_once() -> None:
    assert parse_targets("hip:gfx942, cuda:90,hip:gfx942") == (TARGETS["hip:gfx942"], TARGETS["cuda:90"])
    assert parse_targets(["cuda:100"]) == (TARGETS["cuda:100"],)
    assert [TARGETS[name].name for name in TARGETS] == list(TARGETS)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cuda:90,cuda:75", "target 'cuda:75' is not known: expected one of cuda:80, "),
        ("", "target '' is not known: expected one of "),
        ([], "no target is named: expected some of "),
    ],
)
def test_an_unknown_target_is_refused_with_those_that_are_known(names: str | list[str], message: str) -> None:
    with pytest.raises(TargetError, match="hip:gfx942") as caught:
        parse_targets(names)
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, ValueError)


def test_registers_and_spills_are_read_from_what_assemblers_say() -> None:
    assert registers_of_ptxas(PTXAS) == (255, 440)
    assert registers_of_ptxas(PTXAS.replace("ptxas info", "ptxas-blackwell info")) == (255, 440)
    assert registers_of_amdgcn(AMDGCN) == (81, 4 * (3 + 5))


@pytest.mark.parametrize("text", ["", "ptxas info    : 0 bytes gmem", PTXAS.replace("registers", "things")])
def test_assemblers_that_say_something_else_are_not_believed_to_say_zero(text: str) -> None:
    with pytest.raises(ValueError, match="expected the registers and spills"):
        registers_of_ptxas(text)
    with pytest.raises(ValueError, match=r"expected \.vgpr_count"):
        registers_of_amdgcn(text)
    with pytest.raises(ValueError, match=r"expected \.sgpr_spill_count"):
        registers_of_amdgcn(AMDGCN.replace("sgpr_spill", "other"))


def used(
    registers: int = 64, spilled: int = 0, shared: int = 1024, tensor_memory: int = 0, warps: int = 4
) -> Resources:
    return Resources(registers, spilled, shared, tensor_memory, warps)


@pytest.mark.parametrize(
    ("target", "resources", "found"),
    [
        ("hip:gfx942", used(shared=65_536), []),
        ("hip:gfx942", used(shared=65_537), ["65537 bytes of shared memory, at most 65536"]),
        ("cuda:80", used(shared=163 * 1024), []),
        ("cuda:80", used(shared=200_000), ["200000 bytes of shared memory, at most 166912"]),
        ("cuda:90", used(shared=200_000), []),
        ("cuda:90", used(registers=255, warps=8), []),
        ("cuda:90", used(registers=255, warps=16), ["130560 registers of 16 warps, at most 65536"]),
        ("hip:gfx942", used(registers=512, warps=4), []),
        ("hip:gfx942", used(registers=338, warps=8), ["173056 registers of 8 warps, at most 131072"]),
        ("cuda:100", used(tensor_memory=513), ["513 columns of tensor memory, at most 512"]),
    ],
)
def test_what_a_gpu_does_not_have_is_found(target: str, resources: Resources, found: list[str]) -> None:
    assert excesses(resources, TARGETS[target]) == found


def a_kernel() -> None:
    """Stands for a kernel: only its name and module are looked at."""


def case(label: str, *, default: bool = True, rows: int = 16, **constants: int) -> BuildCase:
    """An example call that launches `a_kernel` once."""

    def call() -> None:
        x = torch.empty((rows, 4), dtype=torch.bfloat16, device="meta")
        config = launch.Config(1, 1, 4, 3)
        launch.launch(SimpleNamespace(fn=a_kernel), (rows,), x, rows, config=config, **constants)

    return BuildCase(torch.bfloat16, label, call, default)


def test_launches_are_recorded_only_while_asked_for() -> None:
    (one,) = case("one", BLOCK=8).launches()
    assert one.grid == (16,)
    assert one.args[1:] == (16,)
    assert one.constants == {"BLOCK": 8, "num_warps": 4, "num_stages": 3}
    with pytest.raises(TypeError):  # launched, and no kernel
        case("one", BLOCK=8).call()


def test_calls_that_make_the_same_launch_share_a_job() -> None:
    cases = [case("one", BLOCK=8), case("two", BLOCK=8, default=False), case("three", BLOCK=8, rows=17)]
    jobs = plan(cases, parse_targets("cuda:90,hip:gfx942"))
    assert [[each.label for each in needed_by] for needed_by in jobs.values()] == 2 * [["one", "two"], ["three"]]
    job = next(iter(jobs))
    assert job.kernel == f"{__name__}:a_kernel"
    assert job.args == (torch.bfloat16, 16)
    assert dict(job.constants) == {"BLOCK": 8, "num_warps": 4, "num_stages": 3}
    assert job.target == TARGETS["cuda:90"]


def binary(source: str, code: bytes = b"code") -> Binary:
    return Binary("a_kernel", source, {"num_warps": 4, "dtypes": ["a", "b"]}, {"shared": 0, "name": "a_kernel"}, code)


def identity(target: str = "cuda:90:32") -> dict[str, str]:
    return {"kernel": f"{__name__}.a_kernel", "source": "s", "target": target, "triton": "3.7.1"}


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What becomes of a job, by the value of its constant BLOCK, instead of compiling it; a good binary unless set."""
    by_block: dict[str, dict[str, Any]] = {}

    def build(jobs: Sequence[Job], processes: int) -> Iterator[Built]:
        for job in reversed(list(jobs)):
            block = str(dict(job.constants)["BLOCK"])
            good = {"identity": identity(), "binary": binary(block, block.encode()), "resources": used()}
            yield Built(job, 0.5, **(good | by_block.get(block, {})))

    monkeypatch.setattr(kernel_build, "build", build)
    monkeypatch.setattr(kernel_build, "require_triton", lambda: None)
    return by_block


def built(store: ArtifactStore, *cases: BuildCase) -> list[kernel_build.Row]:
    return kernel_build.build_kernels("cuda:90", store, cases=cases)


def stored(store: ArtifactStore) -> list[bytes]:
    """Codes of all binaries in the store."""
    data = [store.get(manifest.key) for manifest in store.entries()]
    return sorted(each.code for bundle in data if bundle is not None for each in unpack(bundle))


def test_rows_come_in_the_order_of_the_cases_and_binaries_into_the_store(
    tmp_path: Path, outcomes: dict[str, dict[str, Any]]
) -> None:
    store = ArtifactStore(tmp_path / "store")
    rows = built(store, case("one", BLOCK=1), case("two", BLOCK=2, default=False))
    assert [(row.label, row.default, row.nbytes, row.problems) for row in rows] == [
        ("one", True, 1, ()),
        ("two", False, 1, ()),
    ]
    assert {(row.kernel, row.dtype, row.target) for row in rows} == {
        ("test_kernel_build.a_kernel", "bfloat16", "cuda:90")
    }
    assert stored(store) == [b"1", b"2"]


def test_a_spill_is_bad_in_a_default_configuration_only(tmp_path: Path, outcomes: dict[str, dict[str, Any]]) -> None:
    outcomes["1"] = outcomes["2"] = {"resources": used(spilled=16)}
    store = ArtifactStore(tmp_path / "store")
    chosen, default = built(store, case("one", BLOCK=1, default=False), case("two", BLOCK=2))
    assert (chosen.spilled, chosen.problems) == (16, ())
    assert default.problems == ("spills 16 bytes per thread in a default configuration",)
    assert stored(store) == [b"1", b"2"]  # slow, but it runs
    (shared,) = built(store, case("one", BLOCK=1, default=False), case("three", BLOCK=1))
    assert shared.problems  # the same kernel is a default configuration of another case


def test_what_cannot_run_is_bad_in_any_configuration_and_not_stored(
    tmp_path: Path, outcomes: dict[str, dict[str, Any]]
) -> None:
    outcomes["1"] = {"resources": used(shared=1 << 20)}
    outcomes["2"] = {"problem": "RuntimeError: no", "identity": None, "binary": None, "resources": None}
    store = ArtifactStore(tmp_path / "store")
    large, broken, _ = built(store, *(case(str(number), BLOCK=number, default=False) for number in (1, 2, 3)))
    assert large.problems == ("1048576 bytes of shared memory, at most 232448",)
    assert broken.problems == ("does not compile: RuntimeError: no",)
    assert stored(store) == [b"3"]


def test_the_command_prints_everything_and_fails_with_a_reason(
    tmp_path: Path, outcomes: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_build, "build_cases", lambda: iter([case("one", BLOCK=1), case("two", BLOCK=2)]))
    arguments = ["kernels", "build", "--target", "cuda:90", "--cache-dir", str(tmp_path / "store")]
    good = CliRunner().invoke(cli.app, arguments)
    assert good.exit_code == 0, good.output
    assert "test_kernel_build.a_kernel" in good.output
    assert "one (default)" in good.output
    assert "2 kernels, 0 bad" in good.output
    assert str(tmp_path / "store") in good.output
    outcomes["2"] = {"resources": used(registers=200, spilled=8)}
    bad = CliRunner().invoke(cli.app, arguments)
    assert bad.exit_code == 1
    assert "2 kernels, 1 bad" in bad.output
    assert "cuda:90 test_kernel_build.a_kernel bfloat16 two: spills 8 bytes per thread in a default" in bad.output


def test_the_command_refuses_an_unknown_target_before_it_builds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernel_build, "build", lambda *_: pytest.fail("something was compiled"))
    arguments = ["kernels", "build", "--target", "cuda:90,rocm:1", "--cache-dir", str(tmp_path / "store")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1
    assert "esper-fx kernels build: target 'rocm:1' is not known: expected one of cuda:80" in result.output


def test_a_missing_triton_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingDependencyError, match=r'not installed: pip install "triton>=3\.6"'):
        kernel_build.require_triton()


@pytest.mark.parametrize(
    ("version", "good"), [("3.5.1", False), ("3.6.0", True), ("3.10.0+git1", True), ("2.9", False)]
)
def test_an_old_triton_is_refused(version: str, good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    if good:
        kernel_build.require_triton()
    else:
        with pytest.raises(MissingDependencyError, match=rf"triton {version} is too old, expected 3\.6 or newer"):
            kernel_build.require_triton()


def test_packed_binaries_come_back_and_equal_ones_once() -> None:
    one, two, again = binary("1", b"\x7fELF one"), binary("2", b"two"), binary("1", b"\x7fELF other")
    assert unpack(pack([one, two])) == [one, two]
    assert [each.source for each in unpack(pack([one, two, again]))] == ["1", "2"]


def test_each_part_of_the_identity_gives_an_entry_of_its_own(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    prebuilt.put_binaries(store, identity(), [binary("1")])
    for name in identity():
        prebuilt.put_binaries(store, identity() | {name: "other:1:1"}, [binary("2")])
    assert len(store.entries()) == 1 + len(identity())
    nbytes = prebuilt.put_binaries(store, identity(), [binary("3")])
    assert len(store.entries()) == 1 + len(identity())
    assert nbytes in {manifest.nbytes for manifest in store.entries()}


def test_the_doctor_names_what_is_built_ahead(tmp_path: Path) -> None:
    with esper_fx.configure(cache_dir=tmp_path / "store"):
        store = ArtifactStore(tmp_path / "store")
        for target in ("hip:gfx942:64", "cuda:90:32"):
            prebuilt.put_binaries(store, identity(target), [binary("1")])
        (check,) = doctor.check_cache_folder()
    assert check.found.endswith(", built ahead for cuda:90, hip:gfx942")


def test_a_kernel_is_prepared_once_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        launched = 0

        def create_binder(self) -> None: ...

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*_: Any, **__: Any) -> None:
                self.launched += 1

            return run

    prepared: list[Any] = []
    monkeypatch.setattr(launch, "_preparations", [])
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)
    launch.before_first_launch(prepared.append)
    one, two = Kernel(), Kernel()
    for device in ("cpu", "cpu", "meta", "cpu"):
        launch.launch(one, (1,), torch.empty(2, device=device))
    assert prepared == [one, one]
    launch.launch(two, (1,), 3, torch.empty(2))
    assert prepared == [one, one, two]
    assert (one.launched, two.launched) == (4, 1)


def test_binaries_that_cannot_be_installed_are_only_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    triton = pytest.importorskip("esper_fx.kernels._triton")
    monkeypatch.setattr(triton, "current_target", lambda: "a GPU")
    monkeypatch.setattr(triton, "identity", lambda kernel, target: identity())
    with esper_fx.configure(cache_dir=tmp_path / "store"):
        assert prebuilt.install_binaries(a_kernel) == 0
        assert not (tmp_path / "store").exists()
        store = ArtifactStore(tmp_path / "store")
        assert prebuilt.install_binaries(a_kernel) == 0
        assert caplog.records == []
        store.put(prebuilt._key(identity()), b"no archive", metadata={})
        assert prebuilt.install_binaries(a_kernel) == 0
    assert "prebuilt binaries of a_kernel are not used: BadZipFile" in caplog.text


def test_the_table_has_a_line_for_each_row() -> None:
    row = kernel_build.Row("f.k", "float32", "rank 8", "cuda:90", True, 10, 4, 2048, 999, 1.25, ("bad",))
    console = Console(width=150, file=io.StringIO())
    with console.capture() as printed:
        console.print(kernel_build.table([row, row]))
    lines = [line.split() for line in printed.get().splitlines()]
    assert lines[0] == ["target", "kernel", "dtype", "case", "registers", "spilled", "shared", "binary", "seconds"]
    assert lines[1:] == 2 * [["cuda:90", "f.k", "float32", "rank", "8", "(default)", "10", "4", "2048", "999", "1.2"]]
