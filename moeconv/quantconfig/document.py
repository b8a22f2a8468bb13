"""Read the texts of a document about quantization, and change its lists of names in place.

The document is edited as text: everything else keeps its bytes, whatever its spacing, floats or
order. Keys of an object that are names count as a list, each with its value, and so does a single
text, which only one text can replace.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from moeconv.layout.shipped import vocabulary

_SPACE: Final = " \t\r\n"
_VALUE = json.JSONDecoder()

Change = Callable[[str, tuple[str, ...]], tuple[tuple[str, ...], ...] | None]


@dataclass(frozen=True, slots=True)
class Item:
    """A text and its JSON; for a key of an object, `rest` is the colon and the value."""

    text: str
    raw: str
    rest: str = ""

    @property
    def value(self) -> str:
        """The JSON of a key's value."""
        return self.rest.lstrip(_SPACE + ":")


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of one list, one object's keys, or a single text.

    place: the keys above it, joined by dots. start, stop: where its JSON is in the document.
    names: whether it is a list of names, which may be changed.
    """

    place: str
    start: int
    stop: int
    items: tuple[Item, ...]
    names: bool
    single: bool = False


def quant_texts(document: str, *, inside: bool = False) -> list[Texts]:
    """All texts of a valid JSON document that are about quantization, in file order.

    inside: whether all of the document is.
    """
    return _walk(document, _skip(document, 0), "", inside=inside)[0]


def quant_methods(texts: Iterable[Texts]) -> dict[str, str]:
    """Each `quant_method` in lower case, by the place of its section."""
    single = ((t.place.rpartition("."), t.items[0].text) for t in texts if t.single)
    return {section: text.lower() for (section, _, key), text in single if key == "quant_method"}


def changed_lists(
    document: str, texts: Iterable[Texts], change: Change
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Change the lists of names among `texts`, which are the document's.

    change: gets a list's place and its texts, and returns the texts that replace each, or None to
    leave the list. Keys are one list for each value. Returns the document, and the place and first
    text of each list that is left because the new names would change its meaning.
    """
    pieces, at, left = [], 0, []
    for found in texts:
        try:
            new = _changed(found, change) if found.names else None
        except _MeaningChanges:
            left.append((found.place, found.items[0].text))
            continue
        if new is not None:
            old = document[found.start : found.stop]
            pieces += [document[at : found.start], new[0] if found.single else _like(old, new)]
            at = found.stop
    return "".join((*pieces, document[at:])), tuple(left)


class _MeaningChanges(Exception):
    """New names would change the meaning of a list, or cannot be written there.

    A key would have two values or precede another that must come first, or a single text would
    become several.
    """


def _changed(found: Texts, change: Change) -> list[str] | None:
    """The JSON of a list's new items; None where nothing changes."""
    groups: dict[str, list[int]] = {}
    for number, item in enumerate(found.items):
        groups.setdefault(item.value, []).append(number)
    made: dict[int, tuple[str, ...]] = {}
    for numbers in groups.values():
        new = change(found.place, tuple(found.items[n].text for n in numbers))
        made |= dict(zip(numbers, new or (), strict=bool(new)))
    if not made:
        return None
    if vocabulary().list_rule(found.place.rpartition(".")[2]) == "regex":
        # the first match counts: keys can be renamed only where all have one value and one sign
        signs = {item.text.startswith("-:") for item in found.items}
        if len(groups) > 1 or len(signs) > 1:
            raise _MeaningChanges
    there = {
        item.text: item.value
        for number, item in enumerate(found.items)
        if item.text in made.get(number, (item.text,))
    }
    out: list[str] = []
    for number, item in enumerate(found.items):
        for text in made.get(number, (item.text,)):
            if text == item.text:
                out.append(item.raw + item.rest)
            elif text not in there:
                there[text] = item.value
                out.append(json.dumps(text) + item.rest)
            elif there[text] != item.value:
                raise _MeaningChanges
    if found.single and len(out) != 1:
        raise _MeaningChanges
    return out


def _walk(text: str, start: int, place: str, *, inside: bool) -> tuple[list[Texts], int]:
    """The texts of the value that begins at `start`, and where it ends."""
    if text[start] == "{":
        return _object(text, start, place, inside=inside)
    if text[start] == "[":
        return _list(text, start, place, inside=inside)
    value, stop = _VALUE.raw_decode(text, start)
    if not inside or not isinstance(value, str):
        return [], stop
    item = Item(value, text[start:stop])
    # a word there is a setting
    return [Texts(place, start, stop, (item,), "." in value, single=True)], stop


def _list(text: str, start: int, place: str, *, inside: bool) -> tuple[list[Texts], int]:
    """A list is one of names where all its items are texts."""
    items: list[Item] = []
    others: list[Texts] = []
    only_texts = True
    at = _skip(text, start + 1)
    while text[at] != "]":
        if text[at] == '"':
            value, stop = _VALUE.raw_decode(text, at)
            items.append(Item(value, text[at:stop]))
        else:
            only_texts = False
            more, stop = _walk(text, at, place, inside=inside)
            others += more
        at = _next(text, stop)
    others = [replace(found, names=False) for found in others]
    if inside and items:
        others.append(Texts(place, start, at + 1, tuple(items), only_texts))
    return others, at + 1


def _object(text: str, start: int, place: str, *, inside: bool) -> tuple[list[Texts], int]:
    """Names have dots; where keys are names, no value holds a list of names."""
    keys: list[Item] = []
    values: list[Texts] = []
    at = _skip(text, start + 1)
    while text[at] != "}":
        head = at
        key, at = _VALUE.raw_decode(text, at)
        below = f"{place}.{key}" if place else key
        about = inside or key in vocabulary().quantization_sections.words
        more, stop = _walk(text, _skip(text, _skip(text, at) + 1), below, inside=about)
        values += more
        keys.append(Item(key, text[head:at], text[at:stop]))
        at = _next(text, stop)
    if not inside or not keys:
        return values, at + 1
    names = any("." in item.text for item in keys) and not any(
        found.names and not found.single for found in values
    )
    if names:
        values = [replace(found, names=False) for found in values]
    return [Texts(place, start, at + 1, tuple(keys), names), *values], at + 1


def _next(text: str, stop: int) -> int:
    """Where the next item begins, or the list or object ends, behind an item."""
    at = _skip(text, stop)
    return _skip(text, at + 1) if text[at] == "," else at


def _skip(text: str, at: int) -> int:
    while text[at] in _SPACE:
        at += 1
    return at


def _like(old: str, items: list[str]) -> str:
    """The JSON of a list, spaced like the old one."""
    lead = old[1 : _skip(old, 1)]
    tail = old[len(old[:-1].rstrip(_SPACE)) : -1]
    gap = lead if "\n" in lead else " "
    return f"{old[0]}{lead}{f',{gap}'.join(items)}{tail}{old[-1]}"
