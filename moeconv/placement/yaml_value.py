"""Parse YAML into plain values event by event, without a node graph, duplicate keys or octals."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from moeconv.errors import quoted

if TYPE_CHECKING:
    import yaml

MAX_DEPTH: Final = 100
_DECIMAL: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,17})", re.ASCII)
_WORDS: Final = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
_TAG: Final = "tag:yaml.org,2002:"


def yaml_value(text: str) -> object:
    """The value of one YAML document: dicts, lists, strings, integers, booleans, None.

    Values that aliases name are shared, not copied. Raises ValueError, yaml.YAMLError.
    """
    import yaml

    return _Reader(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))).all()


class _Reader:
    """Builds values from events. A node of PyYAML takes 500 bytes for each number of a row."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        import yaml

        self._yaml = yaml
        self._events = events
        self._resolve: Callable[..., object] = yaml.resolver.Resolver().resolve
        self._anchors: dict[str, object] = {}

    def all(self) -> object:
        """The one document of the stream; nothing at all is None."""
        found: list[object] = []
        for event in self._events:
            if isinstance(event, self._yaml.DocumentStartEvent):
                if found:
                    raise ValueError("it has more than one document")
                found.append(self._value(next(self._events), 0))
        return found[0] if found else None

    def _value(self, event: yaml.Event, depth: int) -> object:
        if isinstance(event, self._yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise ValueError(
                    f"the alias {quoted(str(event.anchor))} refers to nothing before it"
                )
            return self._anchors[event.anchor]
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        kinds = (self._yaml.ScalarEvent, self._yaml.CollectionStartEvent)
        if not isinstance(event, kinds):
            raise ValueError("a value is missing")
        value = self._new(event, depth)
        if event.anchor is not None:
            # registered last: a value that contains itself has no end
            self._anchors[event.anchor] = value
        return value

    def _new(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent, depth: int) -> object:
        if isinstance(event, self._yaml.ScalarEvent):
            return self._scalar(event)
        kind = "seq" if isinstance(event, self._yaml.SequenceStartEvent) else "map"
        if event.tag not in {None, "!", _TAG + kind}:
            raise ValueError(f"{quoted(str(event.tag))} is not allowed in a map")
        return self._items(depth) if kind == "seq" else self._members(depth)

    def _items(self, depth: int) -> list[object]:
        out = []
        while not isinstance(event := next(self._events), self._yaml.SequenceEndEvent):
            out.append(self._value(event, depth + 1))
        return out

    def _members(self, depth: int) -> dict[object, object]:
        out: dict[object, object] = {}
        while not isinstance(event := next(self._events), self._yaml.MappingEndEvent):
            key = self._value(event, depth + 1)
            if not isinstance(key, int | str) or isinstance(key, bool):
                raise ValueError("a key is neither a string nor an id")
            if key in out:
                raise ValueError(f"the key {quoted(str(key))} appears twice")
            out[key] = self._value(next(self._events), depth + 1)
        return out

    def _scalar(self, event: yaml.ScalarEvent) -> object:
        text, tag = event.value, str(event.tag or "!")
        if tag == "!":
            tag = str(self._resolve(self._yaml.ScalarNode, text, event.implicit))
        if tag == f"{_TAG}str":
            return text
        if tag == f"{_TAG}int":
            # YAML 1.1 reads 1:0 as sixty and 010 as eight; no writer of a map means that
            if not _DECIMAL.fullmatch(text):
                raise ValueError(f"{quoted(text)} is not a plain decimal number")
            return int(text)
        if tag == f"{_TAG}null":
            return None
        if tag == f"{_TAG}bool" and text.lower() in _WORDS:
            return _WORDS[text.lower()]
        kind = {"float": "a float", "timestamp": "a date"}.get(tag.removeprefix(_TAG), quoted(tag))
        raise ValueError(f"{kind} is not allowed in a map: {quoted(text[:40])}")
