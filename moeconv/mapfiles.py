"""Placement maps from files: JSON (a file, or the text itself), YAML, torch and NumPy."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from moeconv.checkpoint.reading import read_document
from moeconv.errors import BadPlacementFile, MoeconvError, TorchNeeded, UsageProblem, quoted
from moeconv.jsonvalue import Json
from moeconv.placement.documents import EPLB, EPLB_KEY, SGLANG_KEY, VLLM, RawMap, parse_map
from moeconv.strictjson import loads

MAX_MAP_BYTES: Final = 16 * 1024 * 1024  # of a map for a thousand layers there is 1 MiB
INLINE: Final = "inline JSON"
_DECIMAL: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,17})", re.ASCII)


def read_map(which: str | Path) -> RawMap:
    """The map in a file, or in `which` itself where that begins as JSON does.

    Raises BadPlacementFile, BadJson, DuplicateKey, UsageProblem, TorchNeeded, IoFailed.
    """
    text = str(which)
    if isinstance(which, str) and text.lstrip()[:1] in ("{", "["):
        raw = text.encode("utf-8", "surrogateescape")
        return parse_map(loads(raw, where=INLINE), where=INLINE)
    path = Path(which)
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise UsageProblem(
            f"{quoted(text)} has no ending of a placement map",
            cause=f"the endings are {', '.join(_READERS)}",
            fix="name such a file, or give the JSON itself",
        )
    doc, bare = reader(read_document(path, MAX_MAP_BYTES, name=path.name), path.name)
    return parse_map(doc, where=path.name, bare=bare)


def _json(raw: bytes, name: str) -> tuple[Json, str]:
    return loads(raw, where=quoted(name)), VLLM


def _yaml(raw: bytes, name: str) -> tuple[Json, str]:
    import yaml

    loader: type[yaml.SafeLoader] = type(
        "_Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {}
    )

    def mapping(self: yaml.SafeLoader, node: yaml.MappingNode) -> dict[object, object]:
        out: dict[object, object] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in out:
                raise ValueError(f"the key {quoted(str(key))} stands twice")
            out[key] = self.construct_object(value_node, deep=True)
        return out

    def integer(self: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
        # YAML 1.1 reads 1:0 as sixty and 010 as eight; nobody who writes a map means that
        if not _DECIMAL.fullmatch(node.value):
            raise ValueError(f"{quoted(node.value)} is no plain decimal number")
        return int(node.value)

    loader.add_constructor("tag:yaml.org,2002:map", mapping)
    loader.add_constructor("tag:yaml.org,2002:int", integer)
    with _foreign(name, "YAML"):
        doc: object = yaml.load(raw.decode("utf-8"), Loader=loader)  # noqa: S506 - a safe loader
        return _Plain(len(raw) + 1).of(doc), VLLM


def _torch(raw: bytes, name: str) -> tuple[Json, str]:
    try:
        import torch
    except ImportError:
        raise TorchNeeded(
            f"only torch can read {quoted(name)}",
            cause="torch is not installed",
            fix="`pip install 'moeconv[torch]'`, or give the map as JSON",
        ) from None

    def plain(value: object) -> Json:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
                raise ValueError(f"a tensor of {value.dtype} holds no expert ids")
            # a stride of 0 would make a few bytes many numbers
            if value.numel() > len(raw):
                raise ValueError("a tensor has more numbers than the file has bytes")
            value = value.tolist()
        return _Plain(len(raw) + 1).of(value)

    with _foreign(name, "torch"):
        _refuse_bomb(raw)
        doc: object = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        if not isinstance(doc, dict):
            return plain(doc), EPLB
        maps = (SGLANG_KEY, EPLB_KEY)  # the rest of a record is large, and only its names matter
        return {str(k): plain(v) if k in maps else None for k, v in doc.items()}, EPLB


def _refuse_bomb(raw: bytes) -> None:
    """torch files are zip archives, and a few bytes of one can be gigabytes."""
    if zipfile.is_zipfile(io.BytesIO(raw)):
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > 4 * MAX_MAP_BYTES:
            raise ValueError(f"it unpacks to {size:,} bytes")


def _numpy(raw: bytes, name: str) -> tuple[Json, str]:
    import numpy as np

    with _foreign(name, "NumPy"):
        array: object = np.load(io.BytesIO(raw), allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
            raise ValueError("it is not one array of integers")
        if array.ndim not in (1, 2):
            raise ValueError(f"it has {array.ndim} dimensions; a map has 1 or 2")
        return array.tolist(), EPLB


_READERS: Final[dict[str, Callable[[bytes, str], tuple[Json, str]]]] = {
    ".json": _json,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".pt": _torch,
    ".pth": _torch,
    ".npy": _numpy,
}


@contextmanager
def _foreign(name: str, reader: str) -> Iterator[None]:
    """Whatever another library says about a file is our own error."""
    try:
        # a library must not talk about the file on our streams
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MoeconvError:
        raise
    except Exception as problem:  # noqa: BLE001 - these readers fail with any class at all
        told = str(problem).strip().partition("\n")[0] or type(problem).__name__
        raise BadPlacementFile(
            f"{quoted(name)} cannot be read as {reader}",
            at=quoted(name),
            cause=quoted(told[:300]),
            fix="make the file again, or give the map as JSON",
        ) from None


class _Plain:
    """Turns decoded values into those of JSON, at most `budget` of them.

    A document without aliases has fewer values than bytes; with them it can have any number.
    """

    def __init__(self, budget: int) -> None:
        self._left = budget

    def of(self, value: object) -> Json:
        """The value, with integer keys as texts. Raises ValueError."""
        self._left -= 1
        if self._left < 0:
            raise ValueError("it repeats itself by aliases")
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list | tuple):
            return [self.of(item) for item in value]
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} has no place in a map")
        out: dict[str, Json] = {}
        for key, item in value.items():
            if type(key) not in (int, str) or str(key) in out:
                raise ValueError(f"the key {quoted(str(key))} stands twice or is no id")
            out[str(key)] = self.of(item)
        return out
