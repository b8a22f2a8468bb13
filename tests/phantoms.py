"""Checkpoints with true headers and no data: sparse files, so that any model fits on a disk."""

import itertools
import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

from tests.helpers import BITS, INDEX_NAME

Shape = tuple[str, tuple[int, ...]]


def expanded(name: str) -> list[str]:
    """`a.{0-2}.b` as three names."""
    fixed = re.split(r"\{\d+-\d+\}", name)
    ranges = re.findall(r"\{(\d+)-(\d+)\}", name)
    picks = itertools.product(*(range(int(a), int(b) + 1) for a, b in ranges))
    return ["".join(map(str, (*itertools.chain(*zip(fixed, pick)), fixed[-1]))) for pick in picks]  # noqa: B905


def rows(text: str) -> dict[str, Shape]:
    """`NAME DTYPE SIZE,SIZE`, one a line; names with ranges."""
    out: dict[str, Shape] = {}
    for line in text.strip().splitlines():
        name, dtype, sizes = (*line.split(), "")[:3]
        shape = tuple(int(n) for n in sizes.split(",") if n)
        out |= dict.fromkeys(expanded(name), (dtype, shape))
    return out


def phantom(root: Path, tensors: Mapping[str, Shape], config: Mapping[str, object]) -> Path:
    """Two sparse files with these tensors, their index and a config.json."""
    root.mkdir(parents=True)
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in (1, 2):
        file = f"model-{number:05d}-of-00002.safetensors"
        doc, end = {}, 0
        for name in names[number - 1 :: 2]:
            dtype, shape = tensors[name]
            start, end = end, end + prod(shape) * BITS[dtype] // 8
            doc[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
            weight_map[name] = file
        header = json.dumps(doc).encode()
        with (root / file).open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(8 + len(header) + end)
    (root / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (root / "config.json").write_text(json.dumps(config))
    return root
