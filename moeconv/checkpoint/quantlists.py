"""Lists of names in the quantization_config of a config.json, changed in place.

As text: everything else of the file keeps its bytes, whatever its spacing, floats or order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Final

_SECTIONS: Final = frozenset({"quantization_config", "compression_config"})
_EXPERTS: Final = re.compile(r"(?<!shared_)(?<!shared)experts")
_WORD: Final = re.compile(r"\w+")  # part of a name, which stays true of the new names
_SPACE: Final = " \t\r\n"
_VALUE = json.JSONDecoder()


def changed_lists(
    raw: bytes, change: Callable[[str, tuple[str, ...]], tuple[str, ...] | None]
) -> bytes:
    """`raw`, a valid JSON document, with its lists of names as `change` makes them.

    change: gets a list's place and its texts, and returns new ones, or None to leave it.
    """
    text = raw.decode("utf-8")
    pieces, at = [], 0
    for place, start, stop, texts in _lists(text):
        new = change(place, texts)
        if new is not None:
            pieces += [text[at:start], _like(text[start:stop], new)]
            at = stop
    return "".join((*pieces, text[at:])).encode("utf-8")


def expert_patterns(raw: bytes, *, inside: bool) -> Iterator[tuple[str, str]]:
    """Place and text of everything that names experts: module names, regular expressions, globs.

    raw: a valid JSON document; inside: whether all of it is about quantisation.
    """
    yield from _patterns(json.loads(raw), "", inside=inside)


def _patterns(value: object, place: str, *, inside: bool) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if inside and _names_experts(key):
                yield place, key
                continue
            below = f"{place}.{key}" if place else key
            yield from _patterns(item, below, inside=inside or key in _SECTIONS)
    elif isinstance(value, list):
        for item in value:
            yield from _patterns(item, place, inside=inside)
    elif inside and isinstance(value, str) and _names_experts(value):
        yield place, value


def _names_experts(text: str) -> bool:
    return bool(_EXPERTS.search(text)) and not _WORD.fullmatch(text)


def _lists(text: str) -> Iterator[tuple[str, int, int, tuple[str, ...]]]:
    """Place, span and texts of every list of texts below a quantization_config."""
    yield from _walk(text, _skip(text, 0), "", inside=False)


def _walk(
    text: str, start: int, place: str, *, inside: bool
) -> Iterator[tuple[str, int, int, tuple[str, ...]]]:
    if text[start] == "[" and inside:
        value, stop = _VALUE.raw_decode(text, start)
        if value and all(isinstance(item, str) for item in value):
            yield place, start, stop, tuple(value)
    if text[start] != "{":
        return
    at = _skip(text, start + 1)
    while text[at] != "}":
        key, at = _VALUE.raw_decode(text, at)
        begin = _skip(text, _skip(text, at) + 1)
        below = f"{place}.{key}" if place else key
        yield from _walk(text, begin, below, inside=inside or key in _SECTIONS)
        at = _skip(text, _VALUE.raw_decode(text, begin)[1])
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    while text[at] in _SPACE:
        at += 1
    return at


def _like(old: str, new: tuple[str, ...]) -> str:
    """A list written with the spacing of another one."""
    lead = old[1 : _skip(old, 1)]
    tail = old[len(old[:-1].rstrip(_SPACE)) : -1]
    gap = lead if "\n" in lead else " "
    return f"[{lead}{f',{gap}'.join(map(json.dumps, new))}{tail}]"
