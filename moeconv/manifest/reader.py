"""The strict reader of `moeconv.json` and its parts: all problems at once (see FORMAT.md)."""

from __future__ import annotations

import re
import sys
from collections import Counter
from functools import lru_cache
from typing import Final

from moeconv.core.digest import DIGEST_HEX_DIGITS, digest
from moeconv.core.names import natural_key, slot_namer
from moeconv.core.schema import MAX_LISTED, Problems, Refused, Table, is_digest, is_dtype
from moeconv.core.strict_json import Pairs, loads, loads_records
from moeconv.core.text import counted
from moeconv.errors import BadManifest, Damaged, UnsupportedVersion, quoted
from moeconv.manifest.model import (
    DIGESTS_LATER,
    EXPERT_PARALLEL,
    FEATURES,
    FORMAT,
    MAJOR,
    MAX_EP_SIZE,
    MAX_PARTS,
    MAX_RECIPE_TEXT,
    MAX_RECIPES,
    MAX_STACKS,
    MINOR,
    ROOT_NAME,
    VIRTUAL,
    ExpertEntry,
    FileEntry,
    Part,
    RecipeText,
    Root,
    Run,
    SourceEntry,
    SourceFile,
    StackEntry,
    TensorEntry,
    files_name,
    numbered,
    rank_part,
    units_of,
)
from moeconv.manifest.rules import check_root

_OF_TENSORS: Final = frozenset(("name", "dtype", "shape", "digests"))
_RANK: Final = re.compile(r"/rank-([0-9]{1,9})-of-")
_MAX_SHARED: Final = 8
_FEW: Final = 64  # experts that a tensor may name whatever its digests


def _refuse(problems: Problems, where: str) -> None:
    if problems.count:
        raise BadManifest(
            f"{quoted(where)} violates the rules of its format in "
            f"{counted(problems.count, 'place')}",
            at=quoted(where),
            cause="; ".join(problems.shown()),
        )


def split_root(raw: bytes, *, where: str) -> bytes:
    """The body of a `moeconv.json`, after its own digest was checked. Raises Damaged."""
    body, mark = raw[: -DIGEST_HEX_DIGITS - 2], raw[-DIGEST_HEX_DIGITS - 2 :]
    if mark[:1] != b"\n" or mark[-1:] != b"\n" or mark[1:-1] != digest(body).encode():
        raise Damaged(
            f"{quoted(where)} is damaged: the digest in its last line is not that of its text",
            at=quoted(where),
            cause="a bit flipped, the file was cut short, or somebody edited it",
        )
    return body


def parse_root(raw: bytes, *, where: str = ROOT_NAME) -> Root:
    """Parse and check a root. Raises Damaged, BadManifest, UnsupportedVersion, BadJson."""
    doc = loads(split_root(raw, where=where), where=quoted(where), floats=False)
    problems = Problems()
    top = Table(doc, "", problems)
    minor, requires = _check_version(top, where)
    sharded, virtual = EXPERT_PARALLEL in requires, VIRTUAL in requires
    unread = DIGESTS_LATER in requires
    lacking = virtual or unread
    totals = top.table("totals")
    root = Root(
        generator=top.text("generator"),
        recipes=tuple(_recipe(t) for t in top.tables("recipes", MAX_RECIPES)),
        stacks=tuple(_stack(t, sharded=sharded) for t in top.tables("stacks", MAX_STACKS)),
        parts=tuple(_file(t) for t in top.tables("parts", MAX_PARTS)),
        index=None if sharded and top.null("index") else _file(top.table("index")),
        origin=_file(top.table("origin")),
        sidecars=tuple(_file(t) for t in top.tables("sidecars")),
        tensor_count=totals.integer("tensors"),
        tensor_bytes=totals.integer("bytes"),
        fingerprint=None if lacking and top.null("fingerprint") else top.digest("fingerprint"),
        ep_size=_ep_size(top.table("sharding")) if sharded else None,
        source=_source(top.table("source")) if virtual else None,
        unread=unread,
        minor=minor,
    )
    totals.finish()
    top.finish()
    if sharded and root.index is not None:
        top.problem(
            "index", "must be null: files of different ranks have tensors with the same name"
        )
    if not problems.skipped:
        check_root(root, problems)
    _refuse(problems, where)
    return root


def _ep_size(t: Table) -> int:
    size = t.integer("ep_size", least=1)
    t.finish()
    if size > MAX_EP_SIZE:
        t.problem("ep_size", f"must be at most {MAX_EP_SIZE:,}")
        return 0
    return size


def _source(t: Table) -> SourceEntry:
    entry = SourceEntry(t.word("directory"), tuple(_source_file(f) for f in t.tables("files")))
    if not entry.directory.startswith("/"):
        t.problem("directory", "must be the absolute path of a directory")
    names = [f.name for f in entry.files]
    if names != sorted(set(names), key=natural_key):
        t.problem("files", "must be in natural order, each once: runs refer to them by number")
    t.finish()
    return entry


def _source_file(t: Table) -> SourceFile:
    header, mtime = t.table("header"), t.integers("mtime")
    if len(mtime) != 2 or mtime[1] >= 10**9:
        t.problem("mtime", "must be [seconds, nanoseconds]")
        mtime = (0, 0)
    entry = SourceFile(
        t.file_name("name"),
        t.integer("size"),
        mtime[0] * 10**9 + mtime[1],
        header.integer("size"),
        header.digest("digest"),
    )
    header.finish()
    t.finish()
    return entry


def _check_version(top: Table, where: str) -> tuple[int, tuple[str, ...]]:
    if top.text("format") != FORMAT:
        top.problem("format", f"must be `{FORMAT}`")
    version = top.table("version")
    major, minor = version.integer("major"), version.integer("minor")
    requires = top.texts("requires")
    # a malformed version must not send anybody looking for a newer moeconv
    _refuse(top.problems, where)
    unknown = [name for name in requires if name not in FEATURES]
    if major != MAJOR or unknown:
        raise UnsupportedVersion(
            f"{quoted(where)} is in a format that this moeconv cannot read",
            at=quoted(where),
            cause=f"it has format version {major}.{minor} and requires {list(requires[:_FEW])}; "
            f"this one reads {MAJOR}.x and knows {', '.join(f'`{name}`' for name in FEATURES)}",
            fix="install a newer moeconv" if major >= MAJOR else "convert the checkpoint again",
        )
    if len(set(requires)) != len(requires):
        top.problem("requires", "names a feature twice")
    if VIRTUAL in requires and EXPERT_PARALLEL not in requires:
        top.problem("requires", f"`{VIRTUAL}` requires `{EXPERT_PARALLEL}` too")
    top.problems.lenient = minor > MINOR
    version.finish()
    return minor, requires


def _file(t: Table) -> FileEntry:
    entry = FileEntry(t.relative_path("name"), t.integer("size"), t.digest("digest"))
    t.finish()
    return entry


def _recipe(t: Table) -> RecipeText:
    toml = t.raw("toml")
    if not isinstance(toml, str) or len(toml) > MAX_RECIPE_TEXT:
        t.problem("toml", f"must be a string of at most {MAX_RECIPE_TEXT:,} characters")
        toml = ""
    entry = RecipeText(t.text("name"), toml)
    t.finish()
    return entry


def _stack(t: Table, *, sharded: bool) -> StackEntry:
    has_row = sharded and t.given("physical_to_logical")
    entry = StackEntry(
        name=t.text("name"),
        recipe=t.text("recipe"),
        layout=t.text("layout"),
        origin_layout=t.text("origin_layout"),
        experts=t.integer("experts", least=1),
        width=t.integer("width"),
        hidden=t.integer("hidden"),
        physical_to_logical=t.integers("physical_to_logical") if has_row else None,
    )
    t.finish()
    return entry


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
    _refuse(problems, where)
    return parts


def parse_part(raw: bytes, root: Root, *, where: str) -> Part:
    """Parse and check the part of a whole output. Raises BadManifest, BadJson, DuplicateKey."""
    top, problems = _table(raw, root, None, where=where)
    part = _part(top, root, None)
    _refuse(problems, where)
    return part


def _table(raw: bytes, root: Root, rank: int | None, *, where: str) -> tuple[Table, Problems]:
    """A part's document, its tensors read already as far as nothing is wrong with them."""
    reader = _TensorReader(root, rank)
    doc = loads_records(raw, where=quoted(where), record=reader.record, floats=False)
    problems = Problems(lenient=root.minor > MINOR, allowance=reader.allowance)
    return Table(doc, "", problems), problems


class _TensorReader:
    """Reads tensors while the JSON is parsed: as values of JSON a million of them take gigabytes.

    One in which anything is wrong stays JSON, and is read again where its place is known.
    """

    def __init__(self, root: Root, rank: int | None) -> None:
        self._root = root
        self._rank = rank
        self.allowance = MAX_LISTED

    def record(self, pairs: Pairs) -> TensorEntry | None:
        """The tensor that an object of the document is."""
        doc = dict(pairs)
        if len(doc) != len(pairs) or not doc.keys() >= _OF_TENSORS:
            return None
        lenient = self._root.minor > MINOR
        problems = Problems(silent=True, lenient=lenient, allowance=self.allowance)
        try:
            entry = _tensor(Table(doc, "", problems), self._root, self._rank)
        except Refused:
            return None
        finally:  # what was listed took its time, whatever came of it
            self.allowance = problems.allowance
        return entry


def _rank_in(name: str) -> int | None:
    """The rank that a part's name says, if it says one."""
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
    """The name that a rank gives what is kept for all ranks."""
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
