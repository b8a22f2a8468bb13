"""Lists of names in the quantization_config of a config.json, changed in place.

As text: everything else of the file keeps its bytes, whatever its spacing, floats or order. The
keys of an object are a list too, where they are names: each with its value. So is a text alone, of
which only one can come.
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
    """A text of a list and how it is written; of an object's keys, `rest` is colon and value."""

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
    alone: bool = False  # a text that stands for a list of one


def changed_lists(
    raw: bytes, change: Change, *, inside: bool = False
) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """`raw`, a valid JSON document, with its lists of names as `change` makes them.

    change: gets a list's place and its texts, and returns what stands in the place of each, or
    None to leave it. Keys are one list for each value. inside: whether all is about quantisation.
    Second, place and first text of those that are left, because new words would say another thing.
    """
    text = raw.decode("utf-8")
    pieces, at, left = [], 0, []
    for found in _walk(text, _skip(text, 0), "", inside=inside)[0]:
        try:
            new = _changed(found, change)
        except _AnotherThing:
            left.append((found.place, found.items[0].text))
            continue
        if new is not None:
            old = text[found.start : found.stop]
            pieces += [text[at : found.start], new[0] if found.alone else _like(old, new)]
            at = found.stop
    return "".join((*pieces, text[at:])).encode("utf-8"), tuple(left)


class _AnotherThing(Exception):
    """New names would say another thing, or can't be written there.

    A key would stand in one object with two values, or before one that it must not precede; a text
    alone would be several.
    """


def _changed(found: _List, change: Change) -> list[str] | None:
    """The items of a list as they are written from now on; None where it stays."""
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
        # the first that matches counts: only what all say alike can be said in other words
        signs = {item.text.startswith("-:") for item in found.items}
        if len(groups) > 1 or len(signs) > 1:
            raise _AnotherThing
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
                raise _AnotherThing
    if found.alone and len(out) != 1:
        raise _AnotherThing
    return out


def _walk(text: str, start: int, place: str, *, inside: bool) -> tuple[list[_List], int]:
    """Every list of texts below a quantization_config, in the order of the file, and the end."""
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
    # names have dots; where they are keys, no list of names is among the values
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
    """A list written with the spacing of another one."""
    lead = old[1 : _skip(old, 1)]
    tail = old[len(old[:-1].rstrip(_SPACE)) : -1]
    gap = lead if "\n" in lead else " "
    return f"{old[0]}{lead}{f',{gap}'.join(items)}{tail}{old[-1]}"


@dataclass(frozen=True, slots=True)
class Text:
    """A text and its place; alone: whether it is a value by itself, in no list, and no key."""

    place: str
    text: str
    alone: bool = False


def quant_texts(document: Json, *, inside: bool) -> Iterator[Text]:
    """Everything that may name modules: texts, and keys that are no words.

    inside: whether all of the document is about quantisation.
    """
    yield from _texts(document, "", inside=inside)


def quant_methods(document: Json, *, inside: bool) -> dict[str, str]:
    """Who quantised, by the place of the section that says it."""
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
