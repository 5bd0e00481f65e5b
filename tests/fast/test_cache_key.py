"""KernelKey: equal exactly when all that a kernel depends on is."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_fx.cache import KernelKey, explain_miss
from tests.support.processes import finish, start_script

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
names = st.from_regex(r"[a-z]{1,4}", fullmatch=True)
part_sets = st.dictionaries(names, values, min_size=1, max_size=4)


def strictly(value: Any) -> Any:
    """An independent notion of sameness: Python's equality, but 1, True and 1.0 differ, and so do 0.0 and -0.0."""
    if isinstance(value, dict):
        return ("dict", frozenset((key, strictly(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return ("list", tuple(strictly(item) for item in value))
    return (type(value), repr(value))


def reordered(value: Any) -> Any:
    """The same value with all dictionaries in reverse order and lists as tuples."""
    if isinstance(value, dict):
        return {key: reordered(item) for key, item in reversed(value.items())}
    return tuple(map(reordered, value)) if isinstance(value, list) else value


@given(values, values)
def test_two_keys_are_equal_exactly_when_their_values_are(one: Any, other: Any) -> None:
    assert (KernelKey.of(part=one) == KernelKey.of(part=other)) == (strictly(one) == strictly(other))


@settings(max_examples=50)
@given(part_sets)
def test_order_of_parts_and_dictionaries_does_not_matter(parts: dict[str, Any]) -> None:
    key, same = KernelKey.of(**parts), KernelKey.of(**reordered(parts))
    assert key == same
    assert key.digest == same.digest
    assert hash(key) == hash(same)
    assert key.parts == same.parts


@settings(max_examples=50)
@given(part_sets, st.data())
def test_changing_one_part_changes_the_digest_and_is_named(parts: dict[str, Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(parts)))
    value = data.draw(values.filter(lambda value: strictly(value) != strictly(parts[name])))
    key, changed = KernelKey.of(**parts), KernelKey.of(**{**parts, name: value})
    assert key != changed
    assert explain_miss(key, changed) == [name]


@settings(max_examples=50)
@given(part_sets, names, values)
def test_a_part_that_only_one_key_has_is_named(parts: dict[str, Any], name: str, value: Any) -> None:
    without = {key: item for key, item in parts.items() if key != name} or {"other": 1}
    more = KernelKey.of(**{**without, name: value})
    assert more != KernelKey.of(**without)
    assert explain_miss(KernelKey.of(**without), more) == explain_miss(more, KernelKey.of(**without)) == [name]


ALIKE = [
    *(1, True, 1.0, "1", b"1", [1], {"1": 1}, "True", "1.0", "[1]", 0.0, -0.0, 0, False, None, "None", "null"),
    *([], {}, "", b"", {"float": (1.0).hex()}, {"bytes": "31"}, {"map": []}, [[]], ["a", "b"], ["ab"], ["a,b"]),
    *(float("nan"), float("inf"), -float("inf"), "nan", "inf", 2**64, float(2**64), 1e-320, 1e-321, "\ud800", "?"),
]


def test_values_that_look_alike_differ() -> None:
    digests = {KernelKey.of(part=value).digest: value for value in ALIKE}
    assert len(digests) == len(ALIKE)


def test_no_float_is_rounded() -> None:
    assert KernelKey.of(x=0.1) != KernelKey.of(x=0.1 + 2**-56)
    assert KernelKey.of(x=float("nan")) == KernelKey.of(x=-float("nan"))


def test_values_do_not_move_between_parts() -> None:
    assert KernelKey.of(a="x", b="y") != KernelKey.of(a="y", b="x")
    assert KernelKey.of(a="x") != KernelKey.of(b="x")


def test_the_digest_does_not_depend_on_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A new encoding must change this digest on purpose, together with the encoding's version.
    key = KernelKey.of(graph=["add", 1, 2.5], options={"b": True, "a": None}, source=b"\x00\xff", name="é")
    assert key.digest == "b1a3988560c1e1cefc8df6e725139ce8adbd4d9c92a6e96fb6292dd438f5da70"
    source = """
        from esper_fx.cache.key import KernelKey
        options = {"a": None, "b": True}
        print(KernelKey.of(name="é", source=b"\\x00\\xff", options=options, graph=("add", 1, 2.5)).digest)
    """
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert finish(start_script(tmp_path / "script.py", source)).strip() == key.digest


def test_only_the_digest_compares() -> None:
    key = KernelKey.of(a=1)
    assert KernelKey(key.digest) == key
    assert {key: "kernel"}[KernelKey(key.digest)] == "kernel"
    assert str(key) == key.digest[:12]


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1, 2}, "part options has a value of type set: .* sort it into a list"),
        ([0, {"a": frozenset()}], r"part options\[1\]\['a'\] has a value of type frozenset"),
        (object(), "part options has a value of type object: expected None, bool, int, float, str, bytes"),
        (1j, "type complex"),
        (Colour.RED, "type Colour"),
        (len, "type builtin_function_or_method"),
        ({1: "a"}, "part options: its key 1 is of type int, expected str"),
        (bytearray(b"x"), "type bytearray"),
    ],
)
def test_what_has_no_stable_text_is_refused(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        KernelKey.of(graph="g", options=value)


def test_a_key_needs_parts() -> None:
    with pytest.raises(ValueError, match="kernel key without parts: expected at least one"):
        KernelKey.of()


@pytest.mark.parametrize(
    "digest", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "../" + "a" * 61, "a" * 64 + "\n", None]
)
def test_a_digest_is_64_hexadecimal_digits(digest: Any) -> None:
    with pytest.raises(ValueError, match="expected 64 lower-case hexadecimal digits"):
        KernelKey(digest)
