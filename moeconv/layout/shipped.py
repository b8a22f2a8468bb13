"""The recipes that ship with moeconv, and the choice of those that fit a checkpoint."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from moeconv.errors import BadManifest, BadRecipe, quoted
from moeconv.layout.recipe import GATE, PARAMETER, Component, Recipe
from moeconv.layout.recipe_toml import MAX_RECIPE_BYTES, parse_recipe
from moeconv.manifest.model import ROOT_NAME, Root

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


_TABLES = re.compile(r"\n\n(?=(?:#[^\n]*\n)*\[)")
_HEADER = re.compile(r"^\[([^\]]+)\]", re.MULTILINE)
_SUFFIX = re.compile(r'^suffix = "([^"]*)"', re.MULTILINE)
_TEMPLATE = re.compile(r'"(\S+): ')


@cache
def _folder() -> Traversable:
    package = Path(__file__).parents[1]
    # an editable install runs from the repository, where recipes/ is beside the package
    for place in (package / "recipes", package.resolve().parent / "recipes"):
        if place.is_dir():
            return place
    from importlib.resources import files  # the package is in an archive; slow to import

    return files("moeconv") / "recipes"


@cache
def _texts() -> dict[str, str]:
    """The text of each shipped recipe by file name, in the order of names."""
    found = {f.name: f for f in _folder().iterdir() if f.name.endswith(".toml")}
    return {name: file.read_text("utf-8") for name, file in sorted(found.items())}


@cache
def _shared(name: str) -> str:
    return (_folder() / "shared" / f"{name}.toml").read_text("utf-8")


@cache
def _shipped(file: str) -> Recipe:
    return _completed(_texts()[file], where=file)


def _completed(text: str, *, where: str) -> Recipe:
    """Parse `text` with the shared layouts and components that it lacks.

    They are added as text, so that a recipe is whole wherever it goes: `moeconv recipes show`, and
    every manifest.
    """
    own = tomllib.loads(text)
    has = {(name, part.get("suffix")) for name, part in own.get("components", {}).items()}
    taken = {word for words in has for word in words}
    headers = set(_HEADER.findall(text))
    parts = [text.rstrip("\n")]
    for key, block in _tables(_shared("components")):
        kind, _, name = key.partition(".")
        suffix = _SUFFIX.search(block)
        if kind == "components" and ({name, suffix[1] if suffix else name} & taken):
            continue
        if key not in headers:
            parts.append(block)
    if "fuse" in own:
        at = own.get("targets", "{stack}")
        layouts = {name: _templates(lines) for name, lines in own["layouts"].items()}
        gate = any(GATE in key for lines in own["layouts"].values() for key in lines)
        for key, block in _tables(_shared("gated" if gate else "plain")):
            more = block.replace("{experts}", at)
            # another one under the same tensor names is this layout, too
            name, same = key.partition(".")[2], set(map(_plain, _TEMPLATE.findall(more)))
            if name not in layouts and same not in layouts.values():
                parts.append(more)
    return parse_recipe("\n\n".join(parts) + "\n", where=where)


def _tables(text: str) -> list[tuple[str, str]]:
    """The tables of a file, each with the comment above it, by their first two words."""
    found = []
    for block in _TABLES.split(text.rstrip("\n")):
        if header := _HEADER.search(block):
            found.append((".".join(header[1].split(".")[:2]), block))
    return found


def _templates(lines: dict[str, object]) -> set[str]:
    """The tensor names of a layout, with one placeholder for components."""
    texts = (text for text in lines.values() if isinstance(text, str) and ": " in text)
    return {_plain(text.rpartition(": ")[0]) for text in texts}


def _plain(template: str) -> str:
    return template.replace(PARAMETER, "{component}")


@dataclass(frozen=True, slots=True)
class Names:
    """Names of one kind: a word of `words`, or one that contains one of `parts`.

    except_parts: what says that a name is of another kind all the same.
    """

    words: tuple[str, ...]
    parts: tuple[str, ...]
    except_parts: tuple[str, ...]

    def mentioned(self, words: Iterable[str]) -> bool:
        """Whether one of the words of a name, split at its dots, is of this kind."""
        return any(word in self.words or any(p in word for p in self.parts) for word in words)

    def excluded(self, words: Iterable[str]) -> bool:
        """Whether a word of a name, split at its dots, marks it as something else."""
        return any(p in word for word in words for p in self.except_parts)

    def in_text(self, text: str) -> bool:
        """Whether any text, a pattern for example, contains one of `words` as itself."""
        for other in self.except_parts:
            text = text.replace(other, "")
        return any(word in text for word in self.words)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Names that mean the same whatever the recipe is: the tables of `shared/vocabulary.toml`.

    list_rules: how lists in a quantization config match module names: by quantiser, then by key.
    """

    quantisers: Names
    left_alone: Names
    quantization_sections: Names
    layer_counts: Names
    mtp: Names
    own_layer_counts: Names
    routers: Names
    experts: Names
    expert_modules: Names
    beside: Names
    other_weights: Names
    quantization_documents: Names
    naming_documents: Names
    list_rules: dict[str, dict[str, str]]

    def list_rule(self, key: str, quantiser: str = "") -> str:
        """The rule of a list; empty where none is known."""
        special = self.list_rules.get(quantiser, {})
        return special.get(key) or self.list_rules["any"].get(key, "")


@cache
def vocabulary() -> Vocabulary:
    """The vocabulary that ships with moeconv."""
    doc = tomllib.loads(_shared("vocabulary"))
    rules = doc.pop("list_rules")
    kinds = {
        name: Names(*(tuple(table.get(key, ())) for key in ("words", "parts", "except")))
        for name, table in doc.items()
    }
    return Vocabulary(**kinds, list_rules=rules)


def shipped_recipes() -> tuple[Recipe, ...]:
    """All shipped recipes, by file name."""
    return tuple(map(_shipped, _texts()))


def shipped_recipe(name: str) -> Recipe | None:
    """The shipped recipe of this name."""
    # to parse all of them takes long, and most files are named as their recipe
    first = sorted(_texts(), key=lambda file: file != f"{name}.toml")
    return next((r for r in map(_shipped, first) if r.name == name), None)


def parts(recipes: tuple[Recipe, ...]) -> tuple[tuple[Component, tuple[str, ...]], ...]:
    """The components of experts, each form once, with the names of the recipes that have it."""
    found: dict[tuple[str, str, tuple[str, ...]], tuple[Component, list[str]]] = {}
    for recipe in recipes:
        for component in recipe.components:
            key = (component.name, component.suffix, tuple(map(str, component.possible_axes)))
            found.setdefault(key, (component, []))[1].append(recipe.name)
    return tuple((component, tuple(names)) for component, names in found.values())


def recipes_for(*, model_type: str | None, architectures: tuple[str, ...]) -> tuple[Recipe, ...]:
    """The shipped recipes that name this model type or one of these architectures."""
    words = [f'"{word}"' for word in (model_type, *architectures) if word]
    # to parse all of them takes longer than everything else before the first byte moves
    likely = (_shipped(f) for f, text in _texts().items() if any(w in text for w in words))
    return tuple(
        r
        for r in likely
        if model_type in r.model_types or not set(architectures).isdisjoint(r.architectures)
    )


def load_recipe(which: str | Path) -> Recipe:
    """A recipe file, or a shipped recipe by name. Raises BadRecipe."""
    path = Path(which)
    shipped = {r.name: r for r in shipped_recipes()}
    if str(which) in shipped and not path.exists():
        return shipped[str(which)]
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_RECIPE_BYTES + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise BadRecipe(
            f"cannot read the recipe {quoted(str(which))}",
            cause=problem.strerror if isinstance(problem, OSError) else "it is not UTF-8",
            fix=f"pass a file, or one of {', '.join(sorted(shipped))}",
        ) from None
    if len(text) > MAX_RECIPE_BYTES:
        raise BadRecipe(
            f"{quoted(str(which))} is not a recipe",
            at=quoted(str(which)),
            cause=f"it is larger than a recipe may be ({MAX_RECIPE_BYTES // 1024} KiB)",
        )
    return parse_recipe(text, where=path.name)


def manifest_recipes(root: Root) -> tuple[Recipe, ...]:
    """Parse the recipes in an output's manifest and check them against its stacks.

    Raises BadManifest.
    """
    try:
        recipes = {r.name: parse_recipe(r.toml, where=r.name) for r in root.recipes}
    except BadRecipe as problem:
        raise _bad_recipes(str(problem.cause)) from None
    for stack in root.stacks:
        recipe = recipes[stack.recipe]
        for layout in (stack.layout, stack.origin_layout):
            if recipe.name != stack.recipe or recipe.layout(layout) is None:
                raise _bad_recipes(
                    f"{quoted(stack.name)} is in layout {quoted(layout)}, "
                    f"which recipe {quoted(stack.recipe)} does not have"
                )
    ends = [s.experts for s in root.stacks if _stops(recipes[s.recipe])]
    return tuple(_in_range(r, max(ends, default=0)) for r in recipes.values())


def _stops(recipe: Recipe) -> bool:
    return recipe.ids is not None and not recipe.ids.first


def _in_range(recipe: Recipe, end: int) -> Recipe:
    """A recipe with its range of expert ids.

    end: where the range of the recipe that takes the first ids ends.
    """
    if recipe.ids is None or not end:
        return recipe
    return recipe.taking(0, end) if _stops(recipe) else recipe.taking(end, None)


def _bad_recipes(cause: str) -> BadManifest:
    return BadManifest(
        f"`{ROOT_NAME}` carries a recipe that does not fit it",
        at=f"`{ROOT_NAME}`, `recipes`",
        cause=cause,
    )
