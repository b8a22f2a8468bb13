"""The strict reader of an output's parts: tensors, their places and experts (see FORMAT.md)."""

from __future__ import annotations

import re
import sys
from collections import Counter
from functools import lru_cache
from typing import Final

from moeconv.core.names import slot_namer
from moeconv.core.schema import MAX_LISTED, Problems, Refused, Table, is_digest, is_dtype
from moeconv.core.strict_json import Pairs, loads_records
from moeconv.errors import quoted
from moeconv.manifest.model import (
    MINOR,
    ExpertEntry,
    Part,
    Root,
    Run,
    TensorEntry,
    files_name,
    numbered,
    rank_part,
    units_of,
)
from moeconv.manifest.reader import refuse

_OF_TENSORS: Final = frozenset(("name", "dtype", "shape", "digests"))
_RANK: Final = re.compile(r"/rank-([0-9]{1,9})-of-")
_MAX_SHARED: Final = 8
_FEW: Final = 64  # experts that a tensor may name whatever its digests


def parse_parts(raw: bytes, root: Root, *, where: str) -> tuple[Part, ...]:
    """The data files that one part describes: one in a whole output, otherwise those of a rank.

    Raises BadManifest, BadJson, DuplicateKey.
    """
    if root.ep_size is None:
        return (parse_part(raw, root, where=where),)
    top, problems = _table(raw, root, _rank_in(where), where=where)
    rank = None if top.null("rank") else top.integer("rank")
    if rank_part(rank, root.ep_size) != where:
        top.problem("rank", "is not the one in the part's name")
    parts = tuple(_part(t, root, rank) for t in top.tables("files"))
    names = [p.file for p in parts]
    wanted = numbered(files_name(rank, root.ep_size), len(names))
    if root.source is not None:
        if parts:
            top.problem("files", "must be empty: a virtual output has no data files")
        tensors = _tensors(top, "virtual", root, rank) if top.given("virtual") else ()
        parts = (Part("", 0, 0, "", tensors, rank),)
    elif names != wanted:
        odd = next(n for n, name in enumerate(names) if name != wanted[n])
        top.problem(f"files[{odd}].file", f"must be {quoted(wanted[odd])}: {len(names)} are listed")
    top.finish()
    seen = Counter(t.name for p in parts for t in p.tensors)
    for name in [name for name, count in seen.items() if count > 1]:
        problems.add("", f"tensor {quoted(name)} appears twice")
    refuse(problems, where)
    return parts


def parse_part(raw: bytes, root: Root, *, where: str) -> Part:
    """Parse and check the part of a whole output. Raises BadManifest, BadJson, DuplicateKey."""
    top, problems = _table(raw, root, None, where=where)
    part = _part(top, root, None)
    refuse(problems, where)
    return part


def _table(raw: bytes, root: Root, rank: int | None, *, where: str) -> tuple[Table, Problems]:
    """A part's document, its tensors read already as far as nothing is wrong with them.

    They are read while the JSON is parsed: as values of JSON a million of them take gigabytes. One
    in which anything is wrong stays JSON, and is read again where its place is known.
    """
    lenient, allowance = root.minor > MINOR, MAX_LISTED

    def record(pairs: Pairs) -> TensorEntry | None:
        nonlocal allowance
        doc = dict(pairs)
        if len(doc) != len(pairs) or not doc.keys() >= _OF_TENSORS:
            return None
        problems = Problems(silent=True, lenient=lenient, allowance=allowance)
        try:
            return _tensor(Table(doc, "", problems), root, rank)
        except Refused:
            return None
        finally:  # what was listed took its time, whatever came of it
            allowance = problems.allowance

    doc = loads_records(raw, where=quoted(where), record=record, floats=False)
    problems = Problems(lenient=lenient, allowance=allowance)
    return Table(doc, "", problems), problems


def _rank_in(name: str) -> int | None:
    """The rank in a part's name, if there is one."""
    match = _RANK.search(name)
    return int(match[1]) if match else None


def _part(t: Table, root: Root, rank: int | None) -> Part:
    header = t.table("header")
    part = Part(
        file=t.file_name("file"),
        size=t.integer("size"),
        header_size=header.integer("size"),
        header_digest=header.digest("digest"),
        tensors=_tensors(t, "tensors", root, rank),
        rank=rank,
    )
    t.finish()
    header.finish()
    return part


def _tensors(t: Table, key: str, root: Root, rank: int | None) -> tuple[TensorEntry, ...]:
    return tuple(
        item if isinstance(item, TensorEntry) else _tensor(item, root, rank)
        for item in t.records(key, TensorEntry)
    )


def _tensor(t: Table, root: Root, rank: int | None) -> TensorEntry:
    virtual = root.source is not None
    runs = _runs(t, root) if virtual else ()
    entry = TensorEntry(
        name=t.text("name"),
        dtype=sys.intern(t.formed("dtype", "a dtype in capital letters, digits and `_`", is_dtype)),
        shape=_shared(t.integers("shape")),
        start=0 if virtual else t.integer("start"),
        stop=sum(r.nbytes for r in runs) if virtual else t.integer("stop"),
        digests=t.texts("digests"),
        expert=_expert(t, root, rank) if t.given("expert") else None,
        runs=runs,
    )
    t.finish()
    if not all(map(is_digest, entry.digests)):
        t.problem("digests", "must be digests of 32 lower-case hexadecimal digits")
    expected = units_of(entry)
    if len(entry.digests) != expected and (entry.digests or not root.may_lack_digests):
        t.problem("digests", f"must be {expected}, one for each logical matrix")
    if entry.stop < entry.start:
        t.problem("stop", "is before `start`")
    if rank is not None and entry.expert is None:
        t.problem("expert", "is missing: tensors that belong to no expert are in the common files")
    return entry


def _shared(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """One tuple for equal ones: many tensors have the same shape."""
    return _known(sizes) if len(sizes) <= _MAX_SHARED else sizes


@lru_cache(maxsize=4096)
def _known(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return sizes


def _runs(t: Table, root: Root) -> tuple[Run, ...]:
    files = root.source.files if root.source else ()
    out = []
    for number, triple in enumerate(t.integer_lists("runs", 3)):
        run = Run(*triple)
        if run.file >= len(files) or run.offset + run.nbytes > files[run.file].size:
            t.problem("runs", f"run {number} is outside the source's files")
        out.append(run)
    return tuple(out)


def _expert(tensor: Table, root: Root, rank: int | None) -> ExpertEntry:
    t, digests = tensor.table("expert"), tensor.raw("digests")
    # a few words must not make a long list: never many more experts than there are digests
    most = max(len(digests), _FEW) if isinstance(digests, list) else _FEW
    unread = root.may_lack_digests and digests == []
    most = tensor.problems.allowance if unread else most + 1
    stack = t.integer("stack")
    known = root.stacks[stack] if stack < len(root.stacks) else None
    row = known.physical_to_logical if known else None
    if rank is not None and known is not None and row is None:
        t.problem("stack", "its experts are in the common files: it has no `physical_to_logical`")
    slots: tuple[int, int] | None = None
    experts: tuple[int, ...] = ()
    if rank is not None:
        slots = _span(t, "slots", len(row or ()))
        experts = row[slots[0] : min(slots[1], slots[0] + most)] if row else ()
        share = len(row or ()) // (root.ep_size or 1)
        if not rank * share <= slots[0] < slots[1] <= (rank + 1) * share:
            t.problem("slots", f"are not among those of rank {rank}")
    else:
        first, stop = _span(t, "experts", known.experts if known else 0)
        experts = tuple(range(first, min(stop, first + most)))
    if unread:
        tensor.problems.allowance -= len(experts)
        if len(experts) == most:
            t.problem("experts", "are more than the tensors of a part may name without digests")
    entry = ExpertEntry(
        stack=stack,
        experts=experts,
        projections=t.texts("projections"),
        component=sys.intern(t.text("component")),
        axes=sys.intern(t.text("axes")),
        matrix=_shared(t.integers("matrix")),
        slots=slots,
        local=t.text("local") if t.given("local") else None,
    )
    if entry.local is not None:
        _check_local(t, entry, row)
    t.finish()
    if known is None:
        t.problem("stack", f"there are only {len(root.stacks)} stacks")
    if not entry.projections or len(set(entry.projections)) != len(entry.projections):
        t.problem("projections", "must be one or more distinct names")
    return entry


def _check_local(t: Table, entry: ExpertEntry, row: tuple[int, ...] | None) -> None:
    """Check `local`, the name on a rank of a tensor that is stored once for all ranks."""
    if row is None or entry.slots is not None:
        t.problem(
            "local", "is only for tensors in the common files of a stack that is split among ranks"
        )
    elif len(entry.experts) != 1:
        t.problem("local", f"is only for a tensor of one expert, not of {len(entry.experts)}")
    if slot_namer(entry.local or "") is None:
        t.problem("local", "must contain `{slot}` once, or `{slot+N}`")


def _span(t: Table, key: str, limit: int) -> tuple[int, int]:
    span = t.integers(key)
    if len(span) != 2 or not 0 <= span[0] < span[1] <= limit:
        t.problem(key, "must be [first, one past the last] within the stack")
        return 0, 0
    return span[0], span[1]
