"""verify, diff and fingerprint. Nothing here prints or exits; only `verify(fill=True)` writes."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Final, Unpack

from moeconv.api.open import Opened, open_source
from moeconv.api.options import ReadKeywords, ReadOptions
from moeconv.checkpoint.model import Checkpoint
from moeconv.checkpoint.source import locate, open_checkpoint
from moeconv.core.system_errors import system_errors
from moeconv.core.text import counted, quoted_list
from moeconv.detect.stack import Stack
from moeconv.engine.add_digests import fill_digests, finish_fill
from moeconv.engine.copy.pool import Limits
from moeconv.engine.options import Meter
from moeconv.errors import Damaged, MoeconvError, NotAnOutput, UsageProblem, quoted
from moeconv.layout.recipe import Recipe
from moeconv.layout.shipped import load_recipe, shipped_recipe
from moeconv.manifest.model import ROOT_NAME, FileEntry, Manifest
from moeconv.store.documents import unreadable
from moeconv.store.local import LocalStore
from moeconv.verification.against_source import compare_source, tensor_differences
from moeconv.verification.digests import (
    Contents,
    compare_digests,
    compare_file,
    contents,
    fingerprint_of,
    recorded_contents,
    rehash,
    stack_entries,
)
from moeconv.verification.foreign import foreign_problems
from moeconv.verification.recipes import (
    Trusted,
    entry_problems,
    origin_layout_problems,
    recipe_problems,
)
from moeconv.verification.report import (
    DIGEST,
    LEVELS,
    MAX_REPORTED,
    SOURCE,
    STRUCTURE,
    Difference,
    VerifyReport,
    differences,
    limit_problems,
)
from moeconv.verification.sidecars import origin_problems, sidecar_problems
from moeconv.verification.structure import check_structure
from moeconv.verification.virtual import digests_missing, virtual_problems

_MAX_NAMED: Final = 8


@system_errors()
def verify(
    out: str | Path,
    *,
    level: str | None = None,
    source: str | Path | None = None,
    fill: bool = False,
    **keywords: Unpack[ReadKeywords],
) -> VerifyReport:
    """Check an output of moeconv; damage is in the report, not raised.

    level: `structure` (no data is read), `digest` (all data is read again), or `source` (byte by
    byte against `source`, also for an OUT that moeconv did not write). Default: `source` if one
    is given, else `digest`. fill: if OUT is right, write the digests that it lacks.
    The other keywords are those of `ReadOptions`. Raises UsageProblem, and what `open_source`
    raises for SRC.
    """
    options = ReadOptions(**keywords)
    level = _checked_level(level, source, fill=fill)
    place = locate(out)
    if source is not None:
        source = locate(source)
        _refuse_nested(place, source)
    if fill:
        finish_fill(place)
    report, sidecars = _structure(place, level)
    if report.problems or level == STRUCTURE:
        return report
    limits, meter = options.limits(), Meter(0, options.progress)
    problems = [p for entry in sidecars for p in compare_file(place, entry)]
    if source is None:
        try:
            problems += _reread(place, limits, meter)
        except MoeconvError as problem:  # damage that only the data shows
            problems = problems or [problem]
    else:
        opened, original = (options.open(s) for s in (place, source))
        meter.total = opened.checkpoint.tensor_bytes
        found, warnings = _compare(opened, original, options.recipe, limits, meter)
        problems += found
        report = replace(report, warnings=(*report.warnings, *warnings))
        own = opened.checkpoint.origin
        if fill and own is not None and not own.manifest.complete and not problems:
            filled = _fill(place, own.manifest, opened, limits, meter)
            report = replace(report, fingerprint=filled.root.fingerprint)
    return replace(report, problems=limit_problems(problems), bytes_read=meter.done)


def _checked_level(level: str | None, source: str | Path | None, *, fill: bool) -> str:
    """Return the level, or its default. Raises UsageProblem for a wrong combination."""
    level = level or (DIGEST if source is None else SOURCE)
    if level not in LEVELS or (level == SOURCE) != (source is not None):
        raise UsageProblem(
            f"level {quoted(level)} and source {quoted(str(source))} cannot be combined",
            cause=f"the levels are {', '.join(LEVELS)}; only `{SOURCE}` takes a source",
            fix="use `--level source --source SRC`, or drop `--source`",
        )
    if fill and level != SOURCE:
        raise UsageProblem(
            "`--fill` requires `--level source`",
            cause="digests are added only after every byte has been compared",
            fix="use `--level source --source SRC --fill`",
        )
    return level


def _refuse_nested(place: Path, source: Path) -> None:
    """Raise UsageProblem if SRC is OUT, or one is inside the other."""
    one, other = (Path(os.path.realpath(p)) for p in (place, source))
    if one.is_relative_to(other) or other.is_relative_to(one) or one.samefile(other):
        raise _same_error(str(source), f"it is {quoted(str(other))}, OUT is {quoted(str(one))}")


def _refuse_same_files(out: Checkpoint, source: Checkpoint) -> None:
    """Raise UsageProblem if SRC's files are OUT's: links to them, or a virtual output of them."""
    if out.virtual is not None:
        return  # its bytes are SRC's by design
    mine = {_inode(f.path): f.name for f in out.files}
    for file in source.files:
        if (name := mine.get(_inode(file.path))) is not None:
            cause = f"{quoted(str(file.path))} is the same file as {quoted(name)} of OUT"
            raise _same_error(source.store.address, cause)


def _inode(path: Path) -> tuple[int, int]:
    try:
        facts = path.stat()
    except OSError as problem:
        raise unreadable(path, problem, name=path.name) from None
    return facts.st_dev, facts.st_ino


def _same_error(source: str, cause: str) -> UsageProblem:
    return UsageProblem(
        f"{quoted(source)} is OUT itself: comparing it with itself proves nothing",
        cause=cause,
        fix="pass the checkpoint that OUT was made from, or verify without `--source`",
    )


def _compare(
    out: Opened,
    source: Opened,
    recipe: str | Path | None,
    limits: Limits,
    meter: Meter,
) -> tuple[list[MoeconvError], list[str]]:
    """Return how OUT differs from SRC, and warnings. Nothing that OUT records is trusted."""
    _refuse_same_files(out.checkpoint, source.checkpoint)
    pairs = [(side.checkpoint, side.detection.checked()) for side in (out, source)]
    problems = tensor_differences(out.detection, source.detection)
    if problems:
        return problems, []
    trusted = _trusted(source, recipe)
    for name, side in (("OUT", out), ("SRC", source)):
        own = side.checkpoint.origin
        if own is not None:
            detection = side.detection
            problems += recipe_problems(name, own.manifest, detection, source.detection, trusted)
    problems += origin_layout_problems(out.checkpoint, source.checkpoint, source.detection)
    manifest = out.checkpoint.manifest
    if manifest is not None and manifest.root.ep_size is None:
        problems += islice(entry_problems(manifest, out.detection), MAX_REPORTED)
    problems += origin_problems(out.checkpoint, source.checkpoint)
    found, warnings = sidecar_problems(out.checkpoint, pairs[1])
    problems += found
    problems += compare_source(*pairs, limits=limits, progress=meter.advance)
    return problems, warnings


def _trusted(
    source: Opened, recipe: str | Path | None, fallback: dict[str, Recipe] | None = None
) -> Trusted:
    """Return the recipe to trust for a stack of SRC: the user's, or the shipped one of its name.

    Without either, the one in `fallback` (by stack), or else the one that SRC carries.
    """
    if source.checkpoint.origin is None:
        return lambda stack: stack.recipe
    given = load_recipe(recipe) if recipe is not None else None

    def known(stack: Stack) -> Recipe:
        name = stack.recipe.name
        found = given if given is not None and given.name == name else shipped_recipe(name)
        if found is None:
            return (fallback or {}).get(stack.name, stack.recipe)
        return found if stack.recipe.taken is None else found.taking(*stack.recipe.taken)

    return known


def _reread(place: Path, limits: Limits, meter: Meter) -> list[MoeconvError]:
    """Read all tensors of an output and compare them with their recorded digests."""
    opened = open_source(place)
    checkpoint, detection = opened.checkpoint, opened.detection.checked()
    if checkpoint.origin is None:
        return []
    manifest = checkpoint.origin.manifest
    if not manifest.complete:
        return [digests_missing(manifest, checkpoint)]
    meter.total = checkpoint.tensor_bytes
    fresh = rehash(checkpoint, detection, limits=limits, progress=meter.advance)
    found = compare_digests(manifest, fresh, stack_entries(checkpoint, detection))
    return list(limit_problems(found))


def _fill(place: Path, manifest: Manifest, side: Opened, limits: Limits, meter: Meter) -> Manifest:
    """Write the digests that OUT lacks; return its completed manifest."""
    meter.total += side.checkpoint.tensor_bytes
    found = contents(
        side.checkpoint, side.detection.checked(), limits=limits, progress=meter.advance
    )
    return fill_digests(place, manifest, {a: m.digest for a, m in found.matrices.items()})


def _structure(place: Path, level: str) -> tuple[VerifyReport, tuple[FileEntry, ...]]:
    """Check everything but OUT's data; return a report, and the sidecars that OUT's root names.

    The manifest itself is not returned: of a million tensors, it must not be in memory twice.
    """
    if not (place / ROOT_NAME).exists():
        if level == SOURCE:
            return VerifyReport(level), ()
        open_checkpoint(place)
        raise NotAnOutput(
            f"{quoted(str(place))} was not written by moeconv",
            cause=f"it has no `{ROOT_NAME}`, so its bytes cannot be checked against anything",
            fix="compare it with its source: `moeconv verify OUT --level source --source SRC`",
        )
    manifest, problems = check_structure(LocalStore(place))
    if manifest is None:
        return VerifyReport(level, limit_problems(problems)), ()
    added, warnings = foreign_problems(place, manifest)
    problems += added
    if manifest.root.source is not None and not problems:
        try:
            problems = virtual_problems(open_source(place).detection.checked(), manifest)
        except MoeconvError as problem:
            problems = [problem]
    report = VerifyReport(
        level,
        limit_problems(problems),
        files=sum(bool(p.file) for p in manifest.parts),
        tensors=sum(len(p.tensors) for p in manifest.parts),
        fingerprint=manifest.root.fingerprint,
        warnings=tuple(warnings),
    )
    return report, manifest.root.sidecars


@system_errors()
def fingerprint(
    src: str | Path,
    *,
    recorded: bool = False,
    **keywords: Unpack[ReadKeywords],
) -> str:
    """Hash the whole model, as its bytes are now; the hash is the same in every layout.

    recorded: trust the digests that an output records, if it has them all, and read nothing.
    The other keywords are those of `ReadOptions`. Raises Damaged for an output whose bytes are not
    those that it records, or whose recipes differ from the known ones of the same names.
    """
    options = ReadOptions(**keywords)
    opened = options.open(src)
    (found,) = _contents([opened], options, recorded=recorded)
    if found.damaged:
        raise _damaged(opened, found.damaged)
    return fingerprint_of(found.matrices)


def _damaged(opened: Opened, addresses: tuple[str, ...]) -> Damaged:
    return Damaged(
        f"{quoted(opened.address)} is damaged: its bytes are not those that were written",
        at=quoted_list(addresses, most=_MAX_NAMED),
        cause=f"{counted(len(addresses), 'matrix or tensor', 'matrices or tensors')} differ from "
        "its manifest, or between replicas",
        fix="fetch it again; `moeconv verify SRC` lists all the damage",
    )


@system_errors()
def diff(
    a: str | Path,
    b: str | Path,
    *,
    recorded: bool = False,
    **keywords: Unpack[ReadKeywords],
) -> tuple[Difference, ...]:
    """Compare two checkpoints by matrix: `=` same, `-` only in A, `+` only in B, `*` differs.

    All bytes are read and compared as they are now; `damaged` says where they are not those that
    an output records. recorded: trust the digests that an output records, if it has them all, and
    do not read it. The other keywords are those of `ReadOptions`. Raises Damaged for an output
    whose recipes differ from the known ones of the same names.
    """
    options = ReadOptions(**keywords)
    sides = [options.open(s) for s in (a, b)]
    return differences(*_contents(sides, options, recorded=recorded))


def _contents(sides: list[Opened], options: ReadOptions, *, recorded: bool) -> list[Contents]:
    """The digests of each side: read, or trusted if `recorded` and its manifest has them."""
    limits = options.limits()
    known = [recorded_contents(side.checkpoint) if recorded else None for side in sides]
    unread = [s.checkpoint for s, digests in zip(sides, known, strict=True) if digests is None]
    foreign = [s for side in sides if side.checkpoint.origin is None for s in side.detection.stacks]
    for side, digests in zip(sides, known, strict=True):
        if digests is None:
            _refuse_other_recipes(side, options.recipe, {s.name: s.recipe for s in foreign})
    meter = Meter(sum(checkpoint.tensor_bytes for checkpoint in unread), options.progress)
    return [
        contents(side.checkpoint, side.detection.checked(), limits=limits, progress=meter.advance)
        if digests is None
        else Contents(digests)
        for side, digests in zip(sides, known, strict=True)
    ]


def _refuse_other_recipes(
    side: Opened, recipe: str | Path | None, fallback: dict[str, Recipe]
) -> None:
    """Raise Damaged if an output's recipes map its bytes to other matrices than the known ones.

    Read by its own recipes it would look like the same model, but a loader would see another.
    fallback: by stack, the recipes of a foreign checkpoint that the output is compared with.
    """
    own = side.checkpoint.origin
    if own is None:
        return
    detection = side.detection.checked()
    trusted = _trusted(side, recipe, fallback)
    found = recipe_problems(side.address, own.manifest, detection, detection, trusted)
    if found:
        raise found[0].with_also(tuple(found[1:]))
