"""The sizes of blocks and groups: only config.json says them, and it may say several."""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import product
from typing import Final

from moeconv.checkpoint.config import Config
from moeconv.core.json_value import Json
from moeconv.detect.config_sizes import said_of_quantisation
from moeconv.detect.interpretations import Reading, bound, granule_names
from moeconv.detect.match import Found
from moeconv.errors import ConfigMismatch, MoeconvError, quoted
from moeconv.layout.recipe import Layout

Granules = dict[str, int]
_BY = re.compile(r"([0-9]{1,9})x([0-9]{1,9})", re.ASCII)
_MOST: Final = 16  # other sizes of one kind; a model has one or two


def stated_granules(
    stack: str, found: Found, layouts: list[Layout], config: Config
) -> tuple[list[Granules], dict[str, str]]:
    """Every choice of numbers for the granules, and those that have none, with where they would be.

    Attention may be quantised in groups of one size and experts of another: config.json names both,
    and the tensors tell which is theirs.
    """
    wanted: dict[str, list[str]] = defaultdict(list)
    for name in sorted(granule_names(found, layouts)):
        wanted[name.partition(".")[0]].append(name)
    paths = dict(found.recipe.config.granules)  # `block.0` is item 0 of what `block` names
    choices: list[list[Granules]] = []
    unsaid: dict[str, str] = {}
    for key, names in wanted.items():
        several: list[Granules] = []
        for value in said_of_quantisation(config, found.recipe, stack, paths[key]):
            numbers = _numbers(key, value)
            one = {name: numbers[name] for name in names if name in numbers}
            if len(one) == len(names) and one not in several:
                several.append(one)
        if 0 < len(several) <= _MOST:
            choices.append(several)
        else:
            unsaid |= dict.fromkeys(names, next(iter(paths[key]), key))
    return [{k: v for part in picked for k, v in part.items()} for picked in product(*choices)], (
        unsaid
    )


def _numbers(key: str, value: Json) -> Granules:
    """`32` as that, `[128, 128]` or `"128x128"` as item 0 and item 1."""
    if isinstance(value, str) and (match := _BY.fullmatch(value)):
        value = [int(match[1]), int(match[2])]
    items = {f"{key}.{n}": v for n, v in enumerate(value)} if isinstance(value, list) else {}
    return {k: v for k, v in {key: value, **items}.items() if type(v) is int and v > 0}


def several_sizes(stack: str, found: Found, readings: list[Reading]) -> MoeconvError:
    """More than one of the sizes that config.json says is one that the tensors may have."""
    one, other = bound(readings[0]), bound(readings[1])
    key = next(key for key in one if one[key] != other[key])
    tensor = next(iter(found.tensors[key].values()))
    axes = " or ".join(dict.fromkeys(f"`{bound(reading)[key]}`" for reading in readings))
    return ConfigMismatch(
        f"config.json says several sizes of blocks or groups, and {quoted(stack)} fits them all",
        at=found.place(tensor),
        cause=f"{tensor.dtype} {list(tensor.shape)} may be {axes}",
        fix="leave the experts' size alone in a copy of config.json",
    )
