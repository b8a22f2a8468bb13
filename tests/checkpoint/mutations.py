"""Valid bytes with one or more things wrong: values, keys and shapes of JSON, or plain bytes."""

import copy
import json
from typing import Final

from hypothesis import strategies as st

ODD_VALUES: Final[tuple[object, ...]] = (
    None, True, False, 0, -1, 1, 2, 255, 2**31, 2**53, 2**60, 2**63 - 1, 2**63, 10**19, 0.5, 1e300,
    "", " ", "x", "..", "../x", "/etc/passwd", "a/b", "a\\b", "\0", "\n", "\x1b[2J", "\ud800", "é",
    "0" * 32, "F" * 32, "9" * 5000, "F4", "F6_E2M3", "U8", "E O K", "E (G O) K", "con",
    [], [0], [0, 0], [1, 0], [-1], [2**60, 2**60], [[]], [None], ["a", "a"], {}, {"a": 1}, {"": ""},
)  # fmt: skip


def _places(doc: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """The path of every value in a document."""
    found = [path]
    if isinstance(doc, dict):
        for key, value in doc.items():
            found += _places(value, (*path, key))
    elif isinstance(doc, list):
        for number, value in enumerate(doc):
            found += _places(value, (*path, number))
    return found


def _odd(draw: st.DrawFn) -> object:
    # a copy: later steps may change it in place
    return copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))


def _mutated(doc: object, draw: st.DrawFn) -> object:
    path = draw(st.sampled_from(_places(doc)))
    if not path:
        return _odd(draw)
    holder: object = doc
    for step in path[:-1]:
        holder = holder[step]  # type: ignore[index]
    if isinstance(holder, dict):
        key = path[-1]
        act = draw(st.sampled_from(["change", "remove", "rename", "add"]))
        if act == "change":
            holder[key] = _odd(draw)
        elif act == "remove":
            del holder[key]
        elif act == "rename":
            holder[draw(st.text(max_size=3))] = holder.pop(key)
        else:
            holder[draw(st.sampled_from(["x-y", "x", "\x1b", "\ud800"]))] = 1
    elif isinstance(holder, list):
        at = int(str(path[-1]))
        act = draw(st.sampled_from(["change", "remove", "repeat", "swap"]))
        if act == "change":
            holder[at] = _odd(draw)
        elif act == "remove":
            del holder[at]
        elif act == "repeat":
            holder.insert(at, copy.deepcopy(holder[at]))
        else:
            holder.reverse()
    return doc


@st.composite
def documents(draw: st.DrawFn, valid: bytes) -> bytes:
    """A JSON document with one to three of its values, keys or items changed."""
    doc: object = json.loads(valid)
    for _ in range(draw(st.integers(1, 3))):
        doc = _mutated(doc, draw)
    return json.dumps(doc).encode()


@st.composite
def flipped(draw: st.DrawFn, valid: bytes) -> bytes:
    """Bytes with one to four stretches overwritten, cut out, doubled or stuffed."""
    raw = valid
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        stop = min(len(raw), start + draw(st.integers(0, 8)))
        act = draw(st.sampled_from(["cut", "double", "stuff", "flip"]))
        if act == "cut":
            raw = raw[:start] + raw[stop:]
        elif act == "double":
            raw = raw[:stop] + raw[start:]
        elif act == "stuff":
            raw = raw[:start] + draw(st.binary(max_size=6)) + raw[stop:]
        elif start < len(raw):
            bit = 1 << draw(st.integers(0, 7))
            raw = raw[:start] + bytes([raw[start] ^ bit]) + raw[start + 1 :]
    return raw


def broken(valid: bytes) -> st.SearchStrategy[bytes]:
    """Either kind of damage to a JSON document."""
    return st.one_of(documents(valid), flipped(valid))
