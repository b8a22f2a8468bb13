"""What every refusal is held against: class, code, exit status, words, and an untouched disk."""

import hashlib
import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import pytest

import moeconv
from moeconv import errors
from moeconv.errors import MoeconvError

# every code of the program, with the exit status that the table of the command line gives it
USAGE, IO, MALFORMED, UNSUPPORTED, OVERWRITE, BUG = 2, 3, 4, 5, 6, 70
CODES: Final[dict[type[MoeconvError], tuple[str, int]]] = {
    errors.UsageProblem: ("usage", USAGE),
    errors.BadSize: ("bad-size", USAGE),
    errors.BadRecipe: ("bad-recipe", USAGE),
    errors.UnsafeOutput: ("output-overlaps-source", USAGE),
    errors.AmbiguousLayout: ("ambiguous-layout", USAGE),
    errors.BadPlacement: ("bad-placement", USAGE),
    errors.TorchNeeded: ("torch-needed", USAGE),
    errors.GeometryMismatch: ("geometry-mismatch", USAGE),
    errors.DoesNotFit: ("does-not-fit", USAGE),
    errors.IoFailed: ("io", IO),
    errors.SourceMissing: ("not-found", IO),
    errors.DiskFull: ("disk-full", IO),
    errors.MemoryShort: ("memory-short", IO),
    errors.DownloadFailed: ("download-failed", IO),
    errors.NotLocal: ("not-local", IO),
    errors.SourceChanged: ("source-changed", IO),
    errors.Malformed: ("malformed", MALFORMED),
    errors.BadHeader: ("bad-header", MALFORMED),
    errors.TruncatedFile: ("truncated-shard", MALFORMED),
    errors.TrailingBytes: ("trailing-bytes", MALFORMED),
    errors.OverlappingTensors: ("overlap", MALFORMED),
    errors.HoleBetweenTensors: ("hole", MALFORMED),
    errors.HeaderTooLong: ("header-length", MALFORMED),
    errors.DuplicateKey: ("duplicate-key", MALFORMED),
    errors.BadJson: ("bad-json", MALFORMED),
    errors.LfsPointer: ("lfs-pointer", MALFORMED),
    errors.UnsafePath: ("unsafe-path", MALFORMED),
    errors.BadIndex: ("bad-index", MALFORMED),
    errors.TensorNotInFile: ("tensor-not-in-file", MALFORMED),
    errors.TensorNotInIndex: ("tensor-not-in-index", MALFORMED),
    errors.MissingShard: ("missing-shard", MALFORMED),
    errors.DuplicateTensor: ("duplicate-tensor", MALFORMED),
    errors.NoCheckpoint: ("no-checkpoint", MALFORMED),
    errors.BadConfig: ("bad-config", MALFORMED),
    errors.MissingExpert: ("missing-expert", MALFORMED),
    errors.ExpertGap: ("expert-gap", MALFORMED),
    errors.ExpertOutOfRange: ("expert-out-of-range", MALFORMED),
    errors.ExpertShape: ("expert-shape", MALFORMED),
    errors.ExpertDtype: ("expert-dtype", MALFORMED),
    errors.ScaleWithoutWeight: ("scale-without-weight", MALFORMED),
    errors.MissingScale: ("missing-scale", MALFORMED),
    errors.MixedLayouts: ("mixed-layouts", MALFORMED),
    errors.ConfigMismatch: ("config-mismatch", MALFORMED),
    errors.LayoutContradiction: ("layout-contradiction", MALFORMED),
    errors.UnknownExpertTensor: ("unknown-expert-tensor", MALFORMED),
    errors.NameCollision: ("name-collision", MALFORMED),
    errors.UnequalShared: ("unequal-shared", MALFORMED),
    errors.StraddlingBlock: ("straddling-block", UNSUPPORTED),
    errors.BadManifest: ("bad-manifest", MALFORMED),
    errors.Unfinished: ("unfinished", MALFORMED),
    errors.Damaged: ("damaged", MALFORMED),
    errors.DigestsMissing: ("digests-missing", MALFORMED),
    errors.NotVirtual: ("not-virtual", UNSUPPORTED),
    errors.BadPlacementFile: ("bad-placement-file", MALFORMED),
    errors.Unsupported: ("unsupported", UNSUPPORTED),
    errors.UnknownFamily: ("unknown-family", UNSUPPORTED),
    errors.UnknownLayout: ("unknown-layout", UNSUPPORTED),
    errors.NoExperts: ("no-experts", UNSUPPORTED),
    errors.TooManyStacks: ("too-many-stacks", UNSUPPORTED),
    errors.NoTorchDtype: ("no-torch-dtype", UNSUPPORTED),
    errors.NoPerExpertForm: ("no-per-expert-form", UNSUPPORTED),
    errors.UnsupportedVersion: ("unsupported-version", UNSUPPORTED),
    errors.NotAnOutput: ("not-a-set", UNSUPPORTED),
    errors.UnsupportedTransformers: ("unsupported-transformers", UNSUPPORTED),
    errors.SubByteAxis: ("sub-byte", UNSUPPORTED),
    errors.WouldOverwrite: ("would-overwrite", OVERWRITE),
    errors.CannotResume: ("cannot-resume", OVERWRITE),
    errors.InternalError: ("internal", BUG),
}


def tree(root: Path) -> dict[str, str] | None:
    """Everything below `root`: kind, and sha256 or the link's aim. None where nothing is."""
    if not os.path.lexists(root):
        return None
    return dict(_entries(root, "."))


def _entries(path: Path, name: str) -> Iterator[tuple[str, str]]:
    facts = path.lstat()
    if stat.S_ISDIR(facts.st_mode):
        yield name, "directory"
        for below in sorted(path.iterdir()):
            yield from _entries(below, f"{name}/{below.name}")
    elif stat.S_ISLNK(facts.st_mode):
        yield name, f"link to {path.readlink()}"
    elif stat.S_ISREG(facts.st_mode):
        with path.open("rb") as stream:
            yield name, hashlib.file_digest(stream, "sha256").hexdigest()
    else:
        yield name, f"special {stat.S_IFMT(facts.st_mode):o}"


@contextmanager
def untouched(*roots: Path) -> Iterator[None]:
    """Whatever happens inside, the directories are afterwards as they were."""
    before = [tree(root) for root in roots]
    try:
        yield
    finally:
        for root, was in zip(roots, before, strict=True):
            assert tree(root) == was, f"{root.name} was touched"


def holds(problem: MoeconvError, kind: type[MoeconvError], *facts: str) -> MoeconvError:
    """The problem is exactly of `kind`, has a fix, says all `facts`, and nothing raw."""
    assert type(problem) is kind, problem
    assert (problem.code, problem.exit_code) == CODES[kind]
    text = str(problem)
    raw = [line for line in text.splitlines() if not line.isprintable()]
    assert not raw, f"written raw: {raw}"
    silent = [fact for fact in facts if fact not in text]
    assert not silent, f"the message does not say {silent}:\n{text}"
    assert problem.fix, f"no fix:\n{text}"
    assert problem.at or problem.cause, f"neither place nor cause:\n{text}"
    return problem


def refused(
    kind: type[MoeconvError],
    *facts: str,
    src: Path,
    out: Path,
    verb: Callable[..., object] = moeconv.fuse,
    **options: object,
) -> MoeconvError:
    """The conversion is refused, planned and for real; SRC and OUT stay as they were."""
    with untouched(src, out):
        with pytest.raises(MoeconvError) as planned:
            verb(src, out, dry_run=True, **options)
        holds(planned.value, kind, *facts)
        with pytest.raises(MoeconvError) as real:
            verb(src, out, **options)
        return holds(real.value, kind, *facts)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail, instead of hanging or filling the memory, where a bound is missing."""

    def late(_signal: int, _frame: FrameType | None) -> NoReturn:
        pytest.fail(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
