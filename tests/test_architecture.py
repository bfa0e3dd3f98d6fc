"""The shape of the code, checked: who imports whom, how long things are, who reads the environment.

The table is the one in CONTRIBUTING.md. A new arrow is a design decision: change both.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megafp4"

# Folder or module of the package -> those that it may import besides itself.
TABLE: dict[str, set[str]] = {
    "__init__": {"numerics", "recipes", "linear", "conversion", "precision", "errors"},
    "__main__": {"cli"},
    "errors": set(),
    "config": {"errors"},
    "numerics": {"errors"},
    "recipes": {"numerics", "errors"},
    "backends": {"numerics", "recipes", "errors"},
    "precision": {"numerics", "backends", "errors"},
    "linear_op": {"numerics", "recipes", "backends", "precision", "errors"},
    "linear": {"linear_op", "numerics", "recipes", "backends", "precision", "errors"},
    "conversion": {"numerics", "recipes", "backends", "precision", "linear", "errors"},
    "models": {"linear", "precision", "recipes", "backends", "config", "errors"},
    "parallel": {
        "models",
        "linear",
        "linear_op",
        "precision",
        "backends",
        "recipes",
        "numerics",
        "config",
        "errors",
    },
    "optim": {"parallel", "numerics", "config", "errors"},
    "data": {"config", "errors"},
    "checkpoint": {"errors"},
    "report": {"errors"},
    "settings": {"config", "models", "errors"},
    "launch": {"parallel", "errors"},
}
EVERYTHING = {"train", "cli"}
READS_ENVIRONMENT = {"cli.py", "launch.py", "train/compare.py"}
OPTIONAL = {
    "datasets", "deepspeed", "matplotlib", "megafp4_kernels", "mpi4py", "pyarrow",
    "sentencepiece", "tiktoken", "tokenizers", "transformer_engine", "transformers", "triton",
}  # fmt: skip
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
# path -> reason; empty is how it should stay.
EXCEPTIONS: dict[str, str] = {}


def component(path: Path) -> str:
    """Name the component that a file of the package belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of each import at any depth; ``package`` resolves relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            # `from megafp4 import numerics` imports a component; `from x import f` imports x.
            for alias in node.names:
                yield node.lineno, f"{prefix}.{alias.name}" if prefix == "megafp4" else prefix


def illegal_imports(source: str, path: Path) -> list[str]:
    """List the imports in ``source`` that the table does not allow for the file at ``path``."""
    importer = component(path)
    if importer in EVERYTHING:
        return []
    allowed = TABLE[importer] | {importer, "__version__"}
    package = ["megafp4", *path.relative_to(PACKAGE).parent.parts]
    found = []
    for line, name in imported_modules(ast.parse(source), package):
        parts = name.split(".")
        if parts[0] == "megafp4" and (len(parts) == 1 or parts[1] not in allowed):
            found.append(f"{path.relative_to(ROOT)}:{line}: {importer} may not import {name}")
    return found


def eager_optional_imports(source: str) -> list[str]:
    """List optional packages that ``source`` imports when it is itself imported."""
    found = []
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in OPTIONAL]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OPTIONAL:
            found.append(node.module or "")
        pending.extend(ast.iter_child_nodes(node))
    return found


def environment_reads(source: str) -> list[int]:
    """List the lines on which ``source`` touches the process environment."""
    names = {"environ", "getenv", "putenv"}
    return sorted(
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and names & {a.name for a in node.names})
    )


def long_functions(source: str) -> list[tuple[str, int]]:
    """List (name, lines) of the functions in ``source`` that exceed the limit."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        (node.name, length)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, kinds)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


FILES = sorted(PACKAGE.rglob("*.py"))
OWN_CODE = sorted(
    path
    for folder in ("megafp4", "kernels", "tools", "examples", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_component_is_in_the_table() -> None:
    assert {component(path) for path in FILES} <= TABLE.keys() | EVERYTHING


def test_imports_follow_the_table() -> None:
    assert [e for path in FILES for e in illegal_imports(path.read_text(), path)] == []


def test_optional_packages_are_imported_where_they_are_used() -> None:
    found = {name(path): eager_optional_imports(path.read_text()) for path in FILES}
    assert {path: names for path, names in found.items() if names} == {}


def test_only_launch_code_reads_the_environment() -> None:
    found = {
        name(path): lines
        for path in FILES
        if path.relative_to(PACKAGE).as_posix() not in READS_ENVIRONMENT
        and (lines := environment_reads(path.read_text()))
    }
    assert found == {}


def test_files_and_functions_stay_short() -> None:
    found = []
    for path in OWN_CODE:
        source = path.read_text()
        if (count := len(source.splitlines())) > MAX_FILE_LINES:
            found.append(f"{name(path)}: {count} lines")
        found += [f"{name(path)}:{func}: {count} lines" for func, count in long_functions(source)]
    assert [line for line in found if line.split(":")[0] not in EXCEPTIONS] == []


def test_every_folder_of_the_package_is_installed() -> None:
    folders = {path.parent for path in FILES}
    assert [name(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_contributing_shows_the_same_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.split("## Who may import whom")[1].split("\n## ")[0]
    rows = dict(
        (cell.strip().strip("`") for cell in line.strip("|").split("|")[:2])
        for line in section.splitlines()
        if line.startswith("| `")
    )
    for importer in TABLE.keys() - {"__init__", "__main__"}:
        shown = {word.strip(" `") for word in rows[importer].split(",")} - {"nothing", ""}
        assert shown == TABLE[importer], f"CONTRIBUTING.md, row `{importer}`"


@pytest.mark.parametrize(
    ("source", "errors"),
    [
        ("import megafp4.models.gpt", 1),
        ("from megafp4.train import loop", 1),
        ("from megafp4 import models", 1),
        ("from megafp4 import quantize", 1),
        ("import megafp4", 1),
        ("from ..models import gpt", 1),
        ("def f():\n    from megafp4.linear import Linear", 1),
        ("from . import formats", 0),
        ("from .formats import E2M1", 0),
        ("from megafp4.errors import ConfigError", 0),
        ("from megafp4.numerics.formats import E2M1", 0),
        ("import torch", 0),
    ],
)
def test_the_import_check_sees(source: str, errors: int) -> None:
    assert len(illegal_imports(source, PACKAGE / "numerics" / "quantize.py")) == errors


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import triton", ["triton"]),
        ("try:\n    from transformers import GPT2Config\nexcept ImportError:\n    pass",
         ["transformers"]),
        ("class A:\n    import matplotlib.pyplot as plt", ["matplotlib.pyplot"]),
        ("def f():\n    import triton", []),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton", []),
    ],
)  # fmt: skip
def test_the_optional_import_check_sees(source: str, found: list[str]) -> None:
    assert eager_optional_imports(source) == found


def test_the_other_checks_see() -> None:
    assert environment_reads("import os\nx = os.environ.get('A')\ny = os.getenv('B')") == [2, 3]
    assert environment_reads("from os import environ") == [1]
    assert long_functions("def f():\n" + "    pass\n" * MAX_FUNCTION_LINES) == [
        ("f", MAX_FUNCTION_LINES + 1)
    ]
    assert long_functions("def f():\n" + "    pass\n" * (MAX_FUNCTION_LINES - 1)) == []
