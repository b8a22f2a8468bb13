"""What config.json says of a stack's sizes, for all layers or for one, and where it lies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from moeconv.checkpoint.config import Config
from moeconv.core.json_value import Json
from moeconv.errors import ConfigMismatch, MoeconvError, abridged, printable, quoted
from moeconv.layout.recipe import SECTIONS, ConfigKeys, Recipe
from moeconv.layout.shipped import vocabulary

LAYER_COUNTS: Final = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_NUMBER = re.compile(r"(?:^|\.)([0-9]{1,9})(?=\.|$)")

_Hit = tuple[str, object]  # a key, and what it says


def said_of_quantisation(
    config: Config, recipe: Recipe, stack: str, paths: tuple[str, ...]
) -> list[Json]:
    """All that is at these keys, in the first section for the stack that has any.

    The root is one of them for every stack: a `quantization_config` there is the whole model's.
    """
    for section in (*recipe.config.sections_of(stack), ""):
        full = (recipe.config.path(section, path) for path in paths)
        if values := [value for path in full for value in config.every(path)]:
            return values
    return []


def says_scaled(config: Config, recipe: Recipe, stack: str) -> bool:
    """Whether config.json says that a stack is quantised by a method whose weights have scales.

    Not where a list of what was not converted may be of this stack: casts to fp8 have no scales.
    """
    known = vocabulary()
    paths = tuple(f"quantization_config.{key}" for key in ("quant_method", *known.left_alone))
    methods, *lists = (said_of_quantisation(config, recipe, stack, (path,)) for path in paths)
    left = [t for values in lists for v in values if isinstance(v, list) for t in v]
    return any(method in known.scaled for method in methods) and not any(
        isinstance(text, str) and ("experts" in text or stack.startswith(text)) for text in left
    )


def says_quantised(config: Config, recipe: Recipe, stack: str) -> bool:
    """Whether there is a `quantization_config` for a stack, with anything in it."""
    return any(said_of_quantisation(config, recipe, stack, ("quantization_config",)))


def layers_said(config: Config, recipe: Recipe, section: str) -> int | None:
    """The number of layers in a section; of several the least: LongCat counts halves, too."""
    said = [v for _, v in _in_section(config, recipe, section, LAYER_COUNTS) if type(v) is int]
    return min((v for v in said if v > 0), default=None)


def mtp_layers_said(config: Config) -> int:
    """The number of layers that predict further tokens, under any key that speaks of them."""
    parts = [config.doc, *(config.at(section) for section in SECTIONS if section)]
    items = [item for part in parts if isinstance(part, dict) for item in part.items()]
    return max((v for k, v in items if ("mtp" in k or "nextn" in k) and type(v) is int), default=0)


def states_experts(stack: str, recipe: Recipe, config: Config) -> bool:
    """Whether config.json states the number of experts (a list states one for each layer)."""
    return bool(_sizes(config, recipe, stack, recipe.config.experts, alike=True))


def said_sizes(stack: str, recipe: Recipe, config: Config) -> dict[str, int]:
    """The sizes that config.json says for this stack."""
    out = {}
    for what, paths in _keys(recipe):
        hits = _sizes(config, recipe, stack, paths, alike=what == "experts")
        if hits and type(value := hits[0][1]) is int and value > 0:
            out[what] = value
    return out


def against_config(
    stack: str, recipe: Recipe, held: dict[str, int], config: Config
) -> list[MoeconvError]:
    """Where the sizes that the tensors have are not those of config.json."""
    words = {"experts": "experts", "width": "rows in gate and up", "hidden": "inputs to an expert"}
    problems: list[MoeconvError] = []
    for what, paths in _keys(recipe):
        hits = _sizes(config, recipe, stack, paths, alike=what == "experts")
        # one model has one number of experts; the keys of its widths mean different things
        for key, said in hits if what == "experts" else hits[:1]:
            # a list that is not one of layers says something of another kind
            if what not in held or isinstance(said, list | dict) or _same(said, held[what]):
                continue
            problems.append(
                ConfigMismatch(
                    f"config.json and the tensors of {quoted(stack)} disagree on the {what}",
                    at=f"config.json, key {quoted(key)}",
                    cause=f"config.json says {printable(abridged(str(said), 200))}, "
                    f"the tensors have {held[what]} {words[what]}",
                )
            )
    return problems


def _keys(recipe: Recipe) -> tuple[tuple[str, tuple[str, ...]], ...]:
    keys = recipe.config
    return (("experts", keys.experts), ("width", keys.width), ("hidden", keys.hidden))


def _same(said: object, held: int) -> bool:
    return type(said) is int and said == held


def _in_section(config: Config, recipe: Recipe, section: str, paths: tuple[str, ...]) -> list[_Hit]:
    return list(config.among(_in_full(section, paths)).items())


@lru_cache(maxsize=1024)
def _in_full(section: str, paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(ConfigKeys.path(section, path) for path in paths)


@lru_cache(maxsize=1024)
def _owners(
    section: str, paths: tuple[str, ...], forms: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """For each path of a layer, what stands before and behind the number of the layer."""
    keys = _in_full(section, tuple(f.replace("{key}", path) for path in paths for f in forms))
    return tuple((owner, rest) for owner, _, rest in (key.partition(".{layer}") for key in keys))


def _sizes(
    config: Config, recipe: Recipe, stack: str, paths: tuple[str, ...], *, alike: bool
) -> list[_Hit]:
    """All of these keys that are there, in the first section that has any of them.

    What is said of the one layer is what counts: beside it the rest is a default. alike: whether
    all keys mean the same; else that goes for each of them alone.
    """
    number = _NUMBER.search(stack)
    layer_forms = recipe.config.layers_of(stack) if number else ()
    for section in recipe.config.sections_of(stack):
        hits: list[_Hit] = []
        for several in (paths,) if alike else ((path,) for path in paths):
            owners = _owners(section, several, layer_forms)
            layer = list(_of_layer(config, recipe, section, number[1] if number else "", owners))
            hits += layer or _in_section(config, recipe, section, several)
        if hits:
            return hits
    return []


def _of_layer(
    config: Config, recipe: Recipe, section: str, number: str, owners: tuple[tuple[str, str], ...]
) -> Iterator[_Hit]:
    there = config.among(tuple(owner for owner, _ in owners)) if owners else {}
    for owner, rest in owners if there else ():
        value = config.at(full := f"{owner}.{number}{rest}") if owner in there else None
        # a bare list may be of anything, of two kinds of experts for example
        if value is not None and (rest or _of_layers(there[owner], config, recipe, section)):
            yield full, value


def _of_layers(owner: object, config: Config, recipe: Recipe, section: str) -> bool:
    """Whether it is a list with an item for each layer."""
    return isinstance(owner, list) and len(owner) == layers_said(config, recipe, section)
