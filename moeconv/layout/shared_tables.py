"""What all families have in common, added to the text of each shipped recipe.

As text, so that a recipe is whole wherever it goes: `moeconv recipes show`, and every manifest.
"""

from __future__ import annotations

import re
import tomllib

from moeconv.layout.recipe import GATE, PARAMETER, Recipe
from moeconv.layout.recipe_toml import parse_recipe

_BLOCKS = re.compile(r"\n\n(?=(?:#[^\n]*\n)*\[)")
_HEADER = re.compile(r"^\[([^\]]+)\]", re.MULTILINE)
_SUFFIX = re.compile(r'^suffix = "([^"]*)"', re.MULTILINE)
_TEMPLATE = re.compile(r'"(\S+): ')


def completed(text: str, *, gated: str, plain: str, components: str, where: str) -> Recipe:
    """The recipe of `text` with the shared layouts and components that it lacks."""
    own = tomllib.loads(text)
    has = {(name, part.get("suffix")) for name, part in own.get("components", {}).items()}
    taken = {word for words in has for word in words}
    parts = [text.rstrip("\n")]
    for key, block in _blocks(components):
        kind, _, name = key.partition(".")
        suffix = _SUFFIX.search(block)
        if kind == "components" and ({name, suffix[1] if suffix else name} & taken):
            continue
        if key not in _headers(text):
            parts.append(block)
    if "fuse" in own:
        at = own.get("targets", "{stack}")
        layouts = {name: _templates(lines) for name, lines in own["layouts"].items()}
        gate = any(GATE in key for lines in own["layouts"].values() for key in lines)
        for key, block in _blocks(gated if gate else plain):
            more = block.replace("{experts}", at)
            # another one under the same tensor names is this layout, too
            name, same = key.partition(".")[2], set(map(_plain, _TEMPLATE.findall(more)))
            if name not in layouts and same not in layouts.values():
                parts.append(more)
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


def _templates(lines: dict[str, object]) -> set[str]:
    """The tensor names of a layout, with one hole for components."""
    texts = (text for text in lines.values() if isinstance(text, str) and ": " in text)
    return {_plain(text.rpartition(": ")[0]) for text in texts}


def _plain(template: str) -> str:
    return template.replace(PARAMETER, "{component}")
