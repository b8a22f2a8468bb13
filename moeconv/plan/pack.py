"""Assign planned tensors to files: in which order, at which offset, under which header.

FORMAT.md §3: shards by natural order of names; within a file page multiples first, then larger
dtypes, then natural order; data starts on a page. With `--align source` the source's order and
offsets decide instead (`align.py`). The file system never does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final

from moeconv.checkpoint.header import LENGTH_BYTES, MAX_HEADER_BYTES
from moeconv.core.dtypes import alignment
from moeconv.core.names import natural_key
from moeconv.core.strict_json import Json, dumps
from moeconv.errors import NameCollision, quoted
from moeconv.manifest.model import numbered
from moeconv.plan.align import (
    PAGE,
    PAGE_ALIGNED,
    by_source_position,
    file_phase,
    misplaced,
    source_position,
)
from moeconv.plan.copies import tiles_of
from moeconv.plan.model import OutputFile, OutputTensor, Tile
from moeconv.plan.tensors import PlannedTensor

METADATA: Final = {"format": "pt"}
# an entry's JSON beside name and shape: keys, dtype, two offsets of up to 16 digits
_ENTRY_BYTES: Final = 96
_BATCH: Final = 1000


@dataclass(frozen=True, slots=True)
class Packing:
    """How tensors are split into files: the largest size in bytes, and where data sections start.

    align: `page`, or `source` (see `align.py`).
    """

    max_shard_size: int
    align: str = PAGE_ALIGNED


def pack(
    planned_tensors: Iterable[PlannedTensor],
    packing: Packing,
    *,
    prefix: str = "model",
    rank: int | None = None,
) -> tuple[OutputFile, ...]:
    """Output files of at most the packing's size; a larger single tensor gets a file of its own.

    prefix: of their names; rank: whose they are, in an expert-parallel output.
    Raises NameCollision where two output tensors would have one name.
    """
    ordered = _natural(planned_tensors)
    _refuse_collisions(ordered)
    if packing.align == PAGE_ALIGNED:
        shards = [_ordered(shard) for shard in _filled(ordered, packing.max_shard_size)]
        phases = [0] * len(shards)
    else:
        positions = {d.name: source_position(d) for d in ordered}
        groups = by_source_position(ordered, positions)
        found = [shard for group in groups for shard in _filled(group, packing.max_shard_size)]
        shards = [_ordered(_natural(shard)) if misplaced(shard) else shard for shard in found]
        phases = [file_phase(shard, positions) for shard in shards]
    names = numbered(prefix, len(shards))
    out = [
        placed(shard, name, rank=rank, phase=phase)
        for name, shard, phase in zip(names, shards, phases, strict=True)
    ]
    return tuple(out)


def _filled(ordered: list[PlannedTensor], max_shard_size: int) -> list[list[PlannedTensor]]:
    """Cut into shards, in the order given."""
    shards: list[list[PlannedTensor]] = [[]]
    size = header = PAGE
    for planned in ordered:
        entry = _ENTRY_BYTES + len(json.dumps(planned.name)) + 8 * len(planned.shape)
        grown = header + entry
        too_large = size + planned.nbytes + entry > max_shard_size or grown > MAX_HEADER_BYTES
        if shards[-1] and too_large:
            shards.append([])
            size, grown = PAGE, PAGE + entry
        shards[-1].append(planned)
        size += planned.nbytes + entry
        header = grown
    return shards


def _refuse_collisions(ordered: list[PlannedTensor]) -> None:
    seen: dict[str, PlannedTensor] = {}
    for planned in ordered:
        if planned.name in seen:
            raise NameCollision(
                f"two tensors would both be called {quoted(planned.name)}",
                at=quoted(planned.name),
                cause="one is an expert tensor's new name, the other was there before",
                fix="choose another `--layout`",
            )
        seen[planned.name] = planned


def _natural(planned_tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    return sorted(planned_tensors, key=lambda d: natural_key(d.name))


def _ordered(shard: list[PlannedTensor]) -> list[PlannedTensor]:
    """Page multiples first, then larger dtypes; otherwise (the sort is stable) as given."""
    return sorted(shard, key=lambda d: (d.nbytes % PAGE != 0, -alignment(d.dtype)))


def placed(
    planned_tensors: list[PlannedTensor], name: str, *, rank: int | None = None, phase: int = 0
) -> OutputFile:
    """One output file, tensors in the order given; its data starts `phase` bytes into a page."""
    header = header_bytes(planned_tensors, phase)
    offsets = []
    at = len(header)
    for planned in planned_tensors:
        offsets.append(at)
        at += planned.nbytes
    places = list(zip(planned_tensors, offsets, strict=True))
    return output_file(name, header, places, size=at, rank=rank)


def output_file(
    name: str,
    header: bytes,
    places: list[tuple[PlannedTensor, int]],
    *,
    size: int,
    rank: int | None = None,
) -> OutputFile:
    """An output file from planned tensors at known offsets, in offset order."""
    tensors: list[OutputTensor] = []
    tiles: list[Tile] = []
    for planned, offset in places:
        expert = planned.expert
        units = 1 if expert is None else expert.units
        tiles += tiles_of(planned, tensor=len(tensors), offset=offset)
        tensors.append(
            OutputTensor(
                planned.name, planned.dtype, planned.shape, offset, planned.nbytes, units, expert
            )
        )
    return OutputFile(name, header, size, tuple(tensors), tuple(tiles), rank)


def header_bytes(planned_tensors: list[PlannedTensor], phase: int = 0) -> bytes:
    """Length and JSON, padded with spaces so that the data starts `phase` bytes into a page."""
    metadata: Json = {"__metadata__": dict(METADATA)}
    pieces = [_header_text(metadata)]
    at, rest = 0, iter(planned_tensors)
    while batch := list(islice(rest, _BATCH)):  # a million entries take a gigabyte as values
        doc: dict[str, Json] = {}
        for planned in batch:
            doc[planned.name] = {
                "dtype": planned.dtype,
                "shape": list(planned.shape),
                "data_offsets": [at, at + planned.nbytes],
            }
            at += planned.nbytes
        pieces.append(_header_text(doc))
    text = b"{" + b",".join(pieces) + b"}"
    text += b" " * ((phase - LENGTH_BYTES - len(text)) % PAGE)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _header_text(doc: Json) -> bytes:
    """The members of an object as a header has them, without its braces."""
    return json.dumps(doc, separators=(",", ":"), ensure_ascii=False).encode("utf-8")[1:-1]


def index_bytes(files: tuple[OutputFile, ...]) -> bytes:
    """`model.safetensors.index.json` with the true total_size."""
    total = sum(f.size - len(f.header) for f in files)
    return index_text({t.name: f.name for f in files for t in f.tensors}, total)


def index_text(files: dict[str, str], total_size: int) -> bytes:
    """The index of tensors in these files; total_size: of their data sections together."""
    weight_map: dict[str, Json] = {**files}
    return dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}) + b"\n"
