"""All texts that a document says about quantisation, wherever they stand, and who quantised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moeconv.checkpoint.config import QUANTIZATION
from moeconv.core.json_value import Json


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
