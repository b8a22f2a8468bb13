"""Read placement maps: JSON (a file, or the text itself), YAML, torch and NumPy files."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Final

from moeconv.core.strict_json import Json, loads
from moeconv.errors import BadPlacementFile, MoeconvError, TorchNeeded, UsageProblem, quoted
from moeconv.placement import base
from moeconv.placement.eplb import EPLB
from moeconv.placement.formats import FORMATS, parse_map
from moeconv.placement.vllm import VLLM
from moeconv.placement.yaml_value import yaml_value
from moeconv.store.documents import read_document
from moeconv.store.local import LocalFile

MAX_MAP_BYTES: Final = 16 * 1024 * 1024  # of a map for a thousand layers there is 1 MiB
_MAX_YAML_BYTES: Final = 4 * 1024 * 1024  # its reader is slow
_MAX_DEPTH: Final = 100
INLINE: Final = "inline JSON"


def read_map(which: str | Path) -> base.RawMap:
    """Read the map in a file, or in `which` itself if that begins like JSON.

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
            f"{quoted(text)} does not have the file extension of a placement map",
            cause=f"the file extensions are {', '.join(_READERS)}",
            fix="pass such a file, or the JSON text itself",
        )
    doc, bare = reader(read_document(LocalFile.at(path, name=path.name), MAX_MAP_BYTES), path.name)
    return parse_map(doc, where=path.name, bare=bare)


def _json(raw: bytes, name: str) -> tuple[Json, str]:
    return loads(raw, where=quoted(name)), VLLM


def _yaml(raw: bytes, name: str) -> tuple[Json, str]:
    with _foreign(name, "YAML"):
        if len(raw) > _MAX_YAML_BYTES:
            raise ValueError(
                f"it has {len(raw):,} bytes; YAML may have at most {_MAX_YAML_BYTES:,}"
            )
        return _Plain(len(raw) + 1).of(yaml_value(raw.decode("utf-8"))), VLLM


def _torch(raw: bytes, name: str) -> tuple[Json, str]:
    try:
        import torch
    except ImportError:
        raise TorchNeeded(
            f"reading {quoted(name)} needs torch",
            cause="torch is not installed",
            fix="`pip install 'moeconv[torch]'`, or pass the map as JSON",
        ) from None

    def plain(value: object) -> Json:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
                raise ValueError(f"a tensor of {value.dtype} holds no expert ids")
            # a stride of 0 would make a few bytes many numbers
            if value.numel() > len(raw):
                raise ValueError("a tensor has more values than the file has bytes")
            _check_shape(tuple(value.shape), "a tensor")
            value = value.tolist()
        return _Plain(len(raw) + 1).of(value)

    with _foreign(name, "torch"):
        _refuse_bomb(raw)
        doc: object = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        if not isinstance(doc, dict):
            return plain(doc), EPLB
        # the rest of a record is large, and only its names matter
        maps = {f.key for f in FORMATS.values() if f.in_torch_files}
        return {str(k): plain(v) if k in maps else None for k, v in doc.items()}, EPLB


def _refuse_bomb(raw: bytes) -> None:
    """Refuse files that unpack to gigabytes: a large zip archive, or a `bytearray` in a pickle."""
    pickles = [raw]
    if zipfile.is_zipfile(io.BytesIO(raw)):
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > 4 * MAX_MAP_BYTES:
                raise ValueError(f"it unpacks to {size:,} bytes")
            pickles = [archive.read(e) for e in archive.infolist() if e.filename.endswith(".pkl")]
    if any(b"bytearray" in text for text in pickles):
        raise ValueError("a bytearray is not allowed in a map")


def _numpy(raw: bytes, name: str) -> tuple[Json, str]:
    import numpy as np

    with _foreign(name, "NumPy"):
        stream = io.BytesIO(raw)
        heads = {(1, 0): np.lib.format.read_array_header_1_0}
        heads[2, 0] = np.lib.format.read_array_header_2_0
        is_array = raw.startswith(b"\x93NUMPY")
        head = heads.get(np.lib.format.read_magic(stream)) if is_array else None
        if head is None:
            raise ValueError("it is not one array of integers")
        shape, _, dtype = head(stream)
        if dtype.kind not in "iu":
            raise ValueError("it is not one array of integers")
        if len(shape) not in (1, 2):
            raise ValueError(f"it has {len(shape)} dimensions; a map has 1 or 2")
        _check_shape(shape, "the array")
        if prod(shape) * dtype.itemsize != len(raw) - stream.tell():
            raise ValueError(f"its header says {list(shape)}, which does not match the data")
        array: np.ndarray = np.load(io.BytesIO(raw), allow_pickle=False)
        return array.tolist(), EPLB


def _check_shape(shape: tuple[int, ...], what: str) -> None:
    """Refuse rows without slots, of which a few bytes can hold any number. Raises ValueError."""
    *rows, slots = shape or (1,)
    if not 0 < slots <= base.MAX_SLOTS:
        raise ValueError(f"{what} has rows of {slots:,} slots; 1 to {base.MAX_SLOTS:,} are allowed")
    if any(not 0 < count <= base.MAX_ROWS for count in rows):
        raise ValueError(f"{what} is of shape {list(shape)}; a map has 1 to {base.MAX_ROWS:,} rows")


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
    """Report whatever another library raises for a file as BadPlacementFile."""
    try:
        # a library must not write to our streams
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MoeconvError:
        raise
    except Exception as problem:  # noqa: BLE001 - these readers fail with any class at all
        text = str(problem).strip().partition("\n")[0] or type(problem).__name__
        raise BadPlacementFile(
            f"{quoted(name)} cannot be read as {reader}",
            at=quoted(name),
            cause=quoted(text[:300]),
            fix="write the file again, or pass the map as JSON",
        ) from None


class _Plain:
    """Converts decoded values to JSON values, at most `budget` of them.

    A document without aliases has fewer values than bytes; with them it can have any number.
    """

    def __init__(self, budget: int) -> None:
        self._left = budget

    def of(self, value: object, depth: int = 0) -> Json:
        """The value, with integer keys as strings. Raises ValueError."""
        self._left -= 1
        if self._left < 0:
            raise ValueError("its aliases repeat too many values")
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
        if isinstance(value, list | tuple):
            return [self.of(item, depth + 1) for item in value]
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} is not allowed in a map")
        out: dict[str, Json] = {}
        for key, item in value.items():
            if type(key) not in (int, str) or str(key) in out:
                raise ValueError(f"the key {quoted(str(key))} appears twice or is not an id")
            out[str(key)] = self.of(item, depth + 1)
        return out
