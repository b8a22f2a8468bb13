"""Write `moeconv.json` and its parts as bytes (see FORMAT.md)."""

from __future__ import annotations

from io import BytesIO
from typing import BinaryIO

from moeconv.core.digest import digest
from moeconv.core.strict_json import Json, dumps, write_items
from moeconv.manifest.model import (
    FORMAT,
    MAJOR,
    MINOR,
    ExpertEntry,
    FileEntry,
    Part,
    Root,
    SourceEntry,
    StackEntry,
    TensorEntry,
)


def _file_doc(entry: FileEntry) -> Json:
    return {"name": entry.name, "size": entry.size, "digest": entry.digest}


def _stack_doc(s: StackEntry) -> Json:
    doc: dict[str, Json] = {
        "name": s.name,
        "recipe": s.recipe,
        "layout": s.layout,
        "origin_layout": s.origin_layout,
        "experts": s.experts,
        "width": s.width,
        "hidden": s.hidden,
    }
    if s.physical_to_logical is not None:
        doc["physical_to_logical"] = list(s.physical_to_logical)
    return doc


def _source_doc(source: SourceEntry) -> Json:
    files: list[Json] = [
        {
            "name": f.name,
            "size": f.size,
            # two numbers: nanoseconds since 1970 do not fit the format's integers
            "mtime": list(divmod(f.mtime_ns, 10**9)),
            "header": {"size": f.header_size, "digest": f.header_digest},
        }
        for f in source.files
    ]
    return {"directory": source.directory, "files": files}


def root_bytes(root: Root) -> bytes:
    """Body, newline, digest of the body, newline."""
    doc: dict[str, Json] = {
        "format": FORMAT,
        "version": {"major": MAJOR, "minor": MINOR},
        "requires": list(root.requires),
        "generator": root.generator,
        "recipes": [{"name": r.name, "toml": r.toml} for r in root.recipes],
        "stacks": [_stack_doc(s) for s in root.stacks],
        "parts": [_file_doc(p) for p in root.parts],
        "index": None if root.index is None else _file_doc(root.index),
        "origin": _file_doc(root.origin),
        "sidecars": [_file_doc(s) for s in root.sidecars],
        "totals": {"tensors": root.tensor_count, "bytes": root.tensor_bytes},
        "fingerprint": root.fingerprint,
    }
    if root.ep_size is not None:
        doc["sharding"] = {"ep_size": root.ep_size}
    if root.source is not None:
        doc["source"] = _source_doc(root.source)
    body = dumps(doc)
    return body + b"\n" + digest(body).encode() + b"\n"


def _expert_doc(expert: ExpertEntry) -> Json:
    doc: dict[str, Json] = {
        "stack": expert.stack,
        "projections": list(expert.projections),
        "component": expert.component,
        "axes": expert.axes,
        "matrix": list(expert.matrix),
    }
    if expert.slots is None:
        doc["experts"] = [expert.experts[0], expert.experts[-1] + 1]
    else:
        doc["slots"] = list(expert.slots)
    if expert.local is not None:
        doc["local"] = expert.local
    return doc


def _tensor_doc(t: TensorEntry, *, virtual: bool) -> Json:
    doc: dict[str, Json] = {
        "name": t.name,
        "dtype": t.dtype,
        "shape": list(t.shape),
        "digests": list(t.digests),
    }
    if virtual:
        doc["runs"] = [[r.file, r.offset, r.nbytes] for r in t.runs]
    else:
        doc |= {"start": t.start, "stop": t.stop}
    if t.expert is not None:
        doc["expert"] = _expert_doc(t.expert)
    return doc


def _write_part(stream: BinaryIO, part: Part) -> None:
    doc: Json = {
        "file": part.file,
        "size": part.size,
        "header": {"size": part.header_size, "digest": part.header_digest},
        "tensors": [],
    }
    stream.write(dumps(doc).removesuffix(b"]}"))  # keys are sorted, so the tensors come last
    write_items(stream, (_tensor_doc(t, virtual=False) for t in part.tensors))
    stream.write(b"]}")


def part_bytes(part: Part) -> bytes:
    """The part of a whole output's data file: canonical JSON and a newline."""
    stream = BytesIO()
    _write_part(stream, part)
    stream.write(b"\n")
    return stream.getvalue()


def rank_part_bytes(rank: int | None, parts: tuple[Part, ...]) -> bytes:
    """The part of a rank (or, for None, of the common files): canonical JSON and a newline."""
    stream = BytesIO()
    stream.write(b'{"files":[')
    for number, part in enumerate(p for p in parts if p.file):
        stream.write(b"," if number else b"")
        _write_part(stream, part)
    stream.write(b'],"rank":' + dumps(rank))
    virtual = [t for p in parts if not p.file for t in p.tensors]
    if virtual:
        stream.write(b',"virtual":[')
        write_items(stream, (_tensor_doc(t, virtual=True) for t in virtual))
        stream.write(b"]")
    stream.write(b"}\n")
    return stream.getvalue()
