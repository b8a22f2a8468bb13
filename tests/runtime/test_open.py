"""Opening: what is refused, each by its name, and what a rank may lack."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import moeconv.runtime
from moeconv.core.digest import digest
from moeconv.errors import (
    BadManifest,
    BadPlacement,
    Damaged,
    DuplicateTensor,
    GeometryMismatch,
    MissingShard,
    MoeconvError,
    NotAnOutput,
    SourceChanged,
    Unfinished,
    UnsafePath,
    UnsupportedVersion,
    UsageProblem,
)
from moeconv.placement.model import Placement
from tests.runtime.handmade import (
    STACK,
    Fused,
    all_same,
    checkpoint,
    numbers,
    write_set,
    write_virtual,
    write_whole,
)

RANK_1 = "rank-00001-of-00002-00001-of-00001.safetensors"
COMMON = "common-00001-of-00001.safetensors"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", checkpoint())


def refused(kind: type[MoeconvError], path: Path, **options: object) -> MoeconvError:
    geometry = {"ep_rank": 1, "ep_size": 2} | options
    with pytest.raises(kind) as caught:
        moeconv.runtime.open(path, **geometry)
    assert type(caught.value) is kind
    return caught.value


def test_facts(out: Path):
    shard = moeconv.runtime.open(out, ep_rank=1, ep_size=2)
    assert (shard.ep_rank, shard.ep_size, shard.stacks) == (1, 2, (STACK,))
    assert shard.placement == {STACK: (2, 0, 1, 3, 4, 0)}
    assert shard.logical_experts(STACK) == (3, 4, 0)
    assert set(shard.names) == {
        "model.embed.weight",
        "model.layers.0.mlp.gate.weight",
        f"{STACK}.gate_up_proj",
        f"{STACK}.down_proj",
        f"{STACK}.down_proj_scale",
    }
    assert "1 of 2" in repr(shard)
    with pytest.raises(UsageProblem):
        shard.logical_experts("no.such")
    with pytest.raises(AttributeError):
        shard.rows = {}  # type: ignore[misc]


@pytest.mark.parametrize("geometry", [(1, 3), (0, 1), (2, 2), (-1, 2), (1, 4)])
def test_another_geometry(out: Path, geometry: tuple[int, int]):
    refused(GeometryMismatch, out, ep_rank=geometry[0], ep_size=geometry[1])


@pytest.mark.parametrize(
    "placement",
    [
        {STACK: (2, 0, 1, 3, 4, 0)},
        [[2, 0, 1, 3, 4, 0]],
        torch.tensor([[2, 0, 1, 3, 4, 0]]),
        Placement(5, (0,), ((2, 0, 1, 3, 4, 0),)),
        {},
    ],
)
def test_the_callers_placement(out: Path, placement: object):
    assert moeconv.runtime.open(out, ep_rank=1, ep_size=2, placement=placement).names


@pytest.mark.parametrize(
    "placement", [{STACK: (0, 1, 2, 3, 4, 0)}, [[2, 0, 1, 3, 4, 1]], [[2, 0, 1, 3, 4]]]
)
def test_another_placement(out: Path, placement: object):
    refused(GeometryMismatch, out, placement=placement)


def test_a_placement_of_other_stacks(out: Path):
    refused(BadPlacement, out, placement={"no.such": (0, 1)})


def test_not_an_output(tmp_path: Path):
    refused(NotAnOutput, tmp_path)
    refused(NotAnOutput, tmp_path / "absent")


def test_unfinished(out: Path):
    (out / "moeconv.json").unlink()
    refused(Unfinished, out)


def _root(out: Path, **members: object) -> None:
    doc = json.loads((out / "moeconv.json").read_bytes().partition(b"\n")[0]) | members
    body = json.dumps(doc, sort_keys=True, separators=(",", ":")).encode()
    (out / "moeconv.json").write_bytes(body + b"\n" + digest(body).encode() + b"\n")


def test_a_newer_major_version(out: Path):
    _root(out, version={"major": 2, "minor": 0})
    refused(UnsupportedVersion, out)


def test_an_unknown_feature(out: Path):
    _root(out, requires=["expert-parallel", "compressed"])
    refused(UnsupportedVersion, out)


@pytest.mark.parametrize("name", [RANK_1, COMMON, "moeconv/rank-00001-of-00002.json"])
def test_a_missing_file(out: Path, name: str):
    (out / name).unlink()
    assert name in str(refused(MissingShard, out))


@pytest.mark.parametrize(
    "name",
    [
        "rank-00000-of-00002-00001-of-00001.safetensors",
        "moeconv/rank-00000-of-00002.json",
        "moeconv/origin",
    ],
)
def test_other_ranks_files_may_be_absent(out: Path, name: str):
    (out / name).unlink()
    all_same(moeconv.runtime.open(out, ep_rank=1, ep_size=2).load(), checkpoint().expected(1))


@pytest.mark.parametrize("name", [RANK_1, COMMON])
def test_another_size(out: Path, name: str):
    with (out / name).open("ab") as stream:
        stream.write(b"x")
    refused(Damaged, out)


@pytest.mark.parametrize("name", [RANK_1, COMMON, "moeconv/common.json", "moeconv.json"])
def test_a_flipped_bit(out: Path, name: str):
    data = bytearray((out / name).read_bytes())
    data[40] ^= 1
    (out / name).write_bytes(data)
    refused(Damaged, out)


def test_a_link_out_of_the_output(out: Path, tmp_path: Path):
    shutil.move(out / RANK_1, tmp_path / "elsewhere")
    (out / RANK_1).symlink_to(tmp_path / "elsewhere")
    refused(UnsafePath, out)


def test_a_part_without_a_stack(out: Path):
    _part(out, "moeconv/rank-00001-of-00002.json", lambda doc: doc.update(files=[]))
    refused(BadManifest, out)


@pytest.mark.parametrize(
    "members",
    [
        {"start": 0},
        {"name": "another"},
        {"dtype": "I32"},
        {"shape": [1, 1]},
        {"shape": [8, 5]},
    ],
)
def test_a_part_that_is_not_its_files_header(out: Path, members: dict[str, object]):
    _part(out, "moeconv/common.json", lambda doc: doc["files"][0]["tensors"][-1].update(members))
    refused(Damaged, out)


def test_runs_that_do_not_fit_the_shape(virtual: Path):
    _part(virtual, "moeconv/common.json", lambda doc: doc["virtual"][0].update(shape=[1, 1]))
    refused(BadManifest, virtual)


def _part(out: Path, name: str, edit: object) -> None:
    doc = json.loads((out / name).read_bytes())
    edit(doc)
    data = json.dumps(doc).encode()
    (out / name).write_bytes(data)
    root = json.loads((out / "moeconv.json").read_bytes().partition(b"\n")[0])
    parts = [
        p | {"size": len(data), "digest": digest(data)} if p["name"] == name else p
        for p in root["parts"]
    ]
    _root(out, parts=parts)


# --- whole and virtual sets --------------------------------------------------------------------
def test_a_whole_output_is_rank_0_of_1(tmp_path: Path):
    made = checkpoint()
    out = write_whole(tmp_path / "set", made)
    shard = moeconv.runtime.open(out, ep_rank=0, ep_size=1, placement={STACK: range(5)})
    assert shard.logical_experts(STACK) == (0, 1, 2, 3, 4)
    all_same(shard.load(), made.common | {n: f.value for n, f in made.experts.items()})
    refused(GeometryMismatch, out)
    refused(GeometryMismatch, out, ep_rank=0, ep_size=1, placement={STACK: (1, 0, 2, 3, 4)})


def test_a_stack_that_is_not_shared(tmp_path: Path):
    made = checkpoint()
    made.unplaced |= {
        "mtp.up": Fused("mtp.layers.0.mlp.experts", numbers(3, 2, 4), "E O K", ("up",)),
        "mtp.down": Fused("mtp.layers.0.mlp.experts", numbers(3, 4, 2), "E O K", ("down",)),
    }
    out = write_set(tmp_path / "set", made)
    shard = moeconv.runtime.open(out, ep_rank=1, ep_size=2)
    all_same(shard.load(), made.expected(1))
    assert shard.logical_experts("mtp.layers.0.mlp.experts") == (0, 1, 2)
    assert set(shard.placement) == {STACK}
    refused(GeometryMismatch, out, placement={"mtp.layers.0.mlp.experts": (0, 1, 2)})


@pytest.fixture
def virtual(tmp_path: Path) -> Path:
    return write_virtual(tmp_path / "set", tmp_path / "source", checkpoint())


def test_virtual(virtual: Path):
    all_same(moeconv.runtime.open(virtual, ep_rank=1, ep_size=2).load(), checkpoint().expected(1))


def test_virtual_with_its_source_elsewhere(virtual: Path, tmp_path: Path):
    shutil.move(tmp_path / "source", tmp_path / "moved")
    refused(MissingShard, virtual)
    shard = moeconv.runtime.open(virtual, ep_rank=0, ep_size=2, source=tmp_path / "moved")
    all_same(shard.load(), checkpoint().expected(0))


def test_virtual_with_a_source_of_another_time(virtual: Path, tmp_path: Path):
    os.utime(tmp_path / "source/model.safetensors", ns=(1, 1))
    refused(SourceChanged, virtual)


def test_virtual_with_a_copy_of_its_source(virtual: Path, tmp_path: Path):
    """A copy has other times; where the caller names it, its size and header must do."""
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "source", copy, copy_function=shutil.copyfile)
    os.utime(copy / "model.safetensors", ns=(1, 1))
    for rank in range(2):
        shard = moeconv.runtime.open(virtual, ep_rank=rank, ep_size=2, source=copy)
        all_same(shard.load(), checkpoint().expected(rank))
        new = {STACK: (3, 4, 1, 0, 2, 0)}
        all_same(shard.replace(new).shard.load(), checkpoint().expected(rank, new))
    os.utime(tmp_path / "source/model.safetensors", ns=(1, 1))
    problem = refused(SourceChanged, virtual)
    assert "`source=`" in str(problem.fix)
    shard = moeconv.runtime.open(virtual, ep_rank=0, ep_size=2, source=tmp_path / "source")
    os.utime(tmp_path / "source/model.safetensors", ns=(2, 2))
    with pytest.raises(SourceChanged):  # from then on it must stay as it is
        shard.load()


@pytest.mark.parametrize("edit", ["size", "header", "gone"])
def test_virtual_with_another_file_than_its_source(virtual: Path, tmp_path: Path, edit: str):
    copy = tmp_path / "copy" / "model.safetensors"
    copy.parent.mkdir()
    data = (tmp_path / "source/model.safetensors").read_bytes()
    edits = {"size": data + b"x", "header": data.replace(b"pt", b"tp", 1)}
    if edit != "gone":
        copy.write_bytes(edits[edit])
    with pytest.raises(MissingShard if edit == "gone" else SourceChanged):
        moeconv.runtime.open(virtual, ep_rank=0, ep_size=2, source=copy.parent)


def test_virtual_with_a_source_of_another_size(virtual: Path, tmp_path: Path):
    _keeping_time(tmp_path / "source/model.safetensors", lambda data: data + b"x")
    refused(SourceChanged, virtual)


def test_virtual_with_a_source_of_another_header(virtual: Path, tmp_path: Path):
    _keeping_time(tmp_path / "source/model.safetensors", lambda data: data.replace(b"pt", b"tp", 1))
    refused(SourceChanged, virtual)


def _keeping_time(path: Path, edit: object) -> None:
    facts = path.stat()
    path.write_bytes(edit(path.read_bytes()))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


# --- ranks -------------------------------------------------------------------------------------
def test_ep_rank_of():
    ranks = range(8)
    assert [moeconv.runtime.ep_rank_of(r, 8, 4) for r in ranks] == [0, 1, 2, 3, 0, 1, 2, 3]
    twinkle = [moeconv.runtime.ep_rank_of(r, 8, 4, order="twinkle") for r in ranks]
    assert twinkle == [0, 0, 1, 1, 2, 2, 3, 3]


def test_ep_rank_of_experts_that_are_split():
    ranks = [moeconv.runtime.ep_rank_of(r, 16, 4, moe_tp=2) for r in range(16)]
    assert ranks == [0, 0, 1, 1, 2, 2, 3, 3] * 2
    with pytest.raises(GeometryMismatch):
        moeconv.runtime.ep_rank_of(0, 12, 4, moe_tp=2)
    with pytest.raises(GeometryMismatch):
        moeconv.runtime.ep_rank_of(0, 12, 4, moe_tp=0)
    with pytest.raises(UsageProblem):
        moeconv.runtime.ep_rank_of(0, 16, 4, order="twinkle", moe_tp=2)


def test_ranks_are_whole_numbers(out: Path):
    import numpy as np

    assert moeconv.runtime.open(out, ep_rank=np.int64(1), ep_size=2).ep_rank == 1
    refused(UsageProblem, out, ep_rank=1.0)
    refused(UsageProblem, out, ep_size="2")


@pytest.mark.parametrize("numbers", [(0, 8, 3), (8, 8, 2), (-1, 8, 2), (0, 8, 0), (0, 0, 1)])
def test_ep_rank_of_what_does_not_divide(numbers: tuple[int, int, int]):
    with pytest.raises(GeometryMismatch):
        moeconv.runtime.ep_rank_of(*numbers)


def test_ep_rank_of_another_order():
    with pytest.raises(UsageProblem):
        moeconv.runtime.ep_rank_of(0, 8, 2, order="megatron")


# --- cost --------------------------------------------------------------------------------------
def test_no_other_ranks_document_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = write_set(tmp_path / "set", checkpoint(per_expert=True, layers=3))
    real, seen = os.open, []
    monkeypatch.setattr(
        os, "open", lambda p, *a, **k: (seen.append(Path(p).name), real(p, *a, **k))[1]
    )
    moeconv.runtime.open(out, ep_rank=1, ep_size=2).load()
    assert set(seen) == {"moeconv.json", "common.json", "rank-00001-of-00002.json", RANK_1, COMMON}


def test_opening_takes_no_time_that_grows_with_the_source(tmp_path: Path):
    """A rank of Qwen3-30B-A3B, whose source has 18,432 expert tensors, without its bytes."""
    made = checkpoint(experts=128, width=2, hidden=2, row=tuple(range(128)), ep=8, layers=48)
    for n in range(400):
        made.common[f"model.layers.{n}.norm.weight"] = numbers(2)
    out = write_set(tmp_path / "set", made)
    times = []
    for _ in range(5):
        began = time.process_time()
        shard = moeconv.runtime.open(out, ep_rank=3, ep_size=8)
        times.append(time.process_time() - began)
    assert len(shard.names) == 1 + 48 * 4 + 400
    assert min(times) < 0.1


def test_imports():
    """Neither `import moeconv` brings torch, nor the loader the rest of the program."""
    code = (
        "import sys, moeconv; assert 'torch' not in sys.modules; import torch;"
        "before = set(sys.modules); assert moeconv.runtime.open;"
        "bad = {'moeconv.engine', 'moeconv.plan', 'moeconv.detect', 'moeconv.cli', 'moeconv.api',"
        "'typer', 'rich', 'tqdm', 'huggingface_hub', 'yaml', 'safetensors'};"
        "bad &= sys.modules.keys() - before; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_duplicate_names(tmp_path: Path):
    made = checkpoint()
    made.common[f"{STACK}.gate_up_proj"] = numbers(3)
    refused(DuplicateTensor, write_set(tmp_path / "set", made))
