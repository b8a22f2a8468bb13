"""Thread pool: one file per worker; idle workers join the largest unfinished file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from moeconv.checkpoint.model import DataFile
from moeconv.core.digest import EMPTY_DIGEST
from moeconv.core.signals import defer_signals
from moeconv.engine.copy.buffers import BufferPool
from moeconv.engine.copy.sink import TAKE, DigestPlan, Digests, HashSink, Sink, take_all
from moeconv.engine.copy.worker import Stopped, TileRunner
from moeconv.errors import IoFailed, MoeconvError, UsageProblem
from moeconv.plan.model import CopyTile, OutputFile, Tile
from moeconv.store.descriptors import descriptors_left
from moeconv.store.open_files import OpenFiles

BATCH_BYTES: Final = 64 * 1024 * 1024

# A clone of any size takes as long as a copy of this size.
CLONE_COST_BYTES: Final = 64 * 1024

# More threads than this only wait for each other.
MAX_JOBS: Final = 256

# An output file is open twice while it is written: the second descriptor bypasses the page cache.
_DESCRIPTORS_PER_OUTPUT: Final = 2

Progress: TypeAlias = Callable[[int], None]
MakeSink: TypeAlias = Callable[[OutputFile], Sink]
PolicyOf: TypeAlias = Callable[[OutputFile], DigestPlan]
_Worker: TypeAlias = tuple[threading.Thread, threading.Event]  # the event is set when it is done


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run may use: worker threads, and bytes of memory for permuting tiles.

    There are never more threads than batches of work or MAX_JOBS. Raises UsageProblem.
    """

    jobs: int
    max_memory: int

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UsageProblem(
                f"{self.jobs} worker threads cannot do anything",
                fix="pass 1 or more, or drop `--jobs` for the default",
            )


@dataclass(slots=True)
class _Job:
    """One file that is being written, or will be."""

    file: OutputFile
    sink: Sink
    policy: DigestPlan
    digests: Digests
    waiting: list[tuple[Tile, ...]]  # batches, last first
    pending: int
    alone: bool  # no other worker joins
    opened: bool = False
    failed: bool = False
    opening: threading.Lock = field(default_factory=threading.Lock)


def run_tiles(
    files: tuple[OutputFile, ...],
    sources: tuple[DataFile, ...],
    make_sink: MakeSink,
    *,
    limits: Limits,
    progress: Progress,
    policy: PolicyOf = lambda _: take_all,
) -> None:
    """Carry out all tiles of all files.

    policy: for each file, how its units get their digests.
    Raises what a worker raised first. KeyboardInterrupt stops the workers, then propagates.
    """
    queue = [_job(f, make_sink(f), policy(f)) for f in reversed(files)]
    batches = sum(job.pending for job in queue)
    jobs, most = _shares(len(sources), min(limits.jobs, batches, MAX_JOBS))
    with closing(OpenFiles(dict(enumerate(sources)), most=most)) as source:
        _WorkerPool(queue, source, limits.max_memory, progress).work(jobs)
        source.unchanged()


def digests_of(
    files: tuple[OutputFile, ...],
    sources: tuple[DataFile, ...],
    *,
    limits: Limits,
    progress: Progress,
) -> dict[str, Digests]:
    """Read the sources and return the digests of every unit of the planned files, by file name."""
    found: dict[str, Digests] = {}
    run_tiles(files, sources, lambda file: HashSink(file, found), limits=limits, progress=progress)
    return found


def _shares(files: int, jobs: int) -> tuple[int, int]:
    """Return how many workers the limit of open files allows, and how many sources may be open.

    Each worker reads one source at a time and writes to one output file.
    """
    each = _DESCRIPTORS_PER_OUTPUT + 1
    left = descriptors_left(files + _DESCRIPTORS_PER_OUTPUT * jobs)
    jobs = max(min(jobs, left // each), 1)
    return jobs, max(left - _DESCRIPTORS_PER_OUTPUT * jobs, jobs)


class _WorkerPool:
    def __init__(
        self,
        queue: list[_Job],
        sources: OpenFiles,
        max_memory: int,
        progress: Progress,
    ) -> None:
        self._queue = queue  # last first
        self._open: list[_Job] = []
        self._sources = sources
        self._memory = BufferPool(max_memory)
        self._progress = progress
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: BaseException | None = None

    def work(self, jobs: int) -> None:
        """Run the workers to their end; on any failure stop them and wait for them."""
        workers = [
            (threading.Thread(target=self._worker, args=(done,), daemon=True), done)
            for done in (threading.Event() for _ in range(jobs))
        ]
        try:
            # Ctrl-C stops the workers first: files must not be closed while they are written
            with defer_signals(then=self._stop.set):
                workers = _started(workers)
                for _, done in workers:
                    # not `join`, which before 3.13 takes a thread for dead when a signal arrives
                    while not done.wait(0.2):
                        continue
        except BaseException:
            self._stop.set()
            for thread, done in workers:
                _wait_out(thread, done)
            raise
        finally:
            with defer_signals():
                self._close()
        if self._failure is not None:
            raise self._failure

    def _close(self) -> None:
        """Close unfinished files; a failure there is reported only if nothing failed before."""
        for job in self._open:
            try:
                job.sink.close()
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
        """Take a batch of the current file, else of a new file, else of the file with most left."""
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
                job.failed = True  # workers that wait must not try again
                job.sink.open()
                job.opened, job.failed = True, False
        if batch:
            runner.run(job.file, batch, job.digests, job.sink, job.policy)
            start, last = batch[0].start, batch[-1]
            job.sink.batch_written(start, last.start + last.nbytes - start)
        with self._lock:
            job.pending -= 1
            complete = job.pending == 0
        if complete:
            job.sink.finish(job.digests)
            with self._lock:
                self._open.remove(job)
            job.sink.close()

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self._progress(nbytes)


def _started(workers: list[_Worker]) -> list[_Worker]:
    """Start as many workers as the system has threads for. Raises IoFailed if that is none."""
    for number, (thread, _) in enumerate(workers):
        try:
            thread.start()
        except RuntimeError:
            if number:
                return workers[:number]
            raise IoFailed(
                "no worker thread can be started",
                cause="the system or this process has reached its thread limit",
                fix="close other programs or raise `ulimit -u`, then run again",
            ) from None
    return workers


def _wait_out(thread: threading.Thread, done: threading.Event) -> None:
    """Wait for a stopped worker to end, ignoring Ctrl-C."""
    while thread.ident is not None and not done.is_set():
        try:
            done.wait(0.2)
        except KeyboardInterrupt:
            continue


def _job(file: OutputFile, sink: Sink, policy: DigestPlan) -> _Job:
    batches: list[tuple[Tile, ...]] = []
    batch: list[Tile] = []
    size = 0
    for tile in file.tiles:
        cost = _cost(tile, sink, policy)
        if batch and size + cost > BATCH_BYTES:
            batches.append(tuple(batch))
            batch, size = [], 0
        batch.append(tile)
        size += cost
    # a file without data still has one batch, or it would not be created
    batches.append(tuple(batch))
    digests = [[EMPTY_DIGEST] * tensor.units for tensor in file.tensors]
    alone = sink.serial and _is_mostly_copied(file, sink)
    return _Job(file, sink, policy, digests, batches[::-1], len(batches), alone)


def _cost(tile: Tile, sink: Sink, policy: DigestPlan) -> int:
    """Estimate bytes to copy: clones that are not read cost one call each, one at a time."""
    if tile.nbytes > CLONE_COST_BYTES and _can_clone(tile, sink):
        units = (tile.unit,) if isinstance(tile, CopyTile) else (p.unit for p in tile.pieces)
        if all(policy(tile.tensor, unit) is not TAKE for unit in units):
            return CLONE_COST_BYTES
    return tile.nbytes


def _is_mostly_copied(file: OutputFile, sink: Sink) -> bool:
    """Return whether nothing is permuted and most bytes are copied, not cloned."""
    copied = 0
    for tile in file.tiles:
        if not isinstance(tile, CopyTile) and not tile.is_identity:
            return False
        copied += 0 if _can_clone(tile, sink) else tile.nbytes
    return 2 * copied > file.size


def _can_clone(tile: Tile, sink: Sink) -> bool:
    if isinstance(tile, CopyTile):
        return sink.can_clone(tile.file, tile.offset, tile.start, tile.nbytes)
    span = tile.spans[0]
    return tile.is_identity and sink.can_clone(span.file, span.offset, tile.start, tile.nbytes)
