"""What the documentation says exists, and its examples run."""

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import json
import re
import shlex
import typing
from pathlib import Path
from typing import Any, Literal

import pytest

import megafp4
from megafp4 import cli, config
from megafp4.models.presets import preset_names

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NEEDS_NETWORK = "from_pretrained"


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page in one language ("" for none)."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [code for found, code in fenced if found == language]


def commands(page: Path) -> list[list[str]]:
    """Return the arguments of every megafp4 command in the page's plain blocks."""
    lines = "".join(blocks(page, "")).splitlines()
    ours = [line for line in lines if line.startswith("megafp4 ")]
    return [shlex.split(line, comments=True)[1:] for line in ours]


COMMANDS = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!\w+:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("name", ["README.md", "docs/recipes.md"])
def test_python_blocks_run_in_order(name: str) -> None:
    namespace: dict[str, Any] = {}
    code = [block for block in blocks(ROOT / name, "python") if NEEDS_NETWORK not in block]
    assert code
    with contextlib.redirect_stdout(io.StringIO()):
        for block in code:
            exec(block, namespace)


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page} {' '.join(words)}" for page, words in COMMANDS]
)
def test_commands_are_understood(page: str, words: list[str]) -> None:
    kinds = {"train": cli.TrainArguments, "compare": cli.CompareArguments}
    assert words[0] in cli.COMMANDS
    if words[0] in kinds:
        given, config = cli._configured(words[0], kinds[words[0]], words[1:])
        assert given.preset in preset_names()
        names = getattr(given, "recipes", config.recipe).split(",")
        assert set(names) <= set(megafp4.recipe_names())


def test_the_readme_lists_every_recipe() -> None:
    section = (ROOT / "README.md").read_text().split("## Recipes")[1].split("###")[0]
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    listed = [name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)]
    assert sorted(listed) == sorted(megafp4.recipe_names())


def test_the_numerics_page_lists_every_format() -> None:
    section = (ROOT / "docs/numerics.md").read_text().split("## Formats")[1].split("\n## ")[0]
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    listed = [name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)]
    assert listed == list(megafp4.formats())


def field_rows(kind: type) -> list[str]:
    """Return the rows of a part's table: each field, its default, its docstring, its choices."""
    (owner,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(owner, ast.ClassDef)
    meanings = {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(owner.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
    hints = typing.get_type_hints(kind)
    rows = []
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING:
            continue  # a part of the run, with a table of its own
        meaning = meanings[field.name].replace("``", "`")
        options = (hints[field.name], *typing.get_args(hints[field.name]))
        literal = next((hint for hint in options if typing.get_origin(hint) is Literal), None)
        if literal is not None:
            meaning += f" One of {', '.join(f'`{name}`' for name in typing.get_args(literal))}."
        rows.append(f"| `{field.name}` | `{json.dumps(field.default)}` | {meaning} |")
    return rows


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("The run", config.RunConfig),
        ("[model]", config.ModelConfig),
        ("[data]", config.DataConfig),
        ("[optim]", config.OptimConfig),
        ("[train]", config.TrainConfig),
        ("[parallel]", config.ParallelConfig),
    ],
)
def test_the_configuration_page_repeats_the_fields(heading: str, kind: type) -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    section = page.split(f"\n### {heading}\n")[1].split("\n#")[0]
    assert [line for line in section.splitlines() if line.startswith("| `")] == field_rows(kind)


def test_the_configuration_page_lists_every_command() -> None:
    section = (ROOT / "docs/configuration.md").read_text().split("## Commands")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `megafp4 (\w+)", section, re.MULTILINE)
    assert list(dict.fromkeys(listed)) == list(cli.COMMANDS)
