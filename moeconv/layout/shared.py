"""What all families have in common, added to the text of each shipped recipe.

As text, so that a recipe is whole wherever it goes: `moeconv recipes show`, and every manifest.
"""

from __future__ import annotations

import re

from moeconv.layout.recipe import GATE, PARAMETER, Recipe
from moeconv.layout.recipefile import parse_recipe

_BLOCKS = re.compile(r"\n\n(?=(?:#[^\n]*\n)*\[)")
_HEADER = re.compile(r"^\[([^\]]+)\]", re.MULTILINE)
_SUFFIX = re.compile(r'^suffix = "([^"]*)"', re.MULTILINE)
_PLACE = re.compile(r'^targets = "([^"]*)"', re.MULTILINE)


def completed(text: str, *, gated: str, plain: str, components: str, where: str) -> Recipe:
    """The recipe of `text` with the shared layouts and components that it lacks."""
    own = parse_recipe(text + _granules(text, components), where=where)
    taken = {c.suffix for c in own.components} | {c.name for c in own.components}
    parts = [text.rstrip("\n")]
    for key, block in _blocks(components):
        kind, _, name = key.partition(".")
        suffix = _SUFFIX.search(block)
        if kind == "components" and ({name, suffix[1] if suffix else name} & taken):
            continue
        if key not in _headers(text):
            parts.append(block)
    if own.fuse is not None:
        place = _PLACE.search(text)
        at = place[1] if place else "{stack}"
        gate = any(GATE in la.projections for la in own.layouts)
        for key, block in _blocks(gated if gate else plain):
            if not _there(own, key.partition(".")[2], block.replace("{experts}", at)):
                parts.append(block.replace("{experts}", at))
    return parse_recipe("\n\n".join(parts) + "\n", where=where)


def _blocks(text: str) -> list[tuple[str, str]]:
    """The tables of a file, each with the comment above it, by their first two words."""
    found = []
    for block in _BLOCKS.split(text.rstrip("\n")):
        if header := _HEADER.search(block):
            found.append((".".join(header[1].split(".")[:2]), block))
    return found


def _headers(text: str) -> set[str]:
    return set(_HEADER.findall(text))


def _granules(text: str, components: str) -> str:
    """The shared granules, which a recipe's own axes may name."""
    key = "config.granules"
    return "" if key in _headers(text) else "\n\n" + dict(_blocks(components))[key] + "\n"


def _there(own: Recipe, name: str, block: str) -> bool:
    """Whether a recipe has that layout, or another one under the same tensor names."""
    names = {_plain(text) for text in re.findall(r'"(\S+): ', block)}
    return own.layout(name) is not None or any(
        {_plain(line.template) for line in layout.lines} == names for layout in own.layouts
    )


def _plain(template: str) -> str:
    return template.replace(PARAMETER, "{component}")
