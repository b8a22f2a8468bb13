"""A writer that dies on the spot at a chosen call: `python -m tests.faults.killed SRC OUT SEED N`.

Every call that changes the disk is counted; one of them, drawn anew for each run, is the last.
Runs are forked from one process, so that a kill costs milliseconds. Prints, as JSON lines, what
each run left: the number of its last call, how many there would have been, and the folder.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import moeconv
from tests.calls import around

CALLS = (
    "open", "mkdir", "rename", "replace", "fsync", "write", "pwrite", "copy_file_range", "truncate",
    "unlink", "rmdir",
)  # fmt: skip


def count_calls(limit: int | None) -> Callable[[], int]:
    """Wrap the calls of `os`; at the `limit`-th the process dies. Returns a way to ask how many."""
    done = 0

    def counted() -> None:
        nonlocal done
        done += 1
        if done == limit:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in CALLS:
        setattr(os, name, around(getattr(os, name), before=counted))
    return lambda: done


def forked(work: Callable[[], None]) -> int:
    """The wait status of a child that does this and nothing else."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - a child must not come back into the parent's code
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def write(src: Path, out: Path, limit: int | None, told: Path | None = None) -> None:
    """One run, from the first call to its last one."""
    asked = count_calls(limit)
    moeconv.shard(src, out, ep_size=2, redundant=2, max_shard_size=150_000, jobs=2)
    if told is not None:
        told.write_text(str(asked()))


def main() -> None:
    """Count once, then kill as often as asked."""
    src, out, seed, times = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    told = out.with_name("calls")
    assert forked(lambda: write(src, out.with_name("whole"), None, told)) == 0
    calls = int(told.read_text())
    rng = random.Random(seed)
    for number in range(times):
        last = rng.randint(1, calls)
        place = out.with_name(f"{out.name}-{number}")
        status = forked(lambda: write(src, place, last))  # noqa: B023 - used before the next turn
        doc = {"last": last, "calls": calls, "out": str(place), "status": status}
        sys.stdout.write(json.dumps(doc) + "\n")


if __name__ == "__main__":
    main()
