"""`moeconv fuse` against `cp -r`, transformers and a plain script, side by side, all durable.

    python -m tests.bench.bench_fuse /fast/disk/folder --layers 3 --pairs 6

Makes a checkpoint of Qwen3-30B-A3B's real shapes (1.25 GB a layer and 1.24 GB beside) in one file
(`--shard-size 1GB`: five), then runs the contenders in turn, the order reversed from round to
round, each as a process of its own; every file that a contender wrote is fsynced inside its time.
The source stays in the page cache for all. As root the same again on XFS and on btrfs, on loop
devices in the folder, where moeconv clones: a source of others with `--align source`, and its own
output, fused already, into an expert-parallel set.

Prints one table. Ratios are to the `cp` of the same file system and round.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from tests.bench.measured import HEAD, Run, measured, row
from tests.filesystems import MAKE, mounted

Commands: TypeAlias = dict[str, list[str | Path]]
COPY = "cp -r --reflink=never"

SAVE_FUSED = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2], save_original_format=False, max_shard_size=sys.argv[3])
"""

STACK_AND_SAVE = """
import re, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
source, out = map(Path, sys.argv[1:3])
tensors = {n: t for f in sorted(source.glob("*.safetensors")) for n, t in load_file(f).items()}
experts = 1 + max(int(m[1]) for n in tensors if (m := re.search(r"experts\\.(\\d+)\\.", n)))
for stack in sorted({n.split(".experts.")[0] for n in tensors if ".experts." in n}):
    take = lambda e, p: tensors.pop(f"{stack}.experts.{e}.{p}_proj.weight")
    pairs = [torch.cat([take(e, "gate"), take(e, "up")]) for e in range(experts)]
    tensors[f"{stack}.experts.gate_up_proj"] = torch.stack(pairs)
    tensors[f"{stack}.experts.down_proj"] = torch.stack([take(e, "down") for e in range(experts)])
out.mkdir()
save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
"""

IN_PYTHON = """
import json, sys, time, moeconv
from moeconv.core.text import parse_size
verb, source, out, size = getattr(moeconv, sys.argv[1]), *sys.argv[2:4], parse_size(sys.argv[4])
options = json.loads(sys.argv[5])
started = time.perf_counter()
done = verb(source, out, max_shard_size=size, **options)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "copying": {"cloned": done.methods.tally.cloned}}))
"""


def ours(verb: str, source: Path, out: Path, *more: str) -> list[str | Path]:
    """A command of moeconv that says what it copied."""
    return [sys.executable, "-m", "moeconv", verb, "-q", "--json", source, "-o", out, *more]


def copying(source: Path, out: Path, shard_size: str, *, others: bool) -> Commands:
    """The contenders where every byte is copied."""
    found: Commands = {
        COPY: ["cp", "-r", "--reflink=never", source, out],
        "moeconv fuse": ours("fuse", source, out, "--max-shard-size", shard_size),
    }
    if others:
        found["transformers, load and save fused"] = [
            sys.executable, "-c", SAVE_FUSED, source, out, shard_size,
        ]  # fmt: skip
        found["a script: load, stack, save"] = [sys.executable, "-c", STACK_AND_SAVE, source, out]
    return found


def cloning(source: Path, fused: Path, out: Path, shard_size: str) -> Commands:
    """The contenders where blocks can be shared."""
    size = ("--max-shard-size", shard_size)
    aligned = ("fuse", source, out, "--align", "source", *size)

    def called(verb: str, where: Path, options: str) -> list[str | Path]:
        return [sys.executable, "-c", IN_PYTHON, verb, where, out, shard_size, options]

    return {
        COPY: ["cp", "-r", "--reflink=never", source, out],
        "moeconv fuse": ours("fuse", source, out, *size),
        "moeconv fuse --align source": ours(*aligned),
        "moeconv fuse --align source --digests later": ours(*aligned, "--digests", "later"),
        "moeconv.fuse(align='source', digests='later') in a running Python": called(
            "fuse", source, '{"align": "source", "digests": "later"}'
        ),
        "moeconv shard --ep 8 of its own output": ours("shard", fused, out, "--ep", "8", *size),
        "moeconv.shard(ep_size=8) of that in a running Python": called(
            "shard", fused, '{"ep_size": 8}'
        ),
    }


def rounds(commands: Commands, out: Path, count: int) -> dict[str, list[Run]]:
    """All contenders so many times; a first round warms the page cache and is not counted."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(count + 1):
        names = list(commands)
        for name in names if number % 2 else names[::-1]:
            done = measured(commands[name], out)
            if number:
                runs[name].append(done)
    return runs


def lines(where: str, runs: dict[str, list[Run]]) -> Iterator[str]:
    """The table's lines of one file system."""
    for name, done in runs.items():
        yield row(f"{where}: {name}", done, runs[COPY])


def made(source: Path, layers: int, shard_size: str) -> tuple[int, int]:
    """Make the checkpoint; its bytes and files."""
    # in a process of its own: a child's peak memory counts from what its parent has when it forks
    command = [sys.executable, "-m", "tests.bench.make_checkpoint", source, "--layers"]
    command += [str(layers), "--shard-size", shard_size]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    files = list(source.glob("*.safetensors"))
    return sum(f.stat().st_size for f in source.iterdir()), len(files)


def say(text: str) -> None:
    """Print at once: a run takes minutes."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Make, measure, print, clean up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="on the disk to measure; needs 3 x the size")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--shard-size", default="5GB", help="of source and output; default 5GB")
    parser.add_argument("--without-others", action="store_true", help="only cp and moeconv")
    parser.add_argument("--without-clones", action="store_true", help="only the folder's own disk")
    options = parser.parse_args()
    source, out = options.folder / "source", options.folder / "out"
    size, files = made(source, options.layers, options.shard_size)
    say(HEAD)
    try:
        commands = copying(source, out, options.shard_size, others=not options.without_others)
        for line in lines("disk", rounds(commands, out, options.pairs)):
            say(line)
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    for kind in () if options.without_clones or os.geteuid() else MAKE:
        if shutil.which(MAKE[kind][0]) is None:
            continue
        with mounted(MAKE[kind], options.folder, 4 * size + (1 << 30)) as place:
            source, fused, out = place / "source", place / "fused", place / "out"
            made(source, options.layers, options.shard_size)
            subprocess.run(ours("fuse", source, fused), check=True, stdout=subprocess.DEVNULL)
            commands = cloning(source, fused, out, options.shard_size)
            for line in lines(kind, rounds(commands, out, options.pairs)):
                say(line)
    say(
        f"\n{size:,} bytes in {files} file(s), {options.pairs} rounds, {os.cpu_count()} cores, "
        f"Linux {platform.release()}, Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
