"""The recipes that ship with moeconv, and the choice of those that fit a checkpoint."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from moeconv.errors import BadManifest, BadRecipe, quoted
from moeconv.layout.recipe import Recipe
from moeconv.layout.recipefile import MAX_RECIPE_BYTES, parse_recipe
from moeconv.manifest import ROOT_NAME, Root


def _folder() -> Traversable:
    shipped = files("moeconv") / "recipes"
    if shipped.is_dir():
        return shipped
    # an editable install runs from the repository, where recipes/ stands beside the package
    return Path(__file__).resolve().parents[1] / "recipes"


@cache
def shipped_recipes() -> tuple[Recipe, ...]:
    """All shipped recipes, by file name."""
    found = sorted(
        (f for f in _folder().iterdir() if f.name.endswith(".toml")), key=lambda f: f.name
    )
    return tuple(parse_recipe(f.read_text("utf-8"), where=f.name) for f in found)


def fitting(
    recipes: tuple[Recipe, ...], *, model_type: str | None, architectures: tuple[str, ...]
) -> tuple[Recipe, ...]:
    """The recipes that name this model type or one of these architectures."""
    return tuple(
        r
        for r in recipes
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
            fix=f"give a file, or one of {', '.join(sorted(shipped))}",
        ) from None
    if len(text) > MAX_RECIPE_BYTES:
        raise BadRecipe(
            f"{quoted(str(which))} is no recipe",
            at=quoted(str(which)),
            cause="it is larger than a recipe may be (1 MiB)",
            fix="`moeconv recipes show qwen3_moe` prints one that works",
        )
    return parse_recipe(text, where=path.name)


def manifest_recipes(root: Root) -> tuple[Recipe, ...]:
    """The recipes that a set carries, held against its stacks. Raises BadManifest."""
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
    return tuple(recipes.values())


def _bad_recipes(cause: str) -> BadManifest:
    return BadManifest(
        f"`{ROOT_NAME}` carries a recipe that does not fit it",
        at=f"`{ROOT_NAME}`, `recipes`",
        cause=cause,
        fix="convert the checkpoint again; a manifest is never edited by hand",
    )
