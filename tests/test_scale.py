"""Real sizes: whole published models by their real names, on sparse files, within bounds."""

from __future__ import annotations

import gzip
import json
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import moeconv
from tests.bench.make_checkpoint import write_phantom, write_qwen3_30b
from tests.cli.run import environment
from tests.helpers import Spec, write_checkpoint
from tests.phantoms import Shape, phantom

INDEXES = Path(__file__).parent / "data" / "indexes"
GIB = 1024**3


def measured(*arguments: str) -> tuple[dict[str, object], int]:
    """The JSON of a command in a process of its own, and that process's peak memory in bytes."""
    printed, peak = with_peak(*arguments)
    return json.loads(printed), peak


def with_peak(*arguments: str) -> tuple[str, int]:
    """What a command printed in a process of its own, and that process's peak memory in bytes."""
    code = (
        "import os, runpy, sys\n"
        "os._exit = sys.exit  # it is to end below\n"
        "sys.argv = ['moeconv', *sys.argv[1:]]\n"
        "try: runpy.run_module('moeconv', run_name='__main__')\n"
        "except SystemExit as end: status = end.code\n"
        # not ru_maxrss: a child starts with the peak of the parent that it was forked from
        "lines = open('/proc/self/status').read().splitlines()\n"
        "peak = next(line.split()[1] for line in lines if line.startswith('VmHWM'))\n"
        "print(f'{status or 0} {peak}', file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    status, peak = map(int, done.stderr.splitlines()[-1].split())
    assert status == 0
    return done.stdout, peak * 1024


@pytest.fixture(scope="module")
def deepseek_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3 with MTP: 91,991 tensors, 689 GB, no disk."""
    folder = tmp_path_factory.mktemp("phantom") / "deepseek-v3"
    write_phantom(folder, "deepseek-v3")
    return folder


def test_inspect_deepseek_v3(deepseek_v3: Path) -> None:
    doc, peak = measured("inspect", str(deepseek_v3), "--json")
    assert doc["tensors"] == 91_991
    assert doc["bytes"] == 688_574_839_360
    stacks = doc["stacks"]
    assert isinstance(stacks, list)
    assert [s["name"] for s in stacks] == [f"model.layers.{n}.mlp.experts" for n in range(3, 62)]
    assert {(s["experts"], s["width"], s["hidden"], s["layout"]) for s in stacks} == {
        (256, 2048, 7168, "per-expert")
    }
    assert peak < GIB


def test_dry_run_of_deepseek_v3(deepseek_v3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    doc, peak = measured("fuse", str(deepseek_v3), "-o", str(out), "-n", "--json")
    ledger = doc["ledger"]
    output = doc["output"]
    assert isinstance(ledger, list)
    assert isinstance(output, dict)
    assert len(ledger) == 91_991
    assert sum(f["bytes"] for f in ledger) == output["bytes"] == 688_574_839_360
    fused = {into for f in ledger if f["fate"] == "fused" for into in f["into"]}
    assert len(fused) == 59 * 4
    assert peak < GIB
    assert not out.exists()


def phantom_of_index(folder: Path, name: str) -> dict[str, object]:
    """Sparse files for a published index: expert shapes from its config.json, the rest [1]."""
    config = json.loads((INDEXES / f"{name}.config.json").read_text())
    raw = gzip.decompress((INDEXES / f"{name}.index.json.gz").read_bytes())
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    hidden = config["hidden_size"]
    files: dict[str, dict[str, object]] = defaultdict(dict)
    ends: dict[str, int] = defaultdict(int)
    for tensor, file in json.loads(raw)["weight_map"].items():
        shape = [1]
        if ".experts." in tensor:
            down = ".down_proj." in tensor or ".w2." in tensor
            shape = [hidden, width] if down else [width, hidden]
        start = ends[file]
        ends[file] += 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [start, ends[file]]}
        files[file][tensor] = entry
    folder.mkdir()
    for file, header in files.items():
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + ends[file])
    (folder / "model.safetensors.index.json").write_bytes(raw)
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize(
    ("name", "recipe", "stacks", "wanted"),
    [
        ("Mixtral-8x7B", "mixtral", 32, (8, 14336, 4096)),
        ("DeepSeek-OCR2", "qwen3_moe", 11, (64, 896, 1280)),
        ("Qwen3.5-25B-REAP", "qwen3_moe", 40, (180, 512, 2048)),
    ],
)
def test_published_indexes_are_detected(
    tmp_path: Path, name: str, recipe: str, stacks: int, wanted: tuple[int, int, int]
) -> None:
    phantom_of_index(tmp_path / name, name)
    found = moeconv.open_source(tmp_path / name).detection.checked()
    assert len(found.stacks) == stacks
    for stack in found.stacks:
        assert (stack.recipe.name, stack.layout.name) == (recipe, "per-expert")
        sizes = stack.sizes
        assert (sizes.experts, sizes.width, sizes.hidden) == wanted
    assert not [t.name for t in found.others if ".experts." in t.name]
    plan = moeconv.fuse(tmp_path / name, tmp_path / "out", dry_run=True).plan
    fused = {f.into[0] for f in plan.ledger if f.verb == "fused"}
    assert len(fused) == 2 * stacks


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A real conversion: 2.5 GB through at most 200 MB, most of which is Python and NumPy."""
    write_qwen3_30b(tmp_path / "source", layers=1)
    _, peak = measured("fuse", str(tmp_path / "source"), "-o", str(tmp_path / "out"), "--json")
    assert peak < 200_000_000


def test_a_virtual_output_of_kimi_k2(tmp_path: Path) -> None:
    """139,644 tensors, 1 TB: megabytes are written, and every expert of every rank is placed."""
    write_phantom(tmp_path / "kimi", "kimi-k2")
    out = tmp_path / "out"
    doc, peak = measured(
        "shard", str(tmp_path / "kimi"), "-o", str(out), "--ep", "8", "--virtual", "--json"
    )
    source, output = doc["source"], doc["output"]
    assert isinstance(source, dict)
    assert isinstance(output, dict)
    assert source["tensors"] == 139_644
    assert source["bytes"] == output["bytes"] > 10**12
    assert sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) < 50_000_000
    assert peak < GIB
    proof, _ = measured("verify", str(out), "--level", "structure", "--json")
    assert proof["ok"]


@pytest.mark.soak  # half a minute, most of it to write the headers
def test_dry_run_of_kimi_k3(tmp_path: Path) -> None:
    """497,220 tensors, the most of any published model."""
    write_phantom(tmp_path / "kimi", "kimi-k3")
    options = ("-o", str(tmp_path / "out"), "--dry-run", "--json")
    doc, peak = measured("fuse", str(tmp_path / "kimi"), *options)
    source = doc["source"]
    assert isinstance(source, dict)
    assert source["tensors"] == 497_220
    assert peak < 2 * GIB


def test_the_bound_on_memory_holds_for_ten_times_as_much(tmp_path: Path) -> None:
    """Every matrix is turned, by more workers than the bound has room for at once."""
    shapes = {"gate": (1024, 2560), "up": (1024, 2560), "down": (2560, 1024)}  # 5.2 MB each
    bound, more = 64 * 1024 * 1024, 16 * 1024 * 1024

    def source(experts: int) -> Path:
        tensors: dict[str, Shape] = {
            f"model.layers.0.mlp.experts.{e}.{p}_proj.weight": ("BF16", shape)
            for e in range(experts)
            for p, shape in shapes.items()
        }
        sizes = {"moe_intermediate_size": 1024, "hidden_size": 2560, "num_experts": experts}
        return phantom(tmp_path / f"src-{experts}", tensors, {"model_type": "qwen3_moe", **sizes})

    def peak(src: Path, memory: str) -> int:
        out = tmp_path / f"{src.name}-{memory}"
        options = ("--layout", "kn", "--jobs", "6", "--max-memory", memory, "--json")
        return measured("fuse", str(src), "-o", str(out), *options)[1]

    floor = peak(source(1), "1MB")  # what Python, NumPy and one pair take in any case
    many = source(48)
    assert sum(f.stat().st_size for f in many.iterdir()) > 10 * bound
    assert peak(many, "64MiB") < floor + bound + more
    # with room for all workers it takes more: the bound is what holds it
    assert peak(many, "2GiB") > floor + bound + more


MANY = 40_000


@pytest.fixture(scope="module")
def many_tensors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of very many tensors of a byte, beside a few experts."""
    folder = tmp_path_factory.mktemp("many") / "src"
    tensors: dict[str, Spec] = {f"t{n}": ("U8", (1,), b"x") for n in range(MANY)}
    for expert in range(2):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.0.mlp.experts.{expert}.{part}.weight"
            tensors[name] = ("U8", (2, 2), bytes([expert, 1, 2, len(part)]))
    config = {"model_type": "qwen3_moe", "num_experts": 2, "moe_intermediate_size": 2}
    return write_checkpoint(folder, tensors, config)


@pytest.mark.parametrize(
    ("verb", "a_tensor"), [("fuse", 1800), ("verify", 1700)]
)  # twice as much before headers and parts were read without a dict for each tensor
def test_memory_of_very_many_tensors(
    many_tensors: Path, tmp_path: Path, verb: str, a_tensor: int
) -> None:
    out = tmp_path / "out"
    if verb == "verify":
        moeconv.fuse(many_tensors, out)
    where = [str(many_tensors), "-o", str(out)] if verb == "fuse" else [str(out)]
    _, peak = with_peak(verb, *where, "--quiet")
    assert peak < 30_000_000 + a_tensor * MANY
