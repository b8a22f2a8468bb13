"""The origin: the first foreign source's raw headers, index and rewritten sidecars.

That is enough to rebuild its files.

Framing (FORMAT.md §5): one line of JSON, a newline, then the raw bytes it announces, in order.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moeconv.checkpoint.header import LENGTH_BYTES, Header, parse_header
from moeconv.checkpoint.index import Index, parse_index
from moeconv.core.schema import Problems, Table
from moeconv.core.strict_json import Json, dumps, loads
from moeconv.errors import BadManifest, quoted
from moeconv.manifest.model import ORIGIN_NAME


@dataclass(frozen=True, slots=True)
class OriginFile:
    """One original data file: its name, its size, its header."""

    name: str
    size: int
    header: Header


@dataclass(frozen=True, slots=True)
class Origin:
    """The first foreign source: data files in natural order, and its index if it had one.

    sidecars: the original bytes of those that were rewritten.
    """

    files: tuple[OriginFile, ...]
    index: Index | None
    sidecars: tuple[tuple[str, bytes], ...] = ()


def origin_of_taken(file: OriginFile) -> OriginFile:
    """A data file as if it had no tensors but those of its header, which are only some of them."""
    entries: dict[str, Json] = {}
    if file.header.metadata:
        entries["__metadata__"] = dict(file.header.metadata)
    end = 0
    for tensor in sorted(file.header.tensors, key=lambda t: (t.offset, t.nbytes)):
        start, end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = dumps(entries)
    text += b" " * (-len(text) % LENGTH_BYTES)
    raw = len(text).to_bytes(LENGTH_BYTES, "little") + text
    size = len(raw) + end
    return OriginFile(file.name, size, parse_header(raw, file_size=size, file=0, where=file.name))


def origin_bytes(origin: Origin) -> bytes:
    """The origin as one file."""
    files: list[Json] = [
        {"name": f.name, "size": f.size, "header": len(f.header.raw)} for f in origin.files
    ]
    index: Json = None
    if origin.index is not None:
        index = {"name": origin.index.name, "size": len(origin.index.raw)}
    doc: dict[str, Json] = {"files": files, "index": index}
    if origin.sidecars:
        doc["sidecars"] = [{"name": name, "size": len(raw)} for name, raw in origin.sidecars]
    raws = [f.header.raw for f in origin.files]
    raws += [origin.index.raw] if origin.index else []
    return b"".join((dumps(doc), b"\n", *raws, *(raw for _, raw in origin.sidecars)))


def parse_origin(raw: bytes) -> Origin:
    """The inverse of `origin_bytes`. Raises BadManifest, BadHeader, BadJson."""
    end = raw.find(b"\n")
    head, start = (raw, len(raw)) if end < 0 else (raw[:end], end + 1)
    problems = Problems()
    top = Table(loads(head, where=ORIGIN_NAME, floats=False), "", problems)
    named = [_file(t) for t in top.tables("files")]
    index = None
    if top.has("index"):
        entry = top.table("index")
        index = (entry.file_name("name"), entry.integer("size"))
        entry.finish()
    top.raw("index")
    entries = [_sidecar(t) for t in top.tables("sidecars")] if top.has("sidecars") else []
    top.finish()
    names = [name for name, *_ in named]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        problems.add("files", f"{quoted(twice)} appears twice")
    announced = sum(length for *_, length in named) + (index[1] if index else 0)
    announced += sum(size for _, size in entries)
    if announced != len(raw) - start:
        problems.add("", f"declares {announced:,} bytes, but has {len(raw) - start:,}")
    if problems.count:
        raise BadManifest(
            f"`{ORIGIN_NAME}` violates the rules of its format",
            at=f"`{ORIGIN_NAME}`",
            cause="; ".join(problems.shown()),
        )
    files, at = [], start
    for number, (name, size, length) in enumerate(named):
        header = parse_header(raw[at : at + length], file_size=size, file=number, where=name)
        files.append(OriginFile(name, size, header))
        at += length
    first = None
    if index:
        first = parse_index(raw[at : at + index[1]], name=index[0])
        at += index[1]
    sidecars = []
    for name, size in entries:
        sidecars.append((name, raw[at : at + size]))
        at += size
    return Origin(tuple(files), first, tuple(sidecars))


def _sidecar(t: Table) -> tuple[str, int]:
    entry = (t.relative_path("name"), t.integer("size"))
    t.finish()
    return entry


def _file(t: Table) -> tuple[str, int, int]:
    entry = (t.relative_path("name"), t.integer("size"), t.integer("header"))
    t.finish()
    return entry
