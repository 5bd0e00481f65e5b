"""Qualified names of modules: parts joined by dots, the empty name for the outermost."""

from __future__ import annotations

from collections.abc import Iterator


def join(*parts: str) -> str:
    """A qualified name; empty parts count for nothing."""
    return ".".join(filter(None, parts))


def above(name: str) -> Iterator[str]:
    """The modules that a module is in, innermost first, without the outermost."""
    while name := name.rpartition(".")[0]:
        yield name


def under(name: str, scope: str) -> bool:
    """Whether a module is another one or in it."""
    return not scope or name == scope or name.startswith(f"{scope}.")


def within(name: str, scope: str) -> str:
    """The name that a module which is under ``scope`` has in there."""
    return name.removeprefix(scope).removeprefix(".")


def variable(target: object) -> str | None:
    """The name of the variable for what a graph reads of ``target``; None where torch.fx finds a good one by itself.

    Generated code has a parameter ``self``, which torch.fx would overwrite with the output of a module of that name.
    """
    return "self_1" if target == "self" else None
