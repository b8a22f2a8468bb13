"""What an earlier run finished: taken up again only where every byte is still what it was."""

from __future__ import annotations

from pathlib import Path

from moeconv.checkpoint.header import read_header
from moeconv.checkpoint.papers import read_root
from moeconv.checkpoint.source import Checkpoint, DataFile
from moeconv.digest import digest
from moeconv.engine.crew import Limits
from moeconv.engine.journal import Journal
from moeconv.engine.rehash import digests_of
from moeconv.engine.tiles import Digests
from moeconv.errors import CannotResume, MoeconvError, quoted
from moeconv.jsonvalue import Json
from moeconv.manifest import ROOT_NAME
from moeconv.plan.itself import onto_itself
from moeconv.plan.values import Plan


def identity(checkpoint: Checkpoint) -> Json:
    """How to know that a source is the same: names, sizes, times and headers of its files."""
    files: list[Json] = [
        [f.name, f.size, f.mtime_ns, digest(f.header.raw)] for f in checkpoint.files
    ]
    sidecars: list[Json] = [[s.name, s.size, s.mtime_ns] for s in checkpoint.sidecars]
    return [files, sidecars]


def finished_before(out: Path, plan: Plan, journal: Journal, limits: Limits) -> dict[str, Digests]:
    """The data files that can stay as they are, with their digests; all of them are read again.

    A file without digests (`--digests later`) cannot be held against anything and is made anew.
    """
    there: list[DataFile] = []
    planned = []
    for file in plan.files:
        noted = journal.finished.get(file.name)
        if not noted or not all(all(row) for row in noted):
            continue
        try:
            header, facts = read_header(out / file.name, name=file.name, file=len(there))
        except MoeconvError:
            continue
        if header.raw != file.header or facts.st_size != file.size:
            continue
        planned.append(onto_itself(file, len(there)))
        there.append(DataFile(file.name, out / file.name, facts.st_size, facts.st_mtime_ns, header))
    found = digests_of(tuple(planned), tuple(there), limits=limits, progress=lambda _: None)
    return {name: its for name, its in found.items() if its == journal.finished[name]}


def refuse_other_set(out: Path, plan: Plan) -> None:
    """Raise CannotResume where the finished set in OUT is not what the plan makes."""
    root = read_root(out)
    totals = (root.tensor_count, root.tensor_bytes, root.ep_size, root.stacks, root.recipes)
    wanted = (plan.tensor_count, plan.tensor_bytes, plan.ep_size, plan.stacks, plan.recipes)
    same = totals == wanted
    for file in plan.files if same and not plan.virtual else ():
        try:
            header, _ = read_header(out / file.name, name=file.name, file=0)
            same = same and header.raw == file.header
        except MoeconvError:
            same = False
    if not same:
        raise CannotResume(
            f"{quoted(str(out))} is a finished set of another plan",
            at=quoted(ROOT_NAME),
            cause="its stacks, layouts or files are not those that this command makes",
            fix="give another directory, or `--overwrite`",
        )
