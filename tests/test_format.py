"""FORMAT.md read literally: a reader made from its text alone, and its own examples."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import moeconv
from moeconv.demo import make_checkpoint
from tests.helpers import tree_sha256, write_checkpoint
from tests.test_docs import ROOT, block

FORMAT = ROOT / "moeconv" / "FORMAT.md"
CONFIG = {"model_type": "qwen3_moe", "num_experts": 2, "moe_intermediate_size": 1, "hidden_size": 1}


def xxh3(data: bytes) -> str:
    """§6."""
    return xxhash.xxh3_128(data, seed=0).hexdigest()


def read_json(data: bytes) -> Any:
    """A document, canonical as §4 wants it."""
    doc = json.loads(data)
    canonical = json.dumps(doc, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert data == canonical.encode()
    return doc


def read_root(out: Path) -> Any:
    """§4: a line of JSON and its digest."""
    body, mark, end = (out / "moeconv.json").read_bytes().split(b"\n")
    assert mark.decode() == xxh3(body)
    assert end == b""
    return read_json(body)


def read_parts(out: Path, root: Any) -> list[Any]:
    """§4: every named document under its size and digest."""
    for entry in (*root["parts"], root["index"], root["origin"], *root["sidecars"]):
        data = (out / entry["name"]).read_bytes()
        assert (len(data), xxh3(data)) == (entry["size"], entry["digest"])
    return [read_json((out / p["name"]).read_bytes().rstrip(b"\n")) for p in root["parts"]]


def matrices(out: Path, root: Any, part: Any) -> dict[str, tuple[str, list[int], bytes]]:
    """§4: address -> dtype, canonical shape, bytes; for `E (G O) K`, `E O K`, and no experts."""
    raw = (out / part["file"]).read_bytes()
    assert len(raw) == part["size"]
    assert part["header"]["size"] % 4096 == 0
    assert xxh3(raw[: part["header"]["size"]]) == part["header"]["digest"]
    found = {}
    for tensor in part["tensors"]:
        data = raw[tensor["start"] : tensor["stop"]]
        held = tensor.get("expert")
        if held is None:
            found[tensor["name"]] = (tensor["dtype"], tensor["shape"], data)
            assert tensor["digests"] == [xxh3(data)]
            continue
        assert held["axes"] in ("E (G O) K", "E O K")
        addresses = [
            f"{root['stacks'][held['stack']]['name']}.{e}.{p}.{held['component']}"
            for e in range(*held["experts"])
            for p in held["projections"]
        ]
        size = len(data) // len(addresses)
        for number, address in enumerate(addresses):
            matrix = data[number * size : (number + 1) * size]
            assert tensor["digests"][number] == xxh3(matrix)
            found[address] = (tensor["dtype"], held["matrix"], matrix)
    return found


def fingerprint(found: dict[str, tuple[str, list[int], bytes]]) -> str:
    """§7."""
    lines = []
    for address, (dtype, shape, data) in found.items():
        name = json.dumps(address)[1:-1].replace(" ", "\\u0020")
        lines.append(f"{name} {dtype} [{','.join(map(str, shape))}] {xxh3(data)}\n".encode())
    return xxh3(b"".join(sorted(lines)))


def rebuild(out: Path, root: Any, found: dict[str, tuple[str, list[int], bytes]], to: Path) -> None:
    """§5, for a per-expert origin."""
    head, _, payload = (out / "moeconv" / "origin").read_bytes().partition(b"\n")
    origin = read_json(head)
    for file in origin["files"]:
        header, payload = payload[: file["header"]], payload[file["header"] :]
        tensors = json.loads(header[8:])
        tensors.pop("__metadata__", None)
        with (to / file["name"]).open("wb") as stream:
            stream.write(header)
            for name, entry in tensors.items():
                stream.seek(len(header) + entry["data_offsets"][0])
                renamed = re.sub(r"\.([0-9]+)\.(gate|up|down)_proj\.", r".\1.\2.", name)
                stream.write(found[renamed if ".experts." in name else name][2])
            assert stream.seek(0, 2) == file["size"]
    if origin["index"]:
        (to / origin["index"]["name"]).write_bytes(payload)
    for sidecar in root["sidecars"]:
        (to / sidecar["name"]).write_bytes((out / sidecar["name"]).read_bytes())


def test_a_reader_made_from_the_text_alone(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source")
    out = tmp_path / "out"
    moeconv.fuse(tmp_path / "source", out, max_shard_size=1_000_000)
    root = read_root(out)
    found = {}
    for part in read_parts(out, root):
        found |= matrices(out, root, part)
    assert fingerprint(found) == root["fingerprint"]
    (tmp_path / "rebuilt").mkdir()
    rebuild(out, root, found, tmp_path / "rebuilt")
    assert tree_sha256(tmp_path / "rebuilt") == tree_sha256(tmp_path / "source")


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    """Two experts, H = I = 1, F32: the values are 1 to 6."""
    names = [f"{e}.{p}_proj" for e in (0, 1) for p in ("gate", "up", "down")]
    tensors = {
        f"model.layers.0.mlp.experts.{name}.weight": ("F32", (1, 1), struct.pack("<f", value))
        for value, name in enumerate(names, start=1)
    }
    write_checkpoint(tmp_path / "source", tensors, CONFIG)
    moeconv.fuse(tmp_path / "source", tmp_path / "out")
    return tmp_path / "out"


def test_the_examples_are_real(smallest: Path) -> None:
    part = (smallest / "moeconv" / "model-00001-of-00001.safetensors.json").read_bytes()
    pretty = json.dumps(json.loads(part), indent=1, sort_keys=True)
    wanted = f"```json\n{pretty}\n```\n"
    assert block(FORMAT, "part", wanted) == wanted
    body, mark, _ = (smallest / "moeconv.json").read_text().split("\n")
    shown = json.loads(body)
    assert shown["recipes"][0]["toml"].startswith("# The large class")
    # the recipe's text is long and the version in `generator` moves: the rest is the example
    shown["recipes"][0]["toml"] = "…"
    shown["generator"] = "moeconv …"
    wanted = f"```json\n{json.dumps(shown, indent=1, sort_keys=True, ensure_ascii=False)}\n```\n"
    assert block(FORMAT, "root", wanted) == wanted
    assert mark == xxh3(body.encode())


def test_the_values_of_the_example(smallest: Path) -> None:
    root = read_root(smallest)
    (part,) = read_parts(smallest, root)
    found = matrices(smallest, root, part)
    values = {
        a.removeprefix("model.layers.0.mlp.experts."): np.frombuffer(d, "<f4")[0]
        for a, (_, _, d) in found.items()
    }
    assert values == {
        "0.gate.weight": 1, "0.up.weight": 2, "0.down.weight": 3,
        "1.gate.weight": 4, "1.up.weight": 5, "1.down.weight": 6,
    }  # fmt: skip
