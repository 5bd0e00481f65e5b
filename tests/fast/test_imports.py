"""Who may import what (DESIGN, section 3), read from the syntax trees of the package's files."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "esper_fx"

# Nothing imports these but the command line, and the package's front door where a name is public.
LEAVES = (
    "esper_fx.adapters",
    "esper_fx.cli",
    "esper_fx.commands",
    "esper_fx.demo",
    "esper_fx.inspect",
)
FRONT_DOOR = "esper_fx"
PRIVATE_TORCH_HOME = "esper_fx._torch"

ALLOWED = {
    "esper_fx.passes": (
        "torch",
        "networkx",
        "esper_fx.passes",
        "esper_fx.ops",
        "esper_fx.checks",
        "esper_fx.errors",
        "esper_fx.site",
        PRIVATE_TORCH_HOME,
    ),
    "esper_fx.cache": (
        "platformdirs",
        "cachetools",
        "filelock",
        "esper_fx.cache",
        "esper_fx.checks",
        "esper_fx.errors",
    ),
    "esper_fx.kernels": ("torch", "triton", "esper_fx.kernels", "esper_fx.errors"),
    "esper_fx.blueprints": (
        "torch",
        "esper_fx.blueprints",
        "esper_fx.checks",
        "esper_fx.errors",
        "esper_fx.site",
        "esper_fx.ops",
        PRIVATE_TORCH_HOME,
    ),
    "esper_fx.lifecycle": ("esper_fx.checks", "esper_fx.errors"),
    "esper_fx.checks": ("esper_fx.errors",),
    "esper_fx.errors": (),
}


def sources() -> dict[str, Path]:
    """Module name -> file, for every file of the package."""
    files = {path: path.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    files |= {path: Path("esper_fx") / path.relative_to(ROOT) for path in (ROOT / "passes").rglob("*.py")}
    return {".".join(name.with_suffix("").parts).removesuffix(".__init__"): path for path, name in files.items()}


SOURCES = sources()


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported: `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value


def under(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def foreign_imports(tree: ast.AST, allowed: tuple[str, ...]) -> list[str]:
    """Imports that are neither of the standard library nor under one of the allowed names."""
    return [
        f"line {line}: {name}"
        for line, name in imports(tree)
        if name.split(".")[0] not in sys.stdlib_module_names and not any(under(name, parent) for parent in allowed)
    ]


def private_torch(tree: ast.AST) -> list[str]:
    """Uses of names under torch that begin with one underscore, through imports, aliases and attributes."""
    aliases = {"torch": "torch"}
    found = []
    for line, name in imports(tree):
        if under(name, "torch") and has_private_part(name):
            found.append(f"line {line}: {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            root, _, rest = owner.partition(".")
            name = ".".join(filter(None, [aliases.get(root, root), rest, node.attr]))
            if under(name, "torch"):
                found.append(f"line {node.lineno}: {name}")
    return found


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def has_private_part(name: str) -> bool:
    return any(is_private(part) for part in name.split("."))


def parse(module: str) -> ast.AST:
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_stay_within_what_the_folder_may_import(module: str) -> None:
    for folder, allowed in ALLOWED.items():
        if under(module, folder):
            assert foreign_imports(parse(module), allowed) == []


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_leaves_are_imported_by_leaves_only(module: str) -> None:
    if module == FRONT_DOOR or any(under(module, leaf) for leaf in LEAVES):
        return
    assert [name for _, name in imports(parse(module)) if any(under(name, leaf) for leaf in LEAVES)] == []


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_private_torch_is_touched_in_one_module(module: str) -> None:
    if not under(module, PRIVATE_TORCH_HOME):
        assert private_torch(parse(module)) == []


def test_the_front_door_only_re_exports() -> None:
    tree = parse(FRONT_DOOR)
    assert isinstance(tree, ast.Module)
    docstring, *rest = tree.body
    assert isinstance(docstring, ast.Expr)
    assert {type(node) for node in rest} <= {ast.Import, ast.ImportFrom, ast.Assign}


def test_every_file_of_the_package_was_looked_at() -> None:
    assert {"esper_fx", "esper_fx.morph", "esper_fx.passes.check", "esper_fx.cache.store", "esper_fx.cli"} <= set(
        SOURCES
    )


# The checks themselves must be able to fail.


def test_a_foreign_import_is_found_wherever_it_stands() -> None:
    tree = ast.parse("import os\ndef f():\n    from esper_fx.engine import backend\n")
    assert foreign_imports(tree, ALLOWED["esper_fx.passes"]) == ["line 3: esper_fx.engine.backend"]


def test_an_allowed_name_does_not_allow_its_namesakes() -> None:
    assert foreign_imports(ast.parse("import torchvision"), ("torch",)) == ["line 1: torchvision"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch._dynamo", ["line 1: torch._dynamo"]),
        ("from torch import _C", ["line 1: torch._C"]),
        ("from torch._guards import Source", ["line 1: torch._guards.Source"]),
        ("import torch\ntorch.nn.modules.conv._ConvNd", ["line 2: torch.nn.modules.conv._ConvNd"]),
        ("from torch import nn\nnn.modules.conv._ConvNd", ["line 2: torch.nn.modules.conv._ConvNd"]),
        ("import torch.nn.functional as F\nF._verify(x)", ["line 2: torch.nn.functional._verify"]),
        ("import importlib\nimportlib.import_module('torch._inductor')", ["line 2: torch._inductor"]),
        ("import torch\ntorch.__version__\nself._x\nmodule._parameters", []),
    ],
)
def test_private_torch_is_found_however_it_is_reached(source: str, found: list[str]) -> None:
    assert private_torch(ast.parse(source)) == found
