"""FORMAT.md read literally: a reader made from its text alone, and its own examples."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import moeconv
from moeconv.cli.demo_checkpoint import make_checkpoint
from tests.helpers import tree_sha256, write_checkpoint
from tests.test_docs import ROOT, block

FORMAT = ROOT / "moeconv" / "FORMAT.md"
CONFIG = {"model_type": "qwen3_moe", "num_experts": 2, "moe_intermediate_size": 1, "hidden_size": 1}
STACK = "model.layers.0.mlp.experts"
WIDTH = 100


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
    index = [] if root["index"] is None else [root["index"]]
    for entry in (*root["parts"], *index, root["origin"], *root["sidecars"]):
        data = (out / entry["name"]).read_bytes()
        assert (len(data), xxh3(data)) == (entry["size"], entry["digest"])
    return [read_json((out / p["name"]).read_bytes().rstrip(b"\n")) for p in root["parts"]]


def matrices(out: Path, root: Any, part: Any) -> dict[str, tuple[str, list[int], bytes]]:
    """§4: address -> dtype, canonical shape, bytes; for axes with E before O, and no experts."""
    raw = (out / part["file"]).read_bytes()
    assert len(raw) == part["size"]
    assert part["header"]["size"] % 4096 == 0
    assert xxh3(raw[: part["header"]["size"]]) == part["header"]["digest"]
    found: dict[str, tuple[str, list[int], bytes]] = {}
    for tensor in part["tensors"]:
        take(root, tensor, raw[tensor["start"] : tensor["stop"]], found)
    return found


def take(
    root: Any, tensor: Any, data: bytes, found: dict[str, tuple[str, list[int], bytes]]
) -> None:
    """§4: the matrices of one tensor, which are replicas of those that are there already."""
    held = tensor.get("expert")
    if held is None:
        found[tensor["name"]] = (tensor["dtype"], tensor["shape"], data)
        assert tensor["digests"] in ([xxh3(data)], [])
        return
    assert held["axes"] in ("E (G O) K", "E O K", "O K")
    stack = root["stacks"][held["stack"]]
    if "slots" in held:
        experts = stack["physical_to_logical"][slice(*held["slots"])]
    else:
        experts = range(*held["experts"])
    addresses = [
        f"{stack['name']}.{e}.{p}.{held['component']}" for e in experts for p in held["projections"]
    ]
    size = len(data) // len(addresses)
    for number, address in enumerate(addresses):
        matrix = data[number * size : (number + 1) * size]
        assert not tensor["digests"] or tensor["digests"][number] == xxh3(matrix)
        fact = (tensor["dtype"], held["matrix"], matrix)
        assert found.setdefault(address, fact) == fact


def of_ranks(out: Path, root: Any) -> dict[str, tuple[str, list[int], bytes]]:
    """§4, Expert-parallel sets and Virtual sets: the matrices of all ranks."""
    ep_size = root["sharding"]["ep_size"]
    names = ["common", *(f"rank-{r:05d}-of-{ep_size:05d}" for r in range(ep_size))]
    assert [p["name"] for p in root["parts"]] == [f"moeconv/{name}.json" for name in names]
    found: dict[str, tuple[str, list[int], bytes]] = {}
    for rank, name, part in zip([None, *range(ep_size)], names, read_parts(out, root), strict=True):
        assert part["rank"] == rank
        count = len(part["files"])
        for number, file in enumerate(part["files"], start=1):
            assert file["file"] == f"{name}-{number:05d}-of-{count:05d}.safetensors"
            for address, fact in matrices(out, root, file).items():
                assert found.setdefault(address, fact) == fact
        for tensor in part.get("virtual", []):
            take(root, tensor, pointed(root["source"], tensor["runs"]), found)
    return found


def pointed(source: Any, runs: list[list[int]]) -> bytes:
    """§4: the bytes of a virtual set's tensor, out of files that are what they were."""
    data = b""
    for file, offset, count in runs:
        entry = source["files"][file]
        path = Path(source["directory"]) / entry["name"]
        raw = path.read_bytes()
        assert len(raw) == entry["size"]
        assert [*divmod(path.stat().st_mtime_ns, 10**9)] == entry["mtime"]
        assert xxh3(raw[: entry["header"]["size"]]) == entry["header"]["digest"]
        data += raw[offset : offset + count]
    return data


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


@pytest.mark.parametrize("layout", ["fused", "per-expert"])
@pytest.mark.parametrize("virtual", [False, True])
def test_ranks_read_from_the_text_alone(tmp_path: Path, layout: str, *, virtual: bool) -> None:
    make_checkpoint(tmp_path / "source")
    out = tmp_path / "out"
    moeconv.shard(
        tmp_path / "source",
        out,
        ep_size=3,
        redundant=8,
        layout=layout,
        virtual=virtual,
        max_shard_size=600_000,
    )
    root = read_root(out)
    found = of_ranks(out, root)
    assert fingerprint(found) == moeconv.fingerprint(tmp_path / "source")
    assert root["fingerprint"] == (None if virtual else fingerprint(found))
    (tmp_path / "rebuilt").mkdir()
    rebuild(out, root, found, tmp_path / "rebuilt")
    assert tree_sha256(tmp_path / "rebuilt") == tree_sha256(tmp_path / "source")


def smallest_source(tmp_path: Path, **others: float) -> Path:
    """Two experts, H = I = 1, F32: the values are 1 to 6."""
    names = [f"{e}.{p}_proj" for e in (0, 1) for p in ("gate", "up", "down")]
    values = {f"{STACK}.{name}.weight": value for value, name in enumerate(names, start=1)}
    tensors = {n: ("F32", (1, 1), struct.pack("<f", value)) for n, value in values.items()}
    tensors |= {n: ("F32", (1,), struct.pack("<f", value)) for n, value in others.items()}
    return write_checkpoint(tmp_path / "source", tensors, CONFIG)


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    """The smallest set."""
    moeconv.fuse(smallest_source(tmp_path), tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def for_ranks(tmp_path: Path) -> dict[str, Path]:
    """The same experts and a norm for two ranks, with bytes and without."""
    source = smallest_source(tmp_path, **{"model.norm.weight": 7})
    os.utime(source / "model.safetensors", ns=(0, 1_760_000_000_123_456_789))
    sets = {"ep": tmp_path / "ep", "virtual": tmp_path / "virtual"}
    rows = {STACK: (1, 0)}
    moeconv.shard(source, sets["ep"], ep_size=2, placement=rows)
    moeconv.shard(
        source, sets["virtual"], ep_size=2, placement=rows, layout="per-expert", virtual=True
    )
    return sets


def pretty(doc: Any, indent: int = 0, before: int = 0) -> str:
    """JSON for reading: what fits in a line stands in one."""
    line = json.dumps(doc, sort_keys=True, ensure_ascii=False)
    if indent + before + len(line) < WIDTH or not isinstance(doc, dict | list):
        return line
    pad = " " * (indent + 1)
    items = [pretty(item, indent + 1) for item in doc]
    if isinstance(doc, dict):
        keys = [json.dumps(key) + ": " for key in sorted(doc)]
        items = [k + pretty(doc[json.loads(k[:-2])], indent + 1, len(k)) for k in keys]
    ends = "{}" if isinstance(doc, dict) else "[]"
    return ends[0] + "\n" + ",\n".join(pad + item for item in items) + "\n" + pad[1:] + ends[1]


def holds_example(name: str, doc: Any) -> None:
    """The example of that name in the text is this document."""
    wanted = f"```json\n{pretty(doc)}\n```\n"
    assert json.loads(wanted[8:-4]) == doc
    assert block(FORMAT, name, wanted) == wanted


def shown_root(made: Path) -> Any:
    """A root as the text shows it: without what is long or moves."""
    shown = read_root(made)
    assert shown["recipes"][0]["toml"].startswith("# The large class")
    shown["recipes"][0]["toml"] = "…"
    shown["generator"] = "moeconv …"
    if "source" in shown:
        assert shown["source"]["directory"] == str(made.with_name("source").resolve())
        shown["source"]["directory"] = "/models/smallest"
    return shown


def shown_part(made: Path, name: str) -> Any:
    """A part as the text shows it: all of it."""
    return json.loads((made / "moeconv" / f"{name}.json").read_bytes())


def test_the_examples_are_real(smallest: Path) -> None:
    holds_example("part", shown_part(smallest, "model-00001-of-00001.safetensors"))
    holds_example("root", shown_root(smallest))
    body, mark, _ = (smallest / "moeconv.json").read_text().split("\n")
    assert mark == xxh3(body.encode())


def test_the_examples_for_ranks_are_real(for_ranks: dict[str, Path]) -> None:
    made = for_ranks["ep"]
    holds_example("ep-root", shown_root(made))
    holds_example("ep-common", shown_part(made, "common"))
    holds_example("ep-rank", shown_part(made, "rank-00000-of-00002"))


def test_the_virtual_examples_are_real(for_ranks: dict[str, Path]) -> None:
    made = for_ranks["virtual"]
    holds_example("virtual-root", shown_root(made))
    holds_example("virtual-rank", shown_part(made, "rank-00000-of-00002"))


@pytest.mark.parametrize("kind", ["ep", "virtual"])
def test_the_values_of_the_examples_for_ranks(for_ranks: dict[str, Path], kind: str) -> None:
    root = read_root(for_ranks[kind])
    (rank,) = read_parts(for_ranks[kind], root)[1:2]
    found: dict[str, tuple[str, list[int], bytes]] = {}
    for file in rank["files"]:
        found |= matrices(for_ranks[kind], root, file)
    for tensor in rank.get("virtual", []):
        take(root, tensor, pointed(root["source"], tensor["runs"]), found)
    values = {
        a.removeprefix(f"{STACK}."): np.frombuffer(d, "<f4")[0] for a, (_, _, d) in found.items()
    }
    assert values == {"1.gate.weight": 4, "1.up.weight": 5, "1.down.weight": 6}
    assert len(of_ranks(for_ranks[kind], root)) == 7


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
