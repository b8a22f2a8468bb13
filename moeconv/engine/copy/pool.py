"""Workers over the tiles of many files: files side by side, many hands on one only at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

from moeconv.checkpoint.source import DataFile
from moeconv.core.digest import EMPTY_DIGEST
from moeconv.core.signals import defer_signals
from moeconv.engine.copy.buffers import Memory
from moeconv.engine.copy.sources import SourceFile, Sources, opened
from moeconv.engine.copy.worker import Bytes, Digests, Promised, Stopped, TileRunner
from moeconv.errors import IoFailed, MoeconvError, UsageProblem
from moeconv.plan.model import CopyTile, OutputFile, Tile
from moeconv.store.descriptors import descriptors_left

BATCH_BYTES: Final = 64 * 1024 * 1024
CLONE_COST_BYTES: Final = 64 * 1024  # as long as one clone takes
Progress: TypeAlias = Callable[[int], None]
_Worker: TypeAlias = tuple[threading.Thread, threading.Event]  # set when it is done


# more threads than this only wait for one another
MAX_JOBS: Final = 256

# an output is open twice while it is written, once of the two past the page cache
_DESCRIPTORS_A_TARGET: Final = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run may use: worker threads, and bytes for permuting tiles.

    There are never more threads than batches of work, nor than MAX_JOBS. Raises UsageProblem.
    """

    jobs: int
    max_memory: int

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UsageProblem(
                f"{self.jobs} worker threads cannot do anything",
                fix="give a number of 1 or more, or none for the default",
            )


class Target(Bytes, Protocol):
    """A file from its opening to its end."""

    def clonable(self, file: int, offset: int, at: int, nbytes: int) -> bool:
        """Whether some of a run of bytes of source file `file` can be had without a copy."""

    @property
    def serial(self) -> bool:
        """Whether a file of copied bytes is best written in order, by one worker."""

    def open(self) -> None:
        """Called once before the first byte, by whichever worker comes first."""

    def settle(self, offset: int, nbytes: int) -> None:
        """Called after each batch: this range is written."""

    def finish(self, digests: Digests) -> None:
        """Called once after the last byte."""

    def close(self) -> None:
        """Called once in any case."""


MakeTarget: TypeAlias = Callable[[OutputFile], Target]
MakePromise: TypeAlias = Callable[[OutputFile], Promised]


class Reader:
    """What targets have in common that only look at bytes: nothing is cloned or taken unread."""

    clones = False
    serial = False

    def clonable(self, file: int, offset: int, at: int, nbytes: int) -> bool:
        """Everything is to be read."""
        return False

    def copy(self, source: SourceFile, offset: int, at: int, nbytes: int) -> int:
        """Everything is to be read."""
        return 0

    def clone(self, source: SourceFile, offset: int, at: int, nbytes: int) -> tuple[int, int]:
        """Nothing is in place yet."""
        return 0, 0

    def settle(self, offset: int, nbytes: int) -> None:
        """Nothing to settle."""


def nothing_promised(_: OutputFile) -> Promised:
    """Every digest is to be taken."""
    return lambda tensor, unit: None


@dataclass(slots=True)
class _Job:
    """One file under work."""

    file: OutputFile
    target: Target
    promised: Promised
    digests: Digests
    waiting: list[tuple[Tile, ...]]  # batches, last first
    pending: int
    alone: bool  # nobody helps the worker who has it
    opened: bool = False
    failed: bool = False
    opening: threading.Lock = field(default_factory=threading.Lock)


def run_tiles(
    files: tuple[OutputFile, ...],
    sources: tuple[DataFile, ...],
    make_target: MakeTarget,
    *,
    limits: Limits,
    progress: Progress,
    promised: MakePromise = nothing_promised,
) -> None:
    """Carry out all tiles of all files.

    promised: for each file, digests that need not be taken of bytes that need not be read.
    Raises what a worker raised first; KeyboardInterrupt stops the workers before it goes on.
    """
    queue = [_job(f, make_target(f), promised(f)) for f in reversed(files)]
    batches = sum(job.pending for job in queue)
    jobs, most = _shares(len(sources), min(limits.jobs, batches, MAX_JOBS))
    with opened(sources, most=most) as source:
        _WorkerPool(queue, source, limits.max_memory, progress).work(jobs)
        source.unchanged()


def _shares(files: int, jobs: int) -> tuple[int, int]:
    """How many workers the limit of open files lets work, and how many sources may be open.

    Each worker reads one source at a time, and writes to one target.
    """
    each = _DESCRIPTORS_A_TARGET + 1
    left = descriptors_left(files + _DESCRIPTORS_A_TARGET * jobs)
    jobs = max(min(jobs, left // each), 1)
    return jobs, max(left - _DESCRIPTORS_A_TARGET * jobs, jobs)


class _WorkerPool:
    def __init__(
        self,
        queue: list[_Job],
        sources: Sources,
        max_memory: int,
        progress: Progress,
    ) -> None:
        self._queue = queue  # last first
        self._open: list[_Job] = []
        self._sources = sources
        self._memory = Memory(max_memory)
        self._progress = progress
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    def work(self, jobs: int) -> None:
        """Run the workers to their end, or stop them and wait, whatever happens meanwhile."""
        crew = [
            (threading.Thread(target=self._worker, args=(done,), daemon=True), done)
            for done in (threading.Event() for _ in range(jobs))
        ]
        try:
            # whoever presses Ctrl-C wants an end, but not of files that are being written to
            with defer_signals(then=self._stop.set):
                crew = _started(crew)
                for _, done in crew:
                    # not `join`: before 3.13 it takes a thread for dead when a signal comes
                    while not done.wait(0.2):
                        continue
        except BaseException:
            self._stop.set()
            for thread, done in crew:
                _wait_out(thread, done)
            raise
        finally:
            with defer_signals():
                self._close()
        if self._failure is not None:
            raise self._failure

    def _close(self) -> None:
        """Close what was not finished; what fails there is told only if nothing failed before."""
        for job in self._open:
            try:
                job.target.close()
            except MoeconvError as problem:
                self._failure = self._failure or problem

    def _worker(self, done: threading.Event) -> None:
        try:
            self._batches()
        finally:
            done.set()

    def _batches(self) -> None:
        current: _Job | None = None
        try:
            with closing(self._runner()) as runner:
                while (work := self._next(current)) is not None:
                    current, batch = work
                    self._carry_out(runner, current, batch)
        except Stopped:
            pass
        except BaseException as problem:  # noqa: BLE001 - handed to the thread that waits
            with self._lock:
                self._failure = self._failure or problem
            self._stop.set()

    def _runner(self) -> TileRunner:
        return TileRunner(self._sources, self._memory, stop=self._stop, advance=self._advance)

    def _next(self, current: _Job | None) -> tuple[_Job, tuple[Tile, ...]] | None:
        """A batch of the file at hand, else of a new file, else of the file with most to do."""
        with self._lock:
            if self._stop.is_set():
                return None
            if current is None or not current.waiting:
                if self._queue:
                    current = self._queue.pop()
                    self._open.append(current)
                else:
                    shared = (j for j in self._open if not j.alone)
                    current = max(shared, key=lambda j: len(j.waiting), default=None)
            if current is None or not current.waiting:
                return None
            return current, current.waiting.pop()

    def _carry_out(self, runner: TileRunner, job: _Job, batch: tuple[Tile, ...]) -> None:
        with job.opening:
            if job.failed:
                raise Stopped
            if not job.opened:
                job.failed = True  # whoever waits must not try again
                job.target.open()
                job.opened, job.failed = True, False
        if batch:
            runner.run(job.file, batch, job.digests, job.target, job.promised)
            start, last = batch[0].start, batch[-1]
            job.target.settle(start, last.start + last.nbytes - start)
        with self._lock:
            job.pending -= 1
            complete = job.pending == 0
        if complete:
            job.target.finish(job.digests)
            with self._lock:
                self._open.remove(job)
            job.target.close()

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self._progress(nbytes)


def _started(crew: list[_Worker]) -> list[_Worker]:
    """Start the workers, or as many as the system has threads for. Raises IoFailed for none."""
    for number, (thread, _) in enumerate(crew):
        try:
            thread.start()
        except RuntimeError:
            if number:
                return crew[:number]
            raise IoFailed(
                "no worker thread can be started",
                cause="the system or this process has as many threads as it may",
                fix="close other programs or raise `ulimit -u`, then run again",
            ) from None
    return crew


def _wait_out(thread: threading.Thread, done: threading.Event) -> None:
    """Wait for a worker that was told to stop; more of Ctrl-C changes nothing about that."""
    while thread.ident is not None and not done.is_set():
        try:
            done.wait(0.2)
        except KeyboardInterrupt:
            continue


def _job(file: OutputFile, target: Target, promised: Promised) -> _Job:
    batches: list[tuple[Tile, ...]] = []
    batch: list[Tile] = []
    size = 0
    for tile in file.tiles:
        cost = _cost(tile, target, promised)
        if batch and size + cost > BATCH_BYTES:
            batches.append(tuple(batch))
            batch, size = [], 0
        batch.append(tile)
        size += cost
    # a file without data still has one batch, so that it is made at all
    batches.append(tuple(batch))
    digests = [[EMPTY_DIGEST] * tensor.units for tensor in file.tensors]
    alone = target.serial and _is_mostly_copied(file, target)
    return _Job(file, target, promised, digests, batches[::-1], len(batches), alone)


def _cost(tile: Tile, target: Target, promised: Promised) -> int:
    """Bytes to move, about: clones that nobody reads cost a call each, and wait for one another."""
    if tile.nbytes > CLONE_COST_BYTES and _clonable(tile, target):
        units = (tile.unit,) if isinstance(tile, CopyTile) else (p.unit for p in tile.pieces)
        if all(promised(tile.tensor, unit) is not None for unit in units):
            return CLONE_COST_BYTES
    return tile.nbytes


def _is_mostly_copied(file: OutputFile, target: Target) -> bool:
    """Whether there is hardly more to do than to copy bytes: nothing to permute, or to clone."""
    copied = 0
    for tile in file.tiles:
        if not isinstance(tile, CopyTile) and not tile.straight:
            return False
        copied += 0 if _clonable(tile, target) else tile.nbytes
    return 2 * copied > file.size


def _clonable(tile: Tile, target: Target) -> bool:
    if isinstance(tile, CopyTile):
        return target.clonable(tile.file, tile.offset, tile.start, tile.nbytes)
    span = tile.spans[0]
    return tile.straight and target.clonable(span.file, span.offset, tile.start, tile.nbytes)
