"""The safetensors header: 8 bytes of length, JSON, data; every rule is checked before use.

Source of the format: huggingface/safetensors, README "Format". Stricter than the reference
reader, which takes duplicate names, unknown members and leading spaces, and never names the file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from queue import SimpleQueue
from threading import Thread
from typing import Final, TypeAlias, TypeGuard

from moeconv.core.dtypes import BITS
from moeconv.core.signals import take_from
from moeconv.core.strict_json import Json, Pairs, encodable, loads_records, may_escape
from moeconv.errors import (
    BadHeader,
    HeaderTooLong,
    HoleBetweenTensors,
    OverlappingTensors,
    TrailingBytes,
    TruncatedFile,
    quoted,
)
from moeconv.store.base import File
from moeconv.store.documents import LFS_MARK, refuse_lfs
from moeconv.store.local import LocalFile

LENGTH_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 100_000_000
MAX_RANK: Final = 32
MAX_BITS: Final = 2**63 - 1
MAX_COUNT: Final = 2**53 - 1
MAX_NAME_BYTES: Final = 4096
_REQUESTS: Final = 8  # at once, to a server
_METADATA: Final = "__metadata__"
_KEYS: Final = frozenset(("dtype", "shape", "data_offsets"))
# one object for each dtype, however many tensors name it
_DTYPES: Final = {dtype: dtype for dtype in BITS}
_SHAPE_RULE: Final = f"`shape` must be at most {MAX_RANK} non-negative integers"
_Entry: TypeAlias = tuple[str, tuple[int, ...], int, int]  # dtype, shape, data_offsets


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as a file holds it; `offset` counts bytes from the start of file `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: `raw` is the length and the JSON exactly as stored, 8 + N bytes."""

    raw: bytes
    metadata: tuple[tuple[str, str], ...]
    tensors: tuple[StoredTensor, ...]  # in header order
    whole: bool = True  # False where only some of the file's tensors are taken

    @property
    def data_start(self) -> int:
        """First byte of the data section."""
        return len(self.raw)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def only(self, names: Collection[str]) -> Header:
        """The same header with these tensors alone; `raw` is still the file's."""
        taken = tuple(t for t in self.tensors if t.name in names)
        return replace(self, tensors=taken, whole=len(taken) == len(self.tensors))


def read_header(file: File, *, number: int) -> Header:
    """Read and check one shard's header; `number` is that of the shard in its checkpoint.

    Raises BadHeader or one of its classes, LfsPointer, IoFailed.
    """
    start = file.read(0, min(file.size, max(LENGTH_BYTES, len(LFS_MARK))))
    refuse_lfs(start, file.name)
    length = header_length(start, file_size=file.size, where=file.name)
    raw = file.read(0, LENGTH_BYTES + length)
    return parse_header(raw, file_size=file.size, file=number, where=file.name)


def read_headers(files: Sequence[File]) -> Iterator[Header]:
    """The headers of all shards of a checkpoint; those of files elsewhere are fetched in parallel.

    Raises as `read_header`, for the first file that has a problem.
    """
    if all(isinstance(file, LocalFile) for file in files):
        for number, file in enumerate(files):
            yield read_header(file, number=number)
        return
    waiting = deque(enumerate(files))
    arriving: SimpleQueue[tuple[int, Header | Exception]] = SimpleQueue()

    def fetch() -> None:
        while waiting:
            try:
                number, file = waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                arriving.put((number, read_header(file, number=number)))
            except Exception as problem:  # noqa: BLE001 - it is raised where the header is wanted
                arriving.put((number, problem))

    # not a pool: at an interrupt it would wait for a server that does not answer
    for _ in range(min(_REQUESTS, len(files))):
        Thread(target=fetch, daemon=True).start()
    arrived: dict[int, Header | Exception] = {}
    try:
        for number in range(len(files)):
            while number not in arrived:
                arrived |= [take_from(arriving)]
            found = arrived.pop(number)
            if isinstance(found, Exception):
                raise found
            yield found
    finally:
        waiting.clear()


def header_length(start: bytes, *, file_size: int, where: str) -> int:
    """The N of the first eight bytes, checked against the file and the format's limit."""
    if len(start) < LENGTH_BYTES:
        raise TruncatedFile(
            f"{quoted(where)} is too short to be a safetensors file",
            at=quoted(where),
            cause=f"it has {file_size} bytes; the length field alone takes {LENGTH_BYTES}",
        )
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    limit = min(MAX_HEADER_BYTES, file_size - LENGTH_BYTES)
    if length > limit:
        raise HeaderTooLong(
            f"the header of {quoted(where)} claims to be {length:,} bytes long",
            at=quoted(where),
            cause=f"the file has {file_size:,} bytes; a header may have at most "
            f"{MAX_HEADER_BYTES:,}",
        )
    return length


def parse_header(raw: bytes, *, file_size: int, file: int, where: str) -> Header:
    """Check and parse the 8 + N header bytes of a file of `file_size` bytes."""
    if header_length(raw, file_size=file_size, where=where) != len(raw) - LENGTH_BYTES:
        raise _bad(where, "its header is not as long as its first eight bytes say")
    if raw[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
        raise _bad(where, "its header does not start with `{`")
    doc = loads_records(
        raw,
        where=f"header of {quoted(where)}",
        record=_Entries().short,
        start=LENGTH_BYTES,
    )
    if not isinstance(doc, dict):
        raise _bad(where, "its header is not a JSON object")
    metadata = _metadata(doc.pop(_METADATA, {}), where)
    start, escaped = len(raw), may_escape(raw)
    tensors = tuple(
        _tensor(name, entry, where=where, file=file, data_start=start, escaped=escaped)
        for name, entry in doc.items()
    )
    _check_cover(tensors, data_start=start, file_size=file_size, where=where)
    return Header(raw=raw, metadata=metadata, tensors=tensors)


class _Entries:
    """Makes the short form of tensors' entries: headers have a million of them and few shapes."""

    def __init__(self) -> None:
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def short(self, pairs: Pairs) -> _Entry | None:
        """An entry of the right form; None for any other object, to be looked at with its name."""
        entry = dict(pairs)
        if entry.keys() != _KEYS or len(pairs) != len(_KEYS):
            return None
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        known = _DTYPES.get(dtype) if isinstance(dtype, str) else None
        if known is None or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            return None
        sizes = tuple(shape)
        return known, self._shapes.setdefault(sizes, sizes), offsets[0], offsets[1]


def _metadata(entry: _Entry | Json, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
        raise _bad(where, "`__metadata__` must map strings to strings")
    return tuple((key, str(value)) for key, value in entry.items())


def _bad(where: str, cause: str, *, tensor: str | None = None) -> BadHeader:
    return BadHeader(
        f"the header of {quoted(where)} violates the safetensors format",
        at=_place(where, tensor),
        cause=cause,
    )


def _place(where: str, tensor: str | None) -> str:
    return quoted(where) if tensor is None else f"{quoted(where)}, tensor {quoted(tensor)}"


def _are_sizes(value: Json) -> TypeGuard[list[int]]:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110 - a generator would cost as much as all the rest
        if type(item) is not int or item < 0:
            return False
    return True


def _tensor(
    name: str, entry: _Entry | Json, *, where: str, file: int, data_start: int, escaped: bool
) -> StoredTensor:
    if not isinstance(entry, tuple):
        raise _bad(where, _entry_problem(entry), tensor=name)
    dtype, shape, begin, end = entry
    if escaped and not encodable(name):
        raise _bad(where, "the name contains a lone surrogate", tensor=name)
    if len(name) > MAX_NAME_BYTES // 4 and len(name.encode()) > MAX_NAME_BYTES:
        raise _bad(where, f"the name is longer than {MAX_NAME_BYTES:,} bytes", tensor=name[:100])
    if len(shape) > MAX_RANK:
        raise _bad(where, _SHAPE_RULE, tensor=name)
    nbytes = _nbytes(shape, dtype, where, name)
    if max(shape, default=0) > MAX_COUNT:
        raise _bad(where, "a dimension exceeds 2^53-1", tensor=name)
    if end - begin != nbytes:
        cause = f"{dtype} {list(shape)} takes {nbytes:,} bytes, its offsets span {end - begin:,}"
        raise _bad(where, cause, tensor=name)
    return StoredTensor(name, dtype, shape, file, data_start + begin, nbytes)


def _entry_problem(entry: Json) -> str:
    """Why an entry is not of the right form."""
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        return "an entry must have `dtype`, `shape` and `data_offsets`, nothing else"
    dtype = entry["dtype"]
    if not isinstance(dtype, str):
        return "`dtype` must be a string"
    if dtype not in BITS:
        return f"unknown dtype {quoted(dtype)}"
    if not _are_sizes(entry["shape"]):
        return _SHAPE_RULE
    return "`data_offsets` must be two non-negative integers"


def _nbytes(shape: tuple[int, ...], dtype: str, where: str, name: str) -> int:
    bits = BITS[dtype]
    for size in shape:
        bits *= size
        if bits > MAX_BITS:
            raise _bad(where, "its size overflows 63 bits", tensor=name)
    if bits % 8:
        raise _bad(where, f"{dtype} {list(shape)} is not a whole number of bytes", tensor=name)
    return bits // 8


def _check_cover(
    tensors: tuple[StoredTensor, ...], *, data_start: int, file_size: int, where: str
) -> None:
    ordered = sorted(tensors, key=lambda t: (t.offset, t.nbytes))
    if ordered and ordered[0].offset != data_start:
        _refuse_gap(where, ordered[0], data_start)
    for before, after in pairwise(ordered):
        if after.offset != before.offset + before.nbytes:
            _refuse_gap(where, after, before.offset + before.nbytes)
    end = ordered[-1].offset + ordered[-1].nbytes if ordered else data_start
    if end > file_size:
        culprit = next(t for t in ordered if t.offset + t.nbytes > file_size)
        raise TruncatedFile(
            f"{quoted(where)} is shorter than its header says",
            at=_place(where, culprit.name),
            cause=f"the file ends at byte {file_size:,}; its header needs {end:,} bytes",
        )
    if end < file_size:
        raise TrailingBytes(
            f"{quoted(where)} is longer than its header says",
            at=quoted(where),
            cause=f"{file_size - end:,} bytes after the last tensor belong to no tensor",
        )


def _refuse_gap(where: str, tensor: StoredTensor, expected: int) -> None:
    kind = OverlappingTensors if tensor.offset < expected else HoleBetweenTensors
    what = "overlaps the tensor before it" if tensor.offset < expected else "leaves a gap before it"
    raise kind(
        f"{quoted(tensor.name)} {what}",
        at=_place(where, tensor.name),
        cause=f"it starts at byte {tensor.offset:,} of the file, not at {expected:,}",
    )
