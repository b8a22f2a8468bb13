"""One command as a process of its own, to the last fsynced byte: seconds, memory, bytes."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Run:
    """One run. seconds: wall, with the fsync of every file; cpu: seconds, user and system.

    A command that prints a JSON object with `seconds` has measured its work itself, without its
    own start.

    anonymous: peak bytes of memory that is no file's, the table's "peak memory"; read, written:
    bytes that it asked the kernel for and gave it; cloned: what moeconv says of blocks that it
    shares with the source.
    """

    seconds: float
    cpu: float
    anonymous: int
    read: int
    written: int
    cloned: int


def measured(command: Sequence[str | Path], out: Path) -> Run:
    """Run a command that makes `out`, and take `out` away again. Exits where it fails."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    with tempfile.TemporaryFile("w+") as stdout:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=stdout, stderr=subprocess.DEVNULL, env=_environment()
        )
        try:
            with _Peak(process.pid) as peak:
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
                moved = _moved(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:  # Ctrl-C
            if process.returncode is None:
                process.kill()
                process.wait()
        ended = time.perf_counter()
        for path in [*out.rglob("*"), out]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        durable = time.perf_counter() - ended
        stdout.seek(0)
        said = stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed: {process.returncode}")
    shutil.rmtree(out)
    cpu = usage.ru_utime + usage.ru_stime
    doc = json.loads(said) if said.startswith("{") else {}
    seconds = float(doc.get("seconds", ended - started)) + durable
    cloned = int((doc.get("copying") or {}).get("cloned", 0))
    return Run(seconds, cpu, peak.bytes, moved["rchar"], moved["wchar"], cloned)


def _environment() -> dict[str, str]:
    """As installed packages have it: byte code is kept, and not made anew for each run."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


class _Peak:
    """Looks at a process's anonymous memory until it ends."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._path = Path(f"/proc/{pid}/status")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            try:
                lines = self._path.read_text().splitlines()
            except OSError:
                return
            kinds = ("RssAnon:", "RssShmem:")
            sizes = (int(line.split()[1]) for line in lines if line.startswith(kinds))
            self.bytes = max(self.bytes, sum(sizes) * 1024)


def _moved(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return {key: int(value) for key, value in (line.split(": ") for line in lines)}


HEAD = (
    "| | median s | least s | ratio to cp | CPU s | peak memory | read | written | cloned |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def row(name: str, runs: Sequence[Run], reference: Sequence[Run]) -> str:
    """A line of the table; the ratio is the median of those of one round, least to greatest."""
    seconds = [r.seconds for r in runs]
    ratios = [r.seconds / c.seconds for r, c in zip(runs, reference, strict=True)]
    last = runs[-1]
    return (
        f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
        f"{statistics.median(r.cpu for r in runs):.1f} | "
        f"{max(r.anonymous for r in runs) / 1e6:,.0f} MB | {last.read / 1e9:.2f} GB | "
        f"{last.written / 1e9:.2f} GB | {last.cloned / 1e9:.2f} GB |"
    )
