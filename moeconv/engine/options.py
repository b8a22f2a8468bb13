"""The options of a run, their defaults, and the progress it reports."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from moeconv.core.system_errors import callers_own
from moeconv.engine.copy.pool import Limits
from moeconv.errors import UsageProblem, quoted

DEFAULT_MEMORY_BYTES: Final = 512 * 1024 * 1024
NOW: Final = "now"
LATER: Final = "later"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkOptions:
    """What a run may use, and whom it reports to: `progress(bytes done, bytes in all)`."""

    max_memory: int = DEFAULT_MEMORY_BYTES
    jobs: int | None = None
    progress: Progress | None = None

    def limits(self) -> Limits:
        """Return what the workers may use. Raises UsageProblem."""
        return Limits(default_jobs() if self.jobs is None else self.jobs, self.max_memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(WorkOptions):
    """How a plan is carried out.

    digests: `now`, or `later` to write an output without reading its data; `verify --fill` adds
    them. unchecked: restore the original files without comparing them with recorded digests.
    Raises UsageProblem for a value that is not allowed.
    """

    digests: str = NOW
    overwrite: bool = False
    resume: bool = False
    unchecked: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        self.limits()
        one_of("--digests", self.digests, (NOW, LATER))
        if self.resume and self.overwrite:
            raise UsageProblem(
                "`--resume` and `--overwrite` cannot be combined",
                cause="one continues what is there, the other starts over",
                fix="choose one",
            )


def one_of(flag: str, value: str, choices: tuple[str, ...]) -> str:
    """Return the value if it is one of the choices. Raises UsageProblem."""
    if value not in choices:
        raise UsageProblem(f"{quoted(value)} is not a value of `{flag}`", fix=" or ".join(choices))
    return value


def default_jobs() -> int:
    """Return the default number of threads: two per core, since half wait for the disk, up to 8."""
    return min(8, 2 * (os.cpu_count() or 1))


class Meter:
    """Count bytes for a `progress(done, total)` callback; workers call it one at a time."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done = 0
        self.total = total
        self._progress = progress

    def advance(self, nbytes: int) -> None:
        """Count bytes and report."""
        self.done += nbytes
        if self._progress is not None:
            with callers_own():
                self._progress(self.done, self.total)
