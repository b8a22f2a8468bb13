"""Turning and de-interleaving matrices: the engine on one core, plain NumPy and a copy, in turn.

    python -m tests.bench.bench_turn --rounds 7

Plans two experts of real shapes from and to layouts that store them turned, and carries out the
tiles that permute, memory to memory: what is timed of the engine is its whole work on a tile (to
copy the source's bytes, to turn them, digests), of the peers only `target[...] = source` and a
plain copy of the bytes. Prints GB/s, medians, and the ratio to plain NumPy.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

import moeconv
from moeconv.engine.copy.buffers import Allocate, BufferPool, mapped
from moeconv.engine.copy.permute import memory_of, permute, view
from moeconv.plan.model import PermuteTile, Span

EXPERTS: Final = 2
LIMIT: Final = 4 << 30
ENGINE, NUMPY, COPY = "moeconv", "plain NumPy", "copy"
Stacks = dict[str, tuple[int, ...]]
Ways = dict[str, Callable[[], None]]


@dataclass(frozen=True, slots=True)
class Turned:
    """A model whose published experts are stacks `[E, …]` of matrices stored turned."""

    model: str
    layout: str
    config: dict[str, object]
    stacks: Stacks


def _models() -> list[Turned]:
    def config(model_type: str, hidden: int, width: int, **more: object) -> dict[str, object]:
        sizes: dict[str, object] = {"num_hidden_layers": 1, "hidden_size": hidden}
        return {"model_type": model_type, **sizes, "intermediate_size": width, **more}

    def pair(prefix: str, hidden: int, width: int) -> Stacks:
        return {
            f"{prefix}.gate_up_proj": (EXPERTS, hidden, 2 * width),
            f"{prefix}.down_proj": (EXPERTS, width, hidden),
        }

    gpt = pair("model.layers.0.mlp.experts", 2880, 2880)
    gpt["model.layers.0.mlp.experts.gate_up_proj_bias"] = (EXPERTS, 2 * 2880)
    gpt["model.layers.0.mlp.experts.down_proj_bias"] = (EXPERTS, 2880)
    vision = {"text_config": config("qwen3_vl_moe_text", 2048, 6144, moe_intermediate_size=768)}
    vision["text_config"]["num_experts"] = EXPERTS
    return [
        Turned(
            "Qwen3-VL-30B-A3B",
            "hub",
            {"model_type": "qwen3_vl_moe", **vision},
            pair("model.language_model.layers.0.mlp.experts", 2048, 768),
        ),
        Turned(
            "gpt-oss (bf16)", "fused", config("gpt_oss", 2880, 2880, num_local_experts=EXPERTS), gpt
        ),
        Turned(
            "Llama-4-Maverick",
            "fused",
            config("llama4_text", 5120, 8192, num_local_experts=EXPERTS, moe_layers=[0]),
            pair("model.layers.0.feed_forward.experts", 5120, 8192),
        ),
    ]


def write(folder: Path, model: Turned) -> None:
    """A checkpoint with true headers over holes, which read as zeros."""
    folder.mkdir()
    entries: dict[str, object] = {}
    end = 0
    for name, shape in model.stacks.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + end)
    (folder / "config.json").write_text(json.dumps(model.config))


def permuting(source: Path, layout: str, out: Path) -> list[PermuteTile]:
    """The tiles of a conversion whose matrices change their order, one of each kind."""
    plan = moeconv.fuse(source, out, layout=layout).plan
    tiles = [
        tile
        for file in plan.files
        for tile in file.tiles
        if isinstance(tile, PermuteTile) and len(tile.pieces[0].shape) == 2 and not tile.is_identity
    ]
    kinds = {
        (tile.nbytes, *((p.shape, p.src_strides, p.dst_strides) for p in tile.pieces)): tile
        for tile in tiles
    }
    return list(kinds.values())


def ways(tile: PermuteTile, pool: memoryview, memory: BufferPool) -> Ways:
    """The contenders, on spans that all begin where the pool does."""

    def read(span: Span, into: memoryview) -> memoryview:
        into[:] = pool[: span.nbytes]
        return into

    def engine() -> None:
        with memory.hold(memory_of(tile)) as take:
            permute(tile, read, take)

    items = np.frombuffer(pool, dtype=f"u{tile.itemsize}")
    out = np.frombuffer(mapped(tile.nbytes), dtype=items.dtype)
    out[...] = 0

    def plain() -> None:
        for p in tile.pieces:
            target = view(out, p.target, p.shape)
            target[...] = view(items, p.source, p.shape)

    def copy() -> None:
        out[...] = items[: len(out)]

    def whole(take: Allocate) -> bytes:
        return bytes(permute(tile, read, take)[0])

    plain()
    with memory.hold(memory_of(tile)) as take:
        if whole(take) != out.tobytes():
            raise SystemExit("the engine and NumPy differ")
    return {ENGINE: engine, NUMPY: plain, COPY: copy}


def main() -> None:
    """Plan, compare, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    pool = memoryview(np.random.default_rng(0).bytes(512 << 20))
    sys.stdout.write(f"| tile | MB | {ENGINE} | {NUMPY} | {COPY} | ratio to NumPy |\n")
    sys.stdout.write("|---|---|---|---|---|---|\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in _models():
            source, apart, again = (folder / part for part in ("source", "apart", "again"))
            write(source, model)
            for label, tiles in (
                (f"{model.model} to per-expert", permuting(source, "per-expert", apart)),
                (f"{model.model} from per-expert", permuting(apart, model.layout, again)),
            ):
                for tile in tiles:
                    _measure(label, ways(tile, pool, BufferPool(LIMIT)), tile, rounds)
            for used in (source, apart, again):
                shutil.rmtree(used)


def _measure(label: str, found: Ways, tile: PermuteTile, rounds: int) -> None:
    """One row: a tile's contenders in turn."""
    times: dict[str, list[float]] = {way: [] for way in found}
    for _ in range(rounds):
        for way, run in found.items():
            started = time.perf_counter()
            run()
            times[way].append(time.perf_counter() - started)
    rates = [tile.nbytes / statistics.median(took) / 1e9 for took in times.values()]
    pairs = zip(times[ENGINE], times[NUMPY], strict=True)
    ratio = statistics.median(plain / ours for ours, plain in pairs)
    shape = " x ".join(map(str, tile.pieces[0].shape))
    sys.stdout.write(
        f"| {label}, {len(tile.pieces)} of {shape} | {tile.nbytes / 1e6:.0f} | "
        f"{' | '.join(f'{rate:.2f}' for rate in rates)} | {ratio:.1f} |\n"
    )


if __name__ == "__main__":
    main()
