"""Make big checkpoints: real shapes with random BF16 data, or whole models with sparse data.

python make_checkpoint.py OUT --layers 4              Qwen3-30B-A3B, 4 of its layers, 6.2 GB
python make_checkpoint.py OUT --phantom deepseek-v3   91,991 tensors, 688.6 GB, hardly any disk
"""

import argparse
import json
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tests.bench.real_models import (
    ITEM_BYTES,
    PHANTOMS,
    QWEN3_30B_LAYERS,
    Model,
    Tensor,
    qwen3_30b,
)

DEFAULT_SHARD_BYTES = 5_000_000_000

_FILE_ORDER = {dtype: rank for rank, dtype in enumerate(ITEM_BYTES)}

# A prime: windows at different offsets differ, and no tensor's rows repeat in step with the pool.
_POOL_VALUES = 33_554_393
_POOL_STRIDE = 7_368_787


def write_qwen3_30b(
    directory: Path, *, layers: int, shard_bytes: int = DEFAULT_SHARD_BYTES, seed: int = 0
) -> int:
    """Write the first `layers` layers' shapes of Qwen3-30B-A3B with random data; return the bytes.

    Every value is finite BF16; every tensor differs from every other.
    """
    if not 1 <= layers <= QWEN3_30B_LAYERS:
        raise ValueError(f"layers must be 1 to {QWEN3_30B_LAYERS}, got {layers}")
    model = qwen3_30b(layers)
    order = {tensor.name: number for number, tensor in enumerate(model.tensors())}
    pool = _finite_bf16(seed)

    def fill(file: BinaryIO, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            _write_window(file, pool, order[tensor.name] * _POOL_STRIDE, tensor.nbytes // 2)

    return sum(tensor.nbytes for tensor in _write(directory, model, shard_bytes, fill))


def write_phantom(directory: Path, model: str, *, shard_bytes: int = DEFAULT_SHARD_BYTES) -> int:
    """Write a whole model with true headers over holes; return the number of tensors."""
    if model not in PHANTOMS:
        raise ValueError(f"no phantom {model!r}; there are {', '.join(PHANTOMS)}")

    def fill(file: BinaryIO, tensors: Sequence[Tensor]) -> None:
        file.truncate(file.tell() + sum(tensor.nbytes for tensor in tensors))

    return len(_write(directory, PHANTOMS[model](), shard_bytes, fill))


def _write(
    directory: Path,
    model: Model,
    shard_bytes: int,
    fill: Callable[[BinaryIO, Sequence[Tensor]], None],
) -> list[Tensor]:
    """Write config, shards and index; `fill` writes the data behind a file's header."""
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty")
    tensors = list(model.tensors())
    shards = _shards(tensors, shard_bytes)
    weight_map: dict[str, object] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):0{model.count_digits}d}.safetensors"
        in_file = sorted(shard, key=lambda tensor: (_FILE_ORDER[tensor.dtype], tensor.name))
        with (directory / name).open("wb", buffering=0) as file:
            file.write(_header(in_file))
            fill(file, in_file)
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
    total_size = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", model.config)
    return tensors


def _shards(tensors: Sequence[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """Cut the tensors into runs of at most `shard_bytes`; a larger tensor is alone in its file."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _header(tensors: Sequence[Tensor]) -> bytes:
    """The first bytes of a safetensors file, as the safetensors library writes them."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _finite_bf16(seed: int) -> memoryview:
    """Random bytes of finite BF16 values, [2 * _POOL_VALUES]: any sign, 2**-15 <= |x| < 2**-7."""
    rng = np.random.Generator(np.random.SFC64(seed))
    pool = rng.integers(0, 1 << 16, _POOL_VALUES, dtype=np.uint16)
    pool &= 0x83FF
    pool |= 0x3800
    return pool.data.cast("B")


def _write_window(file: BinaryIO, pool: memoryview, start: int, count: int) -> None:
    """Write `count` values of the endless repetition of `pool` from value `start` on."""
    position = start % _POOL_VALUES * 2
    missing = count * 2
    while missing:
        written = file.write(pool[position : position + missing])
        missing -= written
        position = (position + written) % len(pool)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty directory")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--layers", type=int, metavar="N", help="Qwen3-30B-A3B, N layers, real data")
    what.add_argument("--phantom", choices=tuple(PHANTOMS), help="a whole model, sparse data")
    size_help = "of a file, as 5GB or 200MB (decimal) or in bytes; default 5GB"
    parser.add_argument("--shard-size", type=_size, default=DEFAULT_SHARD_BYTES, help=size_help)
    parser.add_argument("--seed", type=int, default=0, help="of the random data; default 0")
    options = parser.parse_args(arguments)
    if options.phantom is not None:
        count = write_phantom(options.out, options.phantom, shard_bytes=options.shard_size)
        sys.stdout.write(f"{count:,} tensors\n")
    else:
        nbytes = write_qwen3_30b(
            options.out, layers=options.layers, shard_bytes=options.shard_size, seed=options.seed
        )
        sys.stdout.write(f"{nbytes:,} bytes\n")


def _size(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    unit = text[-2:].upper()
    size = int(float(text[:-2]) * units[unit]) if unit in units else int(text)
    if size < 1:
        raise ValueError(text)
    return size


if __name__ == "__main__":
    main()
