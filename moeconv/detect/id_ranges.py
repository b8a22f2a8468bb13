"""Stacks that share one row of expert ids: text takes the first, vision the rest."""

from __future__ import annotations

from moeconv.checkpoint.config import Config
from moeconv.detect.match import Found
from moeconv.errors import ConfigMismatch, MoeconvError, quoted
from moeconv.layout.recipe import Recipe


def in_ranges(recipes: tuple[Recipe, ...], config: Config) -> tuple[Recipe, ...]:
    """The recipes with their ranges of ids, where config.json says them."""
    return tuple(_in_range(recipe, config) for recipe in recipes)


def _in_range(recipe: Recipe, config: Config) -> Recipe:
    if recipe.ids is None or recipe.taken:
        return recipe
    first = _number(recipe.ids.first, config) if recipe.ids.first else 0
    stop = _number(recipe.ids.stop, config)
    if first is None or (recipe.ids.stop and stop is None):
        return recipe
    return recipe.taking(first, stop)


def _number(paths: tuple[str, ...], config: Config) -> int | None:
    """The first of the keys that holds a number, at the top or in text_config."""
    for path in (f"{section}{p}" for section in ("text_config.", "") for p in paths):
        value = config.at(path)
        if type(value) is int and value > 0:
            return value
    return None


def no_range(stack: str, found: Found) -> MoeconvError:
    """Where one kind of experts ends is never guessed."""
    ids = found.recipe.ids
    keys = (*ids.first, *ids.stop) if ids else ()
    return ConfigMismatch(
        f"{quoted(stack)} shares its expert ids with another stack, "
        "but config.json does not say where one ends",
        at=f"config.json, key {quoted(keys[0])}" if keys else "config.json",
        cause="text and vision experts stand in one row of ids",
    )
