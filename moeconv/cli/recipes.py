"""`moeconv recipes list|show|check`: the families and layouts that moeconv knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moeconv.cli import options
from moeconv.cli.ui import Ui, handled

if TYPE_CHECKING:
    from moeconv.core.strict_json import Json
    from moeconv.layout.recipe import Recipe

recipes = typer.Typer(
    help="Recipes of families and layouts: list them, print one, check your own.",
    invoke_without_command=True,
    rich_markup_mode=None,
)


@recipes.callback()
def _all(context: typer.Context) -> None:
    """Recipes of families and layouts: list them, print one, check your own."""
    if context.invoked_subcommand is None:
        list_()


@recipes.command("list")
def list_(as_json: options.AsJson = False, color: options.Color = "auto") -> None:
    """List all recipes, and the components of quantised experts."""
    with handled(Ui(json=as_json, color=color)) as ui:
        from moeconv.layout.shipped import parts, shipped_recipes

        found = shipped_recipes()
        if as_json:
            ui.document({"type": "recipes", "recipes": [_document(r) for r in found]})
            return
        rows = [
            [
                r.name,
                r.title,
                ", ".join(layout.name for layout in r.layouts if not layout.read_only),
                ", ".join(r.model_types),
            ]
            for r in found
        ]
        ui.table(["recipe", "names", "layouts", "model types"], rows)
        ui.data("")
        rows = [
            [
                component.name,
                component.of or "-",
                " or ".join(str(axes) or "one number" for axes in component.possible_axes),
                component.suffix or "-",
                "all" if len(names) > len(found) // 2 else ", ".join(names),
            ]
            for component, names in parts(found)
        ]
        ui.table(["component", "of", "axes of one matrix", "fused suffix", "recipes"], rows)


def _document(recipe: Recipe) -> dict[str, Json]:
    return {
        "name": recipe.name,
        "title": recipe.title,
        "model_types": list(recipe.model_types),
        "layouts": [layout.name for layout in recipe.layouts],
        "components": [c.name for c in recipe.components],
        "fuse": recipe.fuse,
        "unfuse": recipe.unfuse,
    }


@recipes.command()
def show(
    name: Annotated[str, typer.Argument(help="A recipe's name.", show_default=False)],
    color: options.Color = "auto",
) -> None:
    """Print a recipe as TOML, to start your own from."""
    with handled(Ui(color=color)) as ui:
        from moeconv.layout.shipped import load_recipe

        ui.data(load_recipe(name).toml.rstrip("\n"))


@recipes.command()
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A TOML file.", show_default=False)],
    as_json: options.AsJson = False,
    color: options.Color = "auto",
) -> None:
    """Check a recipe of your own; every problem is reported at once."""
    with handled(Ui(json=as_json, color=color)) as ui:
        from moeconv.layout.shipped import load_recipe

        recipe = load_recipe(file)
        ui.result(f"ok: {recipe.name}", lambda: {"type": "recipe", "ok": True, **_document(recipe)})
