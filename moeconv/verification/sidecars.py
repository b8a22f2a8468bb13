"""Level `source` for files other than tensors: sidecars, and the origin that restores use."""

from __future__ import annotations

from moeconv.checkpoint.model import Checkpoint
from moeconv.checkpoint.origin import Origin
from moeconv.core.digest import digest
from moeconv.core.names import natural_key
from moeconv.core.text import quoted_list
from moeconv.detect.detect import Detection
from moeconv.errors import Damaged, MoeconvError, quoted
from moeconv.manifest.model import ORIGIN_NAME, StackEntry
from moeconv.quantconfig.rewrite_sidecars import (
    read_sidecar,
    renamed_documents,
    rewritten_documents,
)
from moeconv.store.base import File
from moeconv.store.documents import file_digest
from moeconv.verification.foreign import risk_of


def sidecar_problems(
    output: Checkpoint, source: tuple[Checkpoint, Detection]
) -> tuple[list[MoeconvError], list[str]]:
    """Sidecars of OUT that are not what a conversion makes of SRC's, and warnings.

    The stacks of both sides must be the same already.
    """
    in_output = {s.name: s for s in output.sidecars}
    in_source = {s.name: s for s in source[0].sidecars}
    problems: list[MoeconvError] = []
    warnings: list[str] = []
    for name in sorted(in_output.keys() | in_source.keys(), key=natural_key):
        mine, its = in_output.get(name), in_source.get(name)
        if its is None and output.origin is None and risk_of(name) is None:
            warnings.append(f"{quoted(name)} is in OUT only")  # OUT has no manifest that lists it
            continue
        cause = (
            "it is absent from OUT"
            if mine is None
            else "it is absent from SRC"
            if its is None
            else _difference(output, mine, source, its)
        )
        if cause is not None:
            problems.append(
                Damaged(
                    f"{quoted(name)} is not the same in OUT and SRC",
                    at=quoted(name),
                    cause=cause,
                    fix="convert again from this source",
                )
            )
    return problems, warnings


def _difference(
    output: Checkpoint, mine: File, source: tuple[Checkpoint, Detection], its: File
) -> str | None:
    """Why a sidecar of OUT is not what a conversion makes of SRC's, or None."""
    name = mine.name
    first = _kept(source[0], name)
    own = output.origin
    if own is not None:
        kept = _kept(output, name)
        if kept is not None and digest(kept) != _first_digest(first, its):
            return f"`{ORIGIN_NAME}` records different bytes: a restore would write those"
        entries = own.manifest.root.stacks
        if name in rewritten_documents():
            return _rewritten_otherwise(mine, its, first, source[1], entries, kept=kept)
    if file_digest(mine.path, name=name) != _first_digest(first, its):
        return "its bytes differ"
    return None


def _rewritten_otherwise(
    mine: File,
    its: File,
    first: bytes | None,
    source: Detection,
    entries: tuple[StackEntry, ...],
    *,
    kept: bytes | None,
) -> str | None:
    """Why a document that conversions rewrite is not what they make of SRC's, or None."""
    before = read_sidecar(its) if first is None else first
    after = renamed_documents({mine.name: before}, source.stacks, entries)[0][mine.name]
    if read_sidecar(mine) != after:
        return (
            "its bytes differ"
            if after == before
            else "its bytes are not those of SRC with the experts' modules renamed"
        )
    if after != before and kept is None:
        return f"it was rewritten, and `{ORIGIN_NAME}` does not keep the original"
    return None


def _kept(checkpoint: Checkpoint, name: str) -> bytes | None:
    """A sidecar as it was in the first source, where the origin keeps it."""
    own = checkpoint.origin
    return dict(own.origin.sidecars).get(name) if own else None


def _first_digest(first: bytes | None, its: File) -> str:
    return file_digest(its.path, name=its.name) if first is None else digest(first)


def origin_problems(output: Checkpoint, source: Checkpoint) -> list[MoeconvError]:
    """Compare the origin that OUT keeps with SRC, or with the origin that SRC keeps."""
    own = output.origin
    if own is None:
        return []
    kept, wanted = own.origin, _origin(source)
    kept_files = {f.name: (f.size, f.header.raw) for f in kept.files}
    wanted_files = {f.name: (f.size, f.header.raw) for f in wanted.files}
    differing = [n for n in sorted(kept_files.keys() | wanted_files.keys(), key=natural_key)
           if kept_files.get(n) != wanted_files.get(n)]  # fmt: skip
    indexes = [(i.name, i.raw) if i else None for i in (kept.index, wanted.index)]
    if indexes[0] != indexes[1]:
        differing.append(next(i[0] for i in indexes if i))
    if not differing:
        return []
    return [
        Damaged(
            f"`{ORIGIN_NAME}` of OUT does not describe SRC",
            at=f"`{ORIGIN_NAME}`, {quoted_list(differing, most=1)}",
            cause="its name, size, header or index is different: `unfuse` and `merge` would "
            "write other files than SRC's",
            fix="convert again from this source, or pass the one that OUT was made from",
        )
    ]


def _origin(source: Checkpoint) -> Origin:
    return source.as_origin() if source.origin is None else source.origin.origin
