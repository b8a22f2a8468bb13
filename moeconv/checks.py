"""The library: verify, diff and fingerprint as functions. Nothing here prints, exits or writes."""

from __future__ import annotations

from pathlib import Path

from moeconv.api import (
    DEFAULT_MEMORY_BYTES,
    Meter,
    Opened,
    Progress,
    limits_of,
    open_source,
)
from moeconv.checkpoint.source import locate, open_checkpoint
from moeconv.engine.crew import Limits
from moeconv.engine.fill import fill_digests, finish_fill
from moeconv.errors import MoeconvError, NotASet, UsageProblem, quoted
from moeconv.errors.system import system_errors
from moeconv.manifest import ROOT_NAME, Manifest
from moeconv.proof.diff import Difference, differences
from moeconv.proof.digests import (
    Matrix,
    compare_digests,
    compare_file,
    fingerprint_of,
    matrices,
    rehash,
    stack_entries,
)
from moeconv.proof.report import DIGEST, LEVELS, SOURCE, STRUCTURE, Report
from moeconv.proof.source import compare_source
from moeconv.proof.structure import check_structure
from moeconv.proof.virtual import digests_missing, virtual_problems


@system_errors()
def verify(
    out: str | Path,
    *,
    level: str = DIGEST,
    source: str | Path | None = None,
    recipe: str | Path | None = None,
    from_layout: str | None = None,
    fill: bool = False,
    max_memory: int = DEFAULT_MEMORY_BYTES,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Prove an output of moeconv: `structure`, `digest` (all re-read), or `source` (against SRC).

    level `source` needs `source`; it also works for OUT that moeconv did not write. fill: where
    all is well, add to a virtual set the digests that it lacks.
    Damage is in the report, not raised.
    """
    if level not in LEVELS or (level == SOURCE) != (source is not None):
        raise UsageProblem(
            f"level {quoted(level)} and source {quoted(str(source))} do not go together",
            cause=f"the levels are {', '.join(LEVELS)}; only `{SOURCE}` takes a source",
            fix="say `--level source --source SRC`, or leave `--source` away",
        )
    if fill and level != SOURCE:
        raise UsageProblem(
            "`--fill` belongs to the level `source`",
            cause="digests are added only after every byte was compared",
            fix="say `--level source --source SRC --fill`",
        )
    place = locate(out)
    if fill:
        finish_fill(place)
    manifest, problems = _structure(place, level)
    if problems or level == STRUCTURE:
        return _report(level, problems, manifest, bytes_read=0)
    limits = limits_of(jobs, max_memory)
    meter = Meter(0, progress)
    if manifest is not None and source is None:
        problems += [p for entry in manifest.root.sidecars for p in compare_file(place, entry)]
    try:
        if source is None:
            problems += _fresh_problems(place, manifest, limits, meter)
        else:
            sides = [
                open_source(s, recipe=recipe, from_layout=from_layout) for s in (place, source)
            ]
            pairs = [(side.checkpoint, side.detection.whole()) for side in sides]
            meter.total = sides[0].checkpoint.tensor_bytes
            problems += compare_source(*pairs, limits=limits, progress=meter.advance)
            if fill and manifest is not None and not manifest.complete and not problems:
                manifest = _filled(place, manifest, sides[0], limits, meter)
    except MoeconvError as problem:
        # damage that the structure does not show is an answer, too; a missing SRC is none
        if manifest is None or source is not None:
            raise
        if not problems:
            problems.append(problem)
    return _report(level, problems, manifest, bytes_read=meter.done)


def _fresh_problems(
    place: Path, manifest: Manifest | None, limits: Limits, meter: Meter
) -> list[MoeconvError]:
    """What re-reading all tensors of a set shows."""
    if manifest is None:
        return []
    opened = open_source(place)
    checkpoint, detection = opened.checkpoint, opened.detection.whole()
    if not manifest.complete:
        return [digests_missing(manifest, checkpoint)]
    meter.total = checkpoint.tensor_bytes
    fresh = rehash(checkpoint, detection, limits=limits, progress=meter.advance)
    return compare_digests(manifest, fresh, stack_entries(checkpoint, detection))


def _filled(
    place: Path, manifest: Manifest, side: Opened, limits: Limits, meter: Meter
) -> Manifest:
    """The set with the digests of its source's bytes."""
    meter.total += side.checkpoint.tensor_bytes
    found = matrices(side.checkpoint, side.detection.whole(), limits=limits, progress=meter.advance)
    return fill_digests(place, manifest, {address: m.digest for address, m in found.items()})


def _structure(place: Path, level: str) -> tuple[Manifest | None, list[MoeconvError]]:
    if (place / ROOT_NAME).exists():
        manifest, problems = check_structure(place)
        if manifest is None or manifest.root.source is None or problems:
            return manifest, problems
        try:
            return manifest, virtual_problems(open_source(place).detection.whole(), manifest)
        except MoeconvError as problem:
            return manifest, [problem]
    if level == SOURCE:
        return None, []
    open_checkpoint(place)
    raise NotASet(
        f"{quoted(str(place))} was not written by moeconv",
        cause=f"it has no `{ROOT_NAME}`, so nothing says what its bytes should be",
        fix="compare it with its source: `moeconv verify OUT --level source --source SRC`",
    )


def _report(
    level: str, problems: list[MoeconvError], manifest: Manifest | None, *, bytes_read: int
) -> Report:
    parts = manifest.parts if manifest else ()
    return Report(
        level=level,
        problems=tuple(problems),
        files=sum(bool(p.file) for p in parts),
        tensors=sum(len(p.tensors) for p in parts),
        bytes_read=bytes_read,
        fingerprint=manifest.root.fingerprint if manifest else None,
    )


@system_errors()
def fingerprint(
    src: str | Path,
    *,
    recipe: str | Path | None = None,
    from_layout: str | None = None,
    max_memory: int = DEFAULT_MEMORY_BYTES,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> str:
    """One hash of the whole model, the same in every layout. Reads data only without a manifest."""
    opened = open_source(src, recipe=recipe, from_layout=from_layout)
    return fingerprint_of(_matrices(opened, max_memory, jobs, progress))


@system_errors()
def diff(
    a: str | Path,
    b: str | Path,
    *,
    recipe: str | Path | None = None,
    from_layout: str | None = None,
    max_memory: int = DEFAULT_MEMORY_BYTES,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> tuple[Difference, ...]:
    """Two checkpoints, matrix by matrix: `=` same, `-` only in A, `+` only in B, `*` differs."""
    sides = [open_source(s, recipe=recipe, from_layout=from_layout) for s in (a, b)]
    first, second = (_matrices(side, max_memory, jobs, progress) for side in sides)
    return differences(first, second)


def _matrices(
    opened: Opened, max_memory: int, jobs: int | None, progress: Progress | None
) -> dict[str, Matrix]:
    meter = Meter(opened.checkpoint.tensor_bytes, progress)
    return matrices(
        opened.checkpoint,
        opened.detection.whole(),
        limits=limits_of(jobs, max_memory),
        progress=meter.advance,
    )
