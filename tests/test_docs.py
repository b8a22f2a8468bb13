"""The documents say what the code does: tables and console blocks are generated and held to it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moeconv import errors
from moeconv.cli.main import app
from moeconv.layout.shipped import parts, recipes_for, shipped_recipes
from tests.recipes import shared_layouts

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
UPDATE = bool(os.environ.get("MOECONV_UPDATE_DOCS"))


# `pip install .` brings no torch, so the README shows what the demo says without it
WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = None; sys.argv = ['moeconv', *sys.argv[1:]];"
    "from moeconv.cli.main import main; main()"
)


def moeconv(*arguments: str, cwd: Path) -> str:
    """What a command prints on stdout where torch is not installed."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done.stdout


def block(path: Path, name: str, wanted: str) -> str:
    """The text between `<!-- name -->` and `<!-- /name -->`; rewritten first when asked to."""
    text = path.read_text()
    pattern = re.compile(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", re.DOTALL)
    match = pattern.search(text)
    assert match, f"{path.name} lacks the block {name}"
    if UPDATE:
        path.write_text(text[: match.start(1)] + wanted + text[match.end(1) :])
        return wanted
    return match.group(1)


def recipes_table() -> str:
    """The README's table of families, from the recipes."""
    shared = shared_layouts()
    lines = ["| tensors | layouts of its own | model types |", "|---|---|---|"]
    for recipe in shipped_recipes():
        own = [la.name for la in recipe.layouts if not la.read_only and la.name not in shared]
        layouts = ", ".join(f"`{name}`" for name in own)
        lines.append(f"| `{recipe.title}` | {layouts} | {', '.join(recipe.model_types)} |")
    lines += ["", "| component | of | axes of one matrix |", "|---|---|---|"]
    for component, _ in parts(shipped_recipes()):
        if component.of:
            axes = ", ".join(f"`{a}`" if str(a) else "one number" for a in component.possible_axes)
            lines.append(f"| `{component.name}` | {component.of} | {axes} |")
    return "\n".join(lines) + "\n"


def error_classes() -> list[type[errors.MoeconvError]]:
    """All error classes, however deep."""
    found, queue = [], [errors.MoeconvError]
    while queue:
        queue += (subclasses := queue.pop().__subclasses__())
        found += [c for c in subclasses if c.__module__ == errors.__name__]
    return found


def test_readme_recipe_table_is_generated() -> None:
    assert block(README, "recipes", recipes_table()) == recipes_table()


def test_readme_demo_output_is_real(tmp_path: Path) -> None:
    wanted = f"```console\n$ moeconv demo\n{moeconv('demo', cwd=tmp_path)}```\n"
    assert block(README, "demo", wanted) == wanted


def test_readme_names_every_command() -> None:
    commands = {c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands}
    commands |= {g.name for g in app.registered_groups if g.name}
    named = set(re.findall(r"^\| `moeconv ([a-z]+)", README.read_text(), re.MULTILINE))
    assert named == commands


def test_readme_exit_codes_are_those_of_the_errors() -> None:
    table = dict(re.findall(r"^\| ([0-9]+) \| (.+?) \|$", README.read_text(), re.MULTILINE))
    used = {str(c.exit_code) for c in error_classes()}
    assert used <= set(table)
    assert {"0", "1", "130"} <= set(table)


def test_every_error_has_its_own_code_and_a_docstring() -> None:
    codes = [c.code for c in error_classes()]
    assert len(set(codes)) == len(codes)
    assert all(c.__doc__ and not c.__doc__.startswith("MoeconvError(") for c in error_classes())


@pytest.mark.parametrize("path", ["README.md", "moeconv/FORMAT.md", "CHANGELOG.md"])
def test_documents_name_no_place_that_a_reader_lacks(path: str) -> None:
    text = (ROOT / path).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).parent.joinpath(target).exists(), target


def test_each_model_type_and_architecture_finds_the_recipes_that_name_it():
    recipes = shipped_recipes()
    for kind in ("model_types", "architectures"):
        for word in {w for r in recipes for w in getattr(r, kind)}:
            named = [r.name for r in recipes if word in getattr(r, kind)]
            said = {"model_type": word, "architectures": ()}
            if kind == "architectures":
                said = {"model_type": None, "architectures": ("Other", word)}
            assert [r.name for r in recipes_for(**said) if word in getattr(r, kind)] == named
