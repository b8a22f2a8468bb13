"""Loading one rank: `moeconv.runtime` against stock safetensors on the same files, in turn.

    python -m tests.bench.bench_load /fast/disk/folder --layers 2 --ep 4 --device cuda

Makes a checkpoint of Qwen3-30B-A3B's real shapes and an expert-parallel set of it, then loads rank
1 again and again, the order alternating, files in the page cache. Every byte is held against the
other's once. Prints median seconds, GB/s, and the ratio to safetensors' own loader.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import moeconv
import moeconv.runtime
from tests.bench.make_checkpoint import write_qwen3_30b

Loaded = dict[str, torch.Tensor]


def contenders(out: Path, ep: int, device: str) -> dict[str, Callable[[], Loaded]]:
    """The ways to have a rank's tensors on a device."""
    mine = [*sorted(out.glob("common-*")), *sorted(out.glob(f"rank-00001-of-{ep:05d}-*"))]
    into: Loaded = {}

    def stock() -> Loaded:
        return {n: t for path in mine for n, t in load_file(path, device=device).items()}

    def ours() -> Loaded:
        loaded = moeconv.runtime.open(out, ep_rank=1, ep_size=ep).load(device)
        return {n: t.clone() for n, t in loaded.items()} if device == "cpu" else loaded

    def again() -> Loaded:
        """The same memory each time, as for new weights of a model in training."""
        if not into:
            shard = moeconv.runtime.open(out, ep_rank=1, ep_size=ep)
            for number, (name, tensor) in enumerate(shard.load().items()):
                into[name] = torch.empty_like(tensor, device=device)
                holder.register_parameter(
                    f"p{number}", torch.nn.Parameter(into[name], requires_grad=False)
                )
            names = {n: f"p{k}" for k, n in enumerate(shard.names)}
            kept.append(shard.updater(holder, rename=names.__getitem__))
        kept[0].load(moeconv.runtime.open(out, ep_rank=1, ep_size=ep))
        return into

    holder = torch.nn.Module()
    kept: list[moeconv.runtime.Updater] = []
    return {"safetensors load_file": stock, "moeconv load": ours, "moeconv updater": again}


def seconds(load: Callable[[], Loaded], device: str) -> tuple[float, Loaded]:
    """How long it took until every byte was there."""
    gc.collect()
    started = time.perf_counter()
    loaded = load()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started, loaded


def main() -> None:
    """Make, compare, measure, print, clean up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ep", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    source, out = options.folder / "source", options.folder / "set"
    write_qwen3_30b(source, layers=options.layers)
    moeconv.shard(source, out, ep_size=options.ep)
    shutil.rmtree(source)
    try:
        ways = contenders(out, options.ep, options.device)
        reference = ways["safetensors load_file"]()
        size = sum(t.numel() * t.element_size() for t in reference.values())
        for name, way in ways.items():
            found = way()
            assert found.keys() == reference.keys(), name
            assert all(torch.equal(found[n], t) for n, t in reference.items()), name
        del found, reference
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.rounds):
            for name in list(ways) if number % 2 else list(ways)[::-1]:
                took, loaded = seconds(ways[name], options.device)
                del loaded
                times[name].append(took)
        stock = times["safetensors load_file"]
        sys.stdout.write("| | median s | GB/s | ratio (median of rounds) |\n|---|---|---|---|\n")
        for name, took in times.items():
            median = statistics.median(took)
            ratio = statistics.median(a / b for a, b in zip(took, stock, strict=True))
            sys.stdout.write(
                f"| {name} | {median:.3f} | {size / median / 1e9:.1f} | {ratio:.2f} |\n"
            )
        where = torch.cuda.get_device_name() if options.device != "cpu" else "CPU"
        sys.stdout.write(f"\n{size:,} bytes, {options.rounds} rounds, {where}\n")
    finally:
        shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
