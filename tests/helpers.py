"""Checkpoints written and read byte by byte, with nothing of moeconv, torch or safetensors.

A tensor is (dtype, shape, bytes), so every dtype works, those without a NumPy type too.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Final, TypeAlias

Spec: TypeAlias = tuple[str, tuple[int, ...], bytes]

INDEX_NAME: Final = "model.safetensors.index.json"
BITS: Final = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E8M0": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """The bytes of a tensor, which must be whole ones."""
    bits = BITS[dtype] * prod(shape)
    assert bits % 8 == 0, f"{dtype} {list(shape)} does not fill whole bytes"
    return bits // 8


def write_file(
    path: Path,
    tensors: Mapping[str, Spec],
    *,
    header_order: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    padding: int = 0,
) -> None:
    """Write one safetensors file, its data in the order of `tensors`.

    header_order: the names as the header lists them; metadata: None leaves `__metadata__` out;
    padding: spaces after the header's JSON.
    """
    places: dict[str, object] = {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        assert len(data) == nbytes(dtype, shape), name
        start, end = end, end + len(data)
        places[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    doc: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    doc |= {name: places[name] for name in header_order or places}
    header = json.dumps(doc, ensure_ascii=False).encode() + b" " * padding
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.writelines(data for _, _, data in tensors.values())


def write_checkpoint(
    root: Path,
    tensors: Mapping[str, Spec],
    config: Mapping[str, object],
    *,
    shards: Sequence[Sequence[str]] | None = None,
    file_names: Sequence[str] | None = None,
    index: bool | None = None,
    index_name: str = INDEX_NAME,
    index_metadata: Mapping[str, object] | None = None,
    padding: Sequence[int] = (0,),
) -> Path:
    """Write a checkpoint in a new directory and return it.

    shards: the names in each file, in data order; by default there is one file.
    index: whether to write one; by default where there is more than one file.
    index_metadata: by default the true total_size; {} leaves `metadata` out.
    padding: of each file's header in turn, repeated as needed.
    """
    shards = [list(tensors)] if shards is None else shards
    assert sorted(n for shard in shards for n in shard) == sorted(tensors)
    count = len(shards)
    numbered = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    file_names = file_names or (numbered if count > 1 else ["model.safetensors"])
    root.mkdir(parents=True)
    for number, (name, shard) in enumerate(zip(file_names, shards, strict=True)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)  # names may have folders
        write_file(
            root / name,
            {n: tensors[n] for n in shard},
            metadata={"format": "pt"},
            padding=padding[number % len(padding)],
        )
    if index if index is not None else count > 1:
        total = sum(len(data) for _, _, data in tensors.values())
        metadata = {"total_size": total} if index_metadata is None else index_metadata
        weight_map = {n: f for f, shard in zip(file_names, shards, strict=True) for n in shard}
        doc = ({"metadata": metadata} if metadata else {}) | {"weight_map": weight_map}
        (root / index_name).write_text(json.dumps(doc, indent=2, ensure_ascii=False), "utf-8")
    (root / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    return root


def read_header(path: Path) -> tuple[int, dict[str, tuple[str, tuple[int, ...], int, int]]]:
    """Where the data of a safetensors file starts, and (dtype, shape, start, end) by name.

    start and end count from the beginning of the file.
    """
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        doc = json.loads(stream.read(size))
    base = 8 + size
    doc.pop("__metadata__", None)
    return base, {
        name: (e["dtype"], tuple(e["shape"]), *(base + at for at in e["data_offsets"]))
        for name, e in doc.items()
    }


def read_tensors(root: Path) -> dict[str, Spec]:
    """All tensors of the files that the index names, or without one of all safetensors files.

    A name in two files is a failure.
    """
    found: dict[str, Spec] = {}
    paths = set(root.glob("*.safetensors"))
    if (root / INDEX_NAME).exists():
        index = json.loads((root / INDEX_NAME).read_bytes())
        paths = {root / file for file in index["weight_map"].values()}
    for path in sorted(paths):
        data = path.read_bytes()
        for name, (dtype, shape, start, end) in read_header(path)[1].items():
            assert name not in found, f"{name} is in two files"
            found[name] = (dtype, shape, data[start:end])
    return found


def tree_sha256(root: Path) -> dict[str, str]:
    """SHA-256 by relative path of every file below `root`; links are not followed, but named."""
    out = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            out[name] = f"link to {path.readlink()}"
        elif path.is_file():
            out[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return out
