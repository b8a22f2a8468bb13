"""A whole published model where nothing is copied: `moeconv` against `cp`, scaled by bytes.

    python -m tests.bench.bench_clones /fast/disk/folder --pairs 6

As root, on XFS and on btrfs on loop devices in the folder: Qwen3-30B-A3B's 61 GB, all of it blocks
of their own. They are zeros, and the images keep holes for them, so that the folder needs 20 GB; to
copy the whole it would need more, so `cp` copies one of its files, 5 GB, and its seconds are
multiplied by what the whole has more of bytes. Once as published, in files of 5 GB that cut layers
in two, and once in one file.

Prints a table as `bench_fuse` does, with the same contenders where blocks are shared.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Final

from moeconv.engine.copy.syscalls import clone_range
from tests.bench.bench_fuse import COPY, Commands, ours, rounds, say
from tests.bench.make_checkpoint import write_phantom
from tests.bench.measured import HEAD, row
from tests.filesystems import MAKE, image_of, mounted

MODEL: Final = "qwen3-30b-a3b"
BLOCK: Final = 4096
POOL_BYTES: Final = 60 << 30
STEP_BYTES: Final = 4 << 30
# leaves 18 GiB for outputs, so that the image cannot grow to more
IMAGE_BYTES: Final = 78 << 30


def fill(pool: Path) -> None:
    """Write the pool; the image gets its blocks back, a step at a time. Only zeros are taken."""
    zeros = bytes(8 << 20)
    with pool.open("wb", buffering=0) as stream:
        for _ in range(0, POOL_BYTES, STEP_BYTES):
            for _ in range(0, STEP_BYTES, len(zeros)):
                stream.write(zeros)
            os.fsync(stream.fileno())
            _dig(pool.parent)


def _dig(place: Path) -> None:
    """Make holes of the zeros in the image of what is mounted there, while nothing writes to it.

    Ctrl-C waits: nobody could even close a file in what stays frozen.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        subprocess.run(["fsfreeze", "--freeze", place], check=True)
        subprocess.run(["fallocate", "--dig-holes", image_of(place)], check=True)
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", place], check=False)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def solid(folder: Path, pool: Path) -> int:
    """Give a phantom's holes blocks: clones of the pool's, each of them once; bytes.

    Blocks with many owners would not do: on XFS each costs the more, the more others it has.
    """
    total = taken = 0
    with pool.open("rb") as blocks:
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            with path.open("r+b") as stream:
                # the first block is the header's, the last may be a part of one
                header = -(-(8 + int.from_bytes(stream.read(8), "little")) // BLOCK) * BLOCK
                nbytes = size // BLOCK * BLOCK - header
                if not clone_range(blocks.fileno(), taken, stream.fileno(), header, nbytes):
                    raise SystemExit(f"{folder}: blocks cannot be cloned here")
                taken += nbytes
            total += size
    return total


def contenders(source: Path, fused: Path, out: Path, sample: Path) -> Commands:
    """`cp` of one file, and moeconv on the whole."""
    return {
        COPY: ["cp", "-r", "--reflink=never", sample, out],
        "fuse --align source --digests later": ours(
            "fuse", source, out, "--align", "source", "--digests", "later"
        ),
        "shard --ep 8 --align source of that": ours(
            "shard", fused, out, "--ep", "8", "--align", "source"
        ),
    }


def one(kind: str, place: Path, pool: Path, shard_bytes: int, pairs: int) -> None:
    """Make the model in files of at most so many bytes, measure, and take it away again."""
    source, fused, sample = place / "source", place / "fused", place / "sample"
    write_phantom(source, MODEL, shard_bytes=shard_bytes)
    nbytes = solid(source, pool)
    files = sorted(source.glob("*.safetensors"))
    sample.mkdir()
    with files[0].open("rb") as whole, (sample / "part").open("wb") as part:
        part.truncate(min(files[0].stat().st_size, 5_000_000_000) // BLOCK * BLOCK)
        if not clone_range(whole.fileno(), 0, part.fileno(), 0, part.seek(0, os.SEEK_END)):
            raise SystemExit(f"{sample}: blocks cannot be cloned here")
    scale = nbytes / (sample / "part").stat().st_size
    prepared = ours("fuse", source, fused, "--align", "source")
    subprocess.run(prepared, check=True, stdout=subprocess.DEVNULL)
    runs = rounds(contenders(source, fused, place / "out", sample), place / "out", pairs)
    reference = [replace(run, seconds=run.seconds * scale) for run in runs[COPY]]
    where = f"{kind}, {len(files)} file(s)"
    say(row(f"{where}: {COPY}, scaled by {scale:.1f}", reference, reference))
    for name, done in runs.items():
        if name != COPY:
            say(row(f"{where}: moeconv {name}", done, reference))
    for folder in (source, fused, sample):
        shutil.rmtree(folder)


def main() -> None:
    """Make, measure, print, clean up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="on the disk to measure; needs 20 GB")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--kind", choices=tuple(MAKE), help="only this file system")
    options = parser.parse_args()
    if os.geteuid():
        raise SystemExit("to mount a file system that clones needs root")
    say(HEAD)
    for kind in [options.kind] if options.kind else MAKE:
        with mounted(MAKE[kind], options.folder, IMAGE_BYTES) as place:
            pool = place / "pool"
            fill(pool)
            for shard_bytes in (5_000_000_000, 10**12):
                one(kind, place, pool, shard_bytes, options.pairs)


if __name__ == "__main__":
    main()
