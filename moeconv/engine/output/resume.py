"""Find what an earlier run finished; files are kept only if their digests still match."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from moeconv.checkpoint.header import read_header
from moeconv.checkpoint.model import Checkpoint, DataFile
from moeconv.checkpoint.output import open_output
from moeconv.checkpoint.output_files import read_root
from moeconv.core.digest import digest
from moeconv.core.strict_json import Json
from moeconv.engine.copy.pool import Limits, digests_of
from moeconv.engine.copy.sink import Digests
from moeconv.engine.manifest_writer import entry_of
from moeconv.engine.output.journal import Journal
from moeconv.engine.recorded_digests import recorded
from moeconv.errors import CannotResume, MoeconvError, quoted
from moeconv.manifest.model import PARTS_DIR, ROOT_NAME, addresses
from moeconv.plan.model import OutputFile, Plan
from moeconv.plan.onto_existing import unchanged_file
from moeconv.store.base import File
from moeconv.store.documents import file_digest, read_document
from moeconv.store.local import LocalFile, LocalStore


def identity(checkpoint: Checkpoint) -> Json:
    """Return what identifies a source: names, sizes, times and header digests of its files."""
    files: list[Json] = [
        [f.name, f.size, f.mtime_ns, digest(f.header.raw)] for f in checkpoint.files
    ]
    sidecars: list[Json] = [[s.name, s.size, s.mtime_ns] for s in checkpoint.sidecars]
    return [files, sidecars]


def finished_before(out: Path, plan: Plan, journal: Journal, limits: Limits) -> dict[str, Digests]:
    """Return the digests of the data files that can be kept, by name; all of them are read again.

    A file without recorded digests (`--digests later`) cannot be checked and is written again.
    """
    noted = {name: rows for name, rows in journal.finished.items() if all(map(all, rows))}
    found = _reread(out, [f for f in plan.files if noted.get(f.name)], limits)
    return {name: its for name, its in found.items() if its == noted[name]}


def _reread(out: Path, files: Iterable[OutputFile], limits: Limits) -> dict[str, Digests]:
    """Read files of a plan that are in OUT; return their digests, without those of other files."""
    there: list[DataFile] = []
    planned = []
    for file in files:
        written = _written(out, file, len(there))
        if written is not None:
            planned.append(unchanged_file(file, len(there)))
            there.append(written)
    return digests_of(tuple(planned), tuple(there), limits=limits, progress=lambda _: None)


def _written(out: Path, file: OutputFile, number: int) -> DataFile | None:
    """Return a file of the plan if it is in OUT with its planned header and size, else None."""
    try:
        written = LocalFile.at(out / file.name, name=file.name)
        header = read_header(written, number=number)
    except MoeconvError:
        return None
    if header.raw != file.header or written.size != file.size:
        return None
    return DataFile(written, header)


def is_restored(out: Path, plan: Plan, checkpoint: Checkpoint, limits: Limits) -> bool:
    """Return whether OUT is already the complete restored origin; all of it is read.

    A run that was killed after its last step leaves only that, and perhaps an empty `moeconv/`.
    """
    parts = out / PARTS_DIR
    if (out / ROOT_NAME).exists() or (parts.is_dir() and any(parts.iterdir())):
        return False
    try:
        if any(_written(out, file, 0) is None for file in plan.files):
            return False
        if plan.index_name is not None:
            index = read_document(
                LocalFile.at(out / plan.index_name, name=plan.index_name), len(plan.index)
            )
            if index != plan.index:
                return False
        if not all(_same_sidecar(out, s, plan) for s in checkpoint.sidecars):
            return False
        found = _reread(out, plan.files, limits)
    except MoeconvError:
        return False
    return found == _wanted_digests(plan, checkpoint, limits)


def _same_sidecar(out: Path, sidecar: File, plan: Plan) -> bool:
    there = LocalFile.at(out / sidecar.name, name=sidecar.name)
    return file_digest(there.path, name=sidecar.name) == _planned_digest(sidecar, plan)


def _planned_digest(sidecar: File, plan: Plan) -> str:
    """Return the digest that a sidecar has in the output: rewritten, or as it is in the source."""
    rewrite = next((r for r in plan.rewrites if r.name == sidecar.name), None)
    if rewrite is not None:
        return digest(rewrite.after)
    return file_digest(sidecar.path, name=sidecar.name)


def _wanted_digests(plan: Plan, checkpoint: Checkpoint, limits: Limits) -> dict[str, Digests]:
    """Return the digests that the plan's files must have: recorded, or of the source's bytes."""
    wanted = _by_file(plan, recorded(checkpoint).matrices)
    if all(value for rows in wanted.values() for row in rows for value in row):
        return wanted
    return digests_of(plan.files, checkpoint.files, limits=limits, progress=lambda _: None)


def _by_file(plan: Plan, digests: Mapping[str, str]) -> dict[str, Digests]:
    """Return digests by address as digests of the plan's files; empty where one is missing."""
    return {
        f.name: [
            [digests.get(a, "") for a in addresses(entry_of(t), plan.stacks)] for t in f.tensors
        ]
        for f in plan.files
    }


def refuse_other_output(out: Path, plan: Plan, checkpoint: Checkpoint, limits: Limits) -> None:
    """Raise CannotResume if the finished output in OUT is not what the plan makes.

    Stacks, layouts and headers are compared; digests too if the source may be another one, that
    is if SRC records digests, or is newer than the output.
    """
    root = read_root(LocalStore(out))
    totals = (root.tensor_count, root.tensor_bytes, root.ep_size, root.stacks, root.recipes)
    wanted = (plan.tensor_count, plan.tensor_bytes, plan.ep_size, plan.stacks, plan.recipes)
    same = totals == wanted and (
        plan.virtual or all(_written(out, f, 0) is not None for f in plan.files)
    )
    if not same:
        raise CannotResume(
            f"{quoted(str(out))} is a finished output of another plan",
            at=quoted(ROOT_NAME),
            cause="its stacks, layouts or files differ from those that this command makes",
        )
    if not plan.virtual and not _of_this_source(out, plan, checkpoint, limits):
        raise CannotResume(
            f"{quoted(str(out))} is a finished output of another source",
            at=quoted(ROOT_NAME),
            cause="the digests that it records, if any, differ from those of SRC's bytes",
        )


def _of_this_source(out: Path, plan: Plan, checkpoint: Checkpoint, limits: Limits) -> bool:
    """Return whether a finished output records the digests of SRC's bytes, where in doubt."""
    made, root = (out / ROOT_NAME).stat().st_mtime_ns, read_root(LocalStore(out))
    names = {e.name: e.digest for e in root.sidecars}
    rewritten = {r.name for r in plan.rewrites}
    doubtful = [s for s in checkpoint.sidecars if s.name in rewritten or s.mtime_ns > made]
    if any(names.get(s.name) != _planned_digest(s, plan) for s in doubtful):
        return False
    own = checkpoint.origin
    both = own is not None and own.manifest.complete and not root.unread
    if not both and all(f.mtime_ns <= made for f in checkpoint.files):
        return True
    digests = {a: value for a, _, _, value in open_output(LocalStore(out)).manifest.matrices()}
    return _by_file(plan, digests) == _wanted_digests(plan, checkpoint, limits)
