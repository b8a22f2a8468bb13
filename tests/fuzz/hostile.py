"""Documents that cost most for their length: each of a length that is asked for, or near it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Final

import numpy as np
import torch

from tests.badinput.builders import framed
from tests.manifest.samples import PART, ROOT_BODY

Make = Callable[[int], bytes]


def _listed(unit: str, size: int, ends: str = "[]") -> bytes:
    """`unit`, with a number where it has a `%`, as often as fits."""
    count = max(1, size // (len(unit) + 1 + 4 * ("%" in unit)))
    units = (unit % n for n in range(count)) if "%" in unit else (unit for _ in range(count))
    return f"{ends[0]}{','.join(units)}{ends[1]}".encode()


def _long_key(size: int) -> bytes:
    """A key that stands in the place of everything below it."""
    below = _listed('"a%06d":0', size // 2, "{}").decode()
    return f'{{"{"k" * (size // 2)}":{below}}}'.encode()


_JSON: Final[dict[str, Make]] = {
    "integers": lambda size: _listed("0", size),
    "large integers": lambda size: _listed("999", size),
    "lists": lambda size: _listed("[]", size),
    "objects": lambda size: _listed("{}", size),
    "rows of one": lambda size: _listed("[0]", size),
    "objects of one": lambda size: _listed('{"a":0}', size),
    "texts": lambda size: _listed('"ab"', size),
    "keys": lambda size: _listed('"k%07d":0', size, "{}"),
    "a long key": _long_key,
    "depth": lambda size: b"[" * (size // 2) + b"]" * (size // 2),
}


def _member(doc: bytes, key: str) -> Callable[[bytes], bytes]:
    """The document with another value under one key."""
    marked = json.dumps({**json.loads(doc), key: "@@"}).encode()
    return lambda value: marked.replace(b'"@@"', value)


_HOSTS: Final[dict[tuple[str, str], Callable[[bytes], bytes]]] = {
    ("root-body", "stacks"): _member(ROOT_BODY, "stacks"),
    ("root-body", "sidecars"): _member(ROOT_BODY, "sidecars"),
    ("root-body", "requires"): _member(ROOT_BODY, "requires"),
    ("part", "tensors"): _member(PART, "tensors"),
    ("header", "itself"): framed,
    ("header", "dtype"): lambda doc: framed(
        b'{"a":{"dtype":' + doc + b',"shape":[],"data_offsets":[0,4]}}'
    ),
    ("index", "weight_map"): lambda doc: b'{"weight_map":' + doc + b"}",
    ("origin", "files"): lambda doc: b'{"files":' + doc + b',"index":null}\n',
    ("quantization-lists", "ignore"): lambda doc: (
        b'{"quantization_config":{"ignore":' + doc + b"}}"
    ),
    ("map-json", "itself"): lambda doc: doc,
    ("map-json", "initial_global_assignments"): lambda doc: (
        b'{"initial_global_assignments":' + doc + b"}"
    ),
    ("map-json", "layer_list"): lambda doc: b'{"layer_list":' + doc + b"}",
    ("map-yaml", "itself"): lambda doc: doc,
}


def _array(shape: tuple[int, ...], kind: str = "<i8") -> bytes:
    """The header of a `.npy` file, and nothing behind it."""
    head = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    head += b" " * (-(11 + len(head)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head


def _saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


class _Buffer:
    """What a pickle may make without running anybody's code, of any size."""

    def __reduce__(self) -> tuple[object, ...]:
        return bytearray, (50_000_000,)


def _rows(count: int, slots: int) -> torch.Tensor:
    return torch.empty((count, slots), dtype=torch.int64)


_OTHERS: Final[dict[tuple[str, str], Make]] = {
    ("map-npy", "empty rows"): lambda size: _array((100 * size, 0)),
    ("map-npy", "no rows"): lambda size: _array((0, 100 * size)),
    ("map-npy", "rows that are not there"): lambda size: _array((9_000, size)),
    ("map-npy", "bytes"): lambda size: _npy(np.zeros((1, size), dtype=np.uint8)),
    ("map-npy", "narrow rows"): lambda size: _npy(np.zeros((size, 1), dtype=np.uint8)),
    ("map-pt", "empty rows"): lambda size: _saved({"phy2log": _rows(100 * size, 0)}),
    ("map-pt", "a bare one"): lambda size: _saved(_rows(100 * size, 0)),
    ("map-pt", "no strides"): lambda size: _saved(_rows(1, 1).expand(size, 100 * size)),
    ("map-pt", "a buffer"): lambda _: _saved({"phy2log": _Buffer()}),
    ("map-pt", "empty lists"): lambda size: _saved([[] for _ in range(size // 8)]),
    ("map-yaml", "a column"): lambda size: b"a:\n" + b"- 0\n" * (size // 4),
    ("map-yaml", "anchors"): lambda size: _listed("&a%05d 0", size),
    ("map-yaml", "aliases"): lambda size: b"a: &a [0]\nb: " + _listed("*a", size),
    ("map-yaml", "keys"): lambda size: b"".join(b"k%07d: 0\n" % n for n in range(size // 12)),
    ("map-json", "a far expert"): lambda size: _listed("[999999]", size),
    ("recipe", "a dotted key"): lambda size: b"a" + b".a" * (size // 2) + b" = 1\n",
    ("recipe", "a quoted one"): lambda size: b'"\\""' + b'."\\""' * (size // 5) + b" = 1\n",
    ("recipe", "a dotted table"): lambda size: (
        b"[a" + b".a" * (size // 4) + b"]\n" + b"".join(b"k%d = 1\n" % n for n in range(size // 20))
    ),
    ("recipe", "keys of many parts"): lambda size: b"".join(
        b"a%05d" % n + b".a" * 14 + b" = 1\n" for n in range(size // 40)
    ),
    ("recipe", "tables"): lambda size: b"".join(b"[a%05d]\n" % n for n in range(size // 9)),
    ("recipe", "a long word"): lambda size: b"a" * size,
    ("recipe", "spaces"): lambda size: b"a" + b" " * size + b".b = 1\n",
    ("recipe", "patterns"): lambda size: b"stack = " + _listed('"{prefix}{layer}"', size),
    ("recipe", "components"): lambda size: b"".join(
        b'[components.c%05d]\naxes = "O K"\nsuffix = "%d"\n' % (n, n) for n in range(size // 50)
    ),
    ("index", "unsafe names"): lambda size: (
        b'{"weight_map":' + _listed('"t%07d":"../x"', size, "{}") + b"}"
    ),
    ("header", "small tensors"): lambda size: framed(
        _listed('"t%07d":{"dtype":"U8","shape":[],"data_offsets":[0,0]}', size, "{}")
    ),
}


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _within(host: Callable[[bytes], bytes], kind: Make) -> Make:
    return lambda size: host(kind(size))


HOSTILE: Final[dict[tuple[str, str], Make]] = {
    **{
        (target, f"{name} in {place}"): _within(host, kind)
        for (target, place), host in _HOSTS.items()
        for name, kind in _JSON.items()
    },
    **_OTHERS,
}
