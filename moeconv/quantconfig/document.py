"""Read the texts of a document about quantization, and change its lists of names in place.

The document is edited as text: everything else keeps its bytes, whatever its spacing, floats or
order. Keys of an object that are names count as a list, each with its value, and so does a single
text, which only one text can replace.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from moeconv.checkpoint.config import QUANTIZATION
from moeconv.core.json_value import Json

_SPACE: Final = " \t\r\n"
_VALUE = json.JSONDecoder()

Change = Callable[[str, tuple[str, ...]], tuple[tuple[str, ...], ...] | None]


@dataclass(frozen=True, slots=True)
class _Item:
    """A text of a list and its JSON; for a key of an object, `rest` is the colon and the value."""

    text: str
    raw: str
    rest: str = ""


@dataclass(frozen=True, slots=True)
class _List:
    place: str
    start: int
    stop: int
    items: tuple[_Item, ...]
    keys: bool = False
    alone: bool = False  # a single text: a list of one


def changed_lists(
    raw: bytes, change: Change, *, inside: bool = False
) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """Change the lists of names in `raw`, a valid JSON document.

    change: gets a list's place and its texts, and returns the texts that replace each, or None to
    leave the list. Keys are one list for each value. inside: whether all of it is about
    quantization. Returns the document, and the place and first text of each list that is left
    because the new names would change its meaning.
    """
    text = raw.decode("utf-8")
    pieces, at, left = [], 0, []
    for found in _walk(text, _skip(text, 0), "", inside=inside)[0]:
        try:
            new = _changed(found, change)
        except _MeaningChanges:
            left.append((found.place, found.items[0].text))
            continue
        if new is not None:
            old = text[found.start : found.stop]
            pieces += [text[at : found.start], new[0] if found.alone else _like(old, new)]
            at = found.stop
    return "".join((*pieces, text[at:])).encode("utf-8"), tuple(left)


class _MeaningChanges(Exception):
    """New names would change the meaning of a list, or cannot be written there.

    A key would have two values or precede another that must come first, or a single text would
    become several.
    """


def _changed(found: _List, change: Change) -> list[str] | None:
    """The JSON of a list's new items; None where nothing changes."""
    groups: dict[str, list[int]] = {}
    for number, item in enumerate(found.items):
        groups.setdefault(item.rest.lstrip(_SPACE + ":"), []).append(number)
    made: dict[int, tuple[str, ...]] = {}
    for numbers in groups.values():
        new = change(found.place, tuple(found.items[n].text for n in numbers))
        made |= dict(zip(numbers, new or (), strict=bool(new)))
    if not made:
        return None
    if found.keys and found.place.rpartition(".")[2] == "dynamic":
        # the first match counts: keys can be renamed only where all have one value and one sign
        signs = {item.text.startswith("-:") for item in found.items}
        if len(groups) > 1 or len(signs) > 1:
            raise _MeaningChanges
    there = {
        item.text: item.rest.lstrip(_SPACE + ":")
        for number, item in enumerate(found.items)
        if item.text in made.get(number, (item.text,))
    }
    out: list[str] = []
    for number, item in enumerate(found.items):
        value = item.rest.lstrip(_SPACE + ":")
        for text in made.get(number, (item.text,)):
            if text == item.text:
                out.append(item.raw + item.rest)
            elif text not in there:
                there[text] = value
                out.append(json.dumps(text) + item.rest)
            elif there[text] != value:
                raise _MeaningChanges
    if found.alone and len(out) != 1:
        raise _MeaningChanges
    return out


def _walk(text: str, start: int, place: str, *, inside: bool) -> tuple[list[_List], int]:
    """Every list of texts below a quantization_config, in file order, and the end of the value."""
    if text[start] != "{":
        value, stop = _VALUE.raw_decode(text, start)
        if inside and isinstance(value, str) and "." in value:  # a word there is a setting
            alone = _Item(value, text[start:stop])
            return [_List(place, start, stop, (alone,), alone=True)], stop
        texts = inside and isinstance(value, list) and all(isinstance(v, str) for v in value)
        found = [_List(place, start, stop, tuple(_items(text, start)))] if texts and value else []
        return found, stop
    entries: list[_Item] = []
    inner: list[_List] = []
    at = _skip(text, start + 1)
    while text[at] != "}":
        head = at
        key, at = _VALUE.raw_decode(text, at)
        begin = _skip(text, _skip(text, at) + 1)
        below = f"{place}.{key}" if place else key
        more, stop = _walk(text, begin, below, inside=inside or key in QUANTIZATION)
        inner += more
        entries.append(_Item(key, text[head:at], text[at:stop]))
        at = _skip(text, stop)
        if text[at] == ",":
            at = _skip(text, at + 1)
    # names have dots; where keys are names, no value holds a list of names
    lists = [found for found in inner if not found.alone]
    if inside and not lists and any("." in entry.text for entry in entries):
        inner = [_List(place, start, at + 1, tuple(entries), keys=True)]
    return inner, at + 1


def _items(text: str, start: int) -> Iterator[_Item]:
    at = _skip(text, start + 1)
    while text[at] != "]":
        value, stop = _VALUE.raw_decode(text, at)
        yield _Item(value, text[at:stop])
        at = _skip(text, stop)
        if text[at] == ",":
            at = _skip(text, at + 1)


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


@dataclass(frozen=True, slots=True)
class Text:
    """A text and its place; alone: whether it is a single value, neither in a list nor a key."""

    place: str
    text: str
    alone: bool = False


def quant_texts(document: Json, *, inside: bool) -> Iterator[Text]:
    """All texts that may name modules: values, and keys that are more than a word.

    inside: whether all of the document is about quantization.
    """
    yield from _texts(document, "", inside=inside)


def quant_methods(document: Json, *, inside: bool) -> dict[str, str]:
    """Each `quant_method` in lower case, by the place of its section."""
    return dict(_methods(document, "", inside=inside))


def _methods(value: Json, place: str, *, inside: bool) -> Iterator[tuple[str, str]]:
    if not isinstance(value, dict):
        return
    method = value.get("quant_method")
    if inside and isinstance(method, str):
        yield place, method.lower()
    for key, item in value.items():
        below = f"{place}.{key}" if place else key
        yield from _methods(item, below, inside=inside or key in QUANTIZATION)


def _texts(value: Json, place: str, *, inside: bool, alone: bool = True) -> Iterator[Text]:
    if isinstance(value, dict):
        for key, item in value.items():
            if inside and not key.replace("_", "").isalnum():
                yield Text(place, key)
            below = f"{place}.{key}" if place else key
            yield from _texts(item, below, inside=inside or key in QUANTIZATION)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, place, inside=inside, alone=False)
    elif inside and isinstance(value, str):
        yield Text(place, value, alone)
