"""The sizes that config.json states for a stack, and where the tensors contradict them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Final

from moeconv.checkpoint.config import Config
from moeconv.core.strict_json import Json
from moeconv.detect.interpretations import BlockSizes, named_block_sizes
from moeconv.detect.match import MatchedStack
from moeconv.errors import ConfigMismatch, MoeconvError, abridged, printable, quoted
from moeconv.layout.recipe import SECTIONS, ConfigKeys, Layout, Recipe
from moeconv.layout.shipped import vocabulary

_NUMBER = re.compile(r"(?:^|\.)([0-9]{1,9})(?=\.|$)")

_BY = re.compile(r"([0-9]{1,9})x([0-9]{1,9})", re.ASCII)
_MAX_BLOCK_SIZES: Final = 16  # different values of one key; a model has one or two

_Hit = tuple[str, object]  # a key, and what it says


def quantisation_values(
    config: Config, recipe: Recipe, stack: str, paths: tuple[str, ...]
) -> list[Json]:
    """Return all values at these keys, from the first section for the stack that has any.

    The root is a section of every stack: a `quantization_config` there is the whole model's.
    """
    for section in (*recipe.config.sections_of(stack), ""):
        full = (recipe.config.path(section, path) for path in paths)
        if values := [value for path in full for value in config.every(path)]:
            return values
    return []


def states_scales(config: Config, recipe: Recipe, stack: str) -> bool:
    """Whether config.json states a quantisation method whose weights have scales for a stack.

    False if a list of modules that were not converted may include it: casts to fp8 have no scales.
    """
    known = vocabulary()
    keys = ("quant_method", *known.left_alone.words)
    paths = tuple(f"quantization_config.{key}" for key in keys)
    methods, *lists = (quantisation_values(config, recipe, stack, (path,)) for path in paths)
    left = [t for values in lists for v in values if isinstance(v, list) for t in v]
    return any(method in known.quantisers.words for method in methods) and not any(
        isinstance(text, str)
        and (any(w in text for w in known.expert_modules.words) or stack.startswith(text))
        for text in left
    )


def states_quantisation(config: Config, recipe: Recipe, stack: str) -> bool:
    """Whether there is a `quantization_config` for a stack, with anything in it."""
    return any(quantisation_values(config, recipe, stack, ("quantization_config",)))


def layer_count(config: Config, section: str) -> int | None:
    """Return the number of layers in a section, the least of several: LongCat counts halves."""
    keys = vocabulary().layer_counts.words
    stated = [v for _, v in _in_section(config, section, keys) if type(v) is int]
    return min((v for v in stated if v > 0), default=None)


def mtp_layer_count(config: Config) -> int:
    """Return the number of multi-token prediction layers, from any key with such a name."""
    parts = [config.doc, *(config.at(section) for section in SECTIONS if section)]
    items = [item for part in parts if isinstance(part, dict) for item in part.items()]
    mtp = vocabulary().mtp
    return max((v for k, v in items if type(v) is int and mtp.mentioned((k,))), default=0)


def states_experts(stack: str, recipe: Recipe, config: Config) -> bool:
    """Whether config.json states the number of experts (a list states one for each layer)."""
    return bool(_sizes(config, recipe, stack, recipe.config.experts, alike=True))


def stated_sizes(matched: MatchedStack, config: Config) -> dict[str, int]:
    """Return the sizes (`experts`, `width`, `hidden`) that config.json states for a stack."""
    out = {}
    for what, paths in _keys(matched.recipe):
        hits = _sizes(config, matched.recipe, matched.name, paths, alike=what == "experts")
        if hits and type(value := hits[0][1]) is int and value > 0:
            out[what] = value
    return out


def config_mismatches(
    matched: MatchedStack, sizes: dict[str, int], config: Config, router: int | None = None
) -> Iterator[MoeconvError]:
    """Yield the problems of a stack whose tensors have other sizes than config.json states.

    router: the rows of the stack's router, for the message.
    """
    rows = "" if router is None else f", its router has {router} rows"
    words = {"experts": "experts", "width": "rows in gate and up", "hidden": "inputs to an expert"}
    for what, paths in _keys(matched.recipe):
        hits = _sizes(config, matched.recipe, matched.name, paths, alike=what == "experts")
        # one model has one number of experts; the keys of its widths mean different things
        for key, stated in hits if what == "experts" else hits[:1]:
            # a list that is not one of layers states something else
            if what not in sizes or isinstance(stated, list | dict):
                continue
            if type(stated) is not int or stated != sizes[what]:
                yield ConfigMismatch(
                    f"config.json and the tensors of {quoted(matched.name)} disagree on the {what}",
                    at=f"config.json, key {quoted(key)}",
                    cause=f"config.json says {printable(abridged(str(stated), 200))}, "
                    f"the tensors have {sizes[what]} {words[what]}"
                    f"{rows if what == 'experts' else ''}",
                )


def _keys(recipe: Recipe) -> tuple[tuple[str, tuple[str, ...]], ...]:
    keys = recipe.config
    return (("experts", keys.experts), ("width", keys.width), ("hidden", keys.hidden))


def _in_section(config: Config, section: str, paths: tuple[str, ...]) -> list[_Hit]:
    return list(config.among(_in_full(section, paths)).items())


@lru_cache(maxsize=1024)
def _in_full(section: str, paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(ConfigKeys.path(section, path) for path in paths)


@lru_cache(maxsize=1024)
def _owners(
    section: str, paths: tuple[str, ...], forms: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """Return for each path of a layer what is before and behind the layer's number."""
    keys = _in_full(section, tuple(f.replace("{key}", path) for path in paths for f in forms))
    return tuple((owner, rest) for owner, _, rest in (key.partition(".{layer}") for key in keys))


def _sizes(
    config: Config, recipe: Recipe, stack: str, paths: tuple[str, ...], *, alike: bool
) -> list[_Hit]:
    """Return the keys and values that are there, from the first section that has any of them.

    A value for the stack's own layer overrides those for all layers. alike: whether all keys mean
    the same, so that one such value overrides them all; otherwise each key is on its own.
    """
    number = _NUMBER.search(stack)
    restarts = vocabulary().mtp.mentioned(stack.split("."))
    layer_forms = recipe.config.layers_of(stack, restarts=restarts) if number else ()
    for section in recipe.config.sections_of(stack):
        hits: list[_Hit] = []
        for several in (paths,) if alike else ((path,) for path in paths):
            owners = _owners(section, several, layer_forms)
            layer = list(_of_layer(config, section, number[1] if number else "", owners))
            hits += layer or _in_section(config, section, several)
        if hits:
            return hits
    return []


def _of_layer(
    config: Config, section: str, number: str, owners: tuple[tuple[str, str], ...]
) -> Iterator[_Hit]:
    there = config.among(tuple(owner for owner, _ in owners)) if owners else {}
    for owner, rest in owners if there else ():
        value = config.at(full := f"{owner}.{number}{rest}") if owner in there else None
        if value is None:
            continue
        # a plain list of another length may be of anything, of two kinds of experts for example
        items = there[owner]
        if rest or (isinstance(items, list) and len(items) == layer_count(config, section)):
            yield full, value


@dataclass(frozen=True, slots=True)
class StatedBlocks:
    """The block and group sizes that config.json states for a stack.

    choices: every combination of the sizes that it states; the tensors tell which is theirs.
    unstated: the names that have no size, each with the key of config.json that would state it.
    """

    choices: list[BlockSizes]
    unstated: dict[str, str]


def stated_block_sizes(
    matched: MatchedStack, layouts: list[Layout], config: Config
) -> StatedBlocks:
    """Return the block sizes that config.json states, of those that these layouts name.

    Attention may be quantised in groups of one size and experts in groups of another: config.json
    then states both.
    """
    wanted: dict[str, list[str]] = defaultdict(list)
    for name in sorted({n for layout in layouts for n in named_block_sizes(matched, layout)}):
        wanted[name.partition(".")[0]].append(name)  # `block.0` is item 0 of what `block` names
    paths = dict(matched.recipe.config.block_sizes)
    choices: list[list[BlockSizes]] = []
    unstated: dict[str, str] = {}
    for key, names in wanted.items():
        distinct: list[BlockSizes] = []
        for value in quantisation_values(config, matched.recipe, matched.name, paths[key]):
            numbers = _numbers(key, value)
            one = {name: numbers[name] for name in names if name in numbers}
            if len(one) == len(names) and one not in distinct:
                distinct.append(one)
        if 0 < len(distinct) <= _MAX_BLOCK_SIZES:
            choices.append(distinct)
        else:
            unstated |= dict.fromkeys(names, next(iter(paths[key]), key))
    combined = [{k: v for part in picked for k, v in part.items()} for picked in product(*choices)]
    return StatedBlocks(combined, unstated)


def _numbers(key: str, value: Json) -> BlockSizes:
    """Return `32` as `key`, and `[128, 128]` or `"128x128"` as `key.0` and `key.1`."""
    if isinstance(value, str) and (match := _BY.fullmatch(value)):
        value = [int(match[1]), int(match[2])]
    items = {f"{key}.{n}": v for n, v in enumerate(value)} if isinstance(value, list) else {}
    return {k: v for k, v in {key: value, **items}.items() if type(v) is int and v > 0}
