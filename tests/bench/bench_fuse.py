"""`moeconv fuse` against `cp -r` and against transformers, side by side, all of them durable.

    python -m tests.bench.bench_fuse /fast/disk/folder --layers 3 --pairs 6

Makes a checkpoint of Qwen3-30B-A3B's real shapes (1.25 GB a layer and 1.24 GB beside) in one file
(`--shard-size 1GB`: five), then runs the contenders in turn, the order reversed from round to
round, each as a process of its own; every file that a contender wrote is fsynced inside its time.
The source stays in the page cache for all.
Prints minima and medians of the times, the ratios to `cp` of the same round, and peak memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SAVE_FUSED = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2], save_original_format=False, max_shard_size=sys.argv[3])
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One run: wall seconds with fsync, CPU seconds, peak resident bytes of the process."""

    seconds: float
    cpu: float
    peak: int


def commands(source: Path, out: Path, shard_size: str) -> dict[str, list[str]]:
    """The contenders."""
    return {
        "cp -r": ["cp", "-r", str(source), str(out)],
        "moeconv fuse": [
            sys.executable,
            "-m",
            "moeconv",
            "fuse",
            "-q",
            str(source),
            "-o",
            str(out),
            "--max-shard-size",
            shard_size,
        ],
        "transformers": [sys.executable, "-c", SAVE_FUSED, str(source), str(out), shard_size],
    }


def run(command: list[str], out: Path) -> Run:
    """Run to the last fsynced byte."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    started = time.perf_counter()
    quiet = os.open(os.devnull, os.O_WRONLY)
    pid = os.posix_spawnp(
        command[0],
        command,
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, quiet, 2)],
    )
    os.close(quiet)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed: {os.waitstatus_to_exitcode(status)}")
    for path in [*out.rglob("*"), out]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def report(runs: dict[str, list[Run]], size: int, files: int) -> str:
    """The table."""
    lines = [
        "| | min s | median s | ratio to cp (median of pairs) | CPU s | peak RSS |",
        "|---|---|---|---|---|---|",
    ]
    reference = runs["cp -r"]
    for name, done in runs.items():
        seconds = [r.seconds for r in done]
        ratios = [r.seconds / c.seconds for r, c in zip(done, reference, strict=False)]
        lines.append(
            f"| {name} | {min(seconds):.2f} | {statistics.median(seconds):.2f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{statistics.median(r.cpu for r in done):.1f} | "
            f"{max(r.peak for r in done) / 1e6:,.0f} MB |"
        )
    lines.append(
        f"\n{size:,} bytes in {files} file(s), {len(reference)} rounds, {os.cpu_count()} cores, "
        f"Linux {platform.release()}, Python {platform.python_version()}"
    )
    return "\n".join(lines)


def main() -> None:
    """Make, measure, print, clean up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="on the disk to measure; needs 3 x the size")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--shard-size", default="5GB", help="of source and output; default 5GB")
    parser.add_argument("--without-transformers", action="store_true")
    options = parser.parse_args()
    source, out = options.folder / "source", options.folder / "out"
    # in a process of its own: a child's peak memory counts from what its parent has when it forks
    make = [sys.executable, "-m", "tests.bench.make_checkpoint", source, "--layers"]
    make += [str(options.layers), "--shard-size", options.shard_size]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    size = sum(f.stat().st_size for f in source.iterdir())
    files = len(list(source.glob("*.safetensors")))
    contenders = commands(source, out, options.shard_size)
    if options.without_transformers:
        del contenders["transformers"]
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    show: Callable[[str], object] = sys.stdout.write
    try:
        for number in range(options.pairs + 1):
            names = list(contenders)
            for name in names if number % 2 else names[::-1]:
                done = run(contenders[name], out)
                if number:  # the first round only warms the page cache and the imports
                    runs[name].append(done)
        show(report(runs, size, files) + "\n")
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
