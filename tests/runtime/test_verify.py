"""`open(..., verify="digest")`: right sets open in every layout, and no flipped bit gets in."""

import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moeconv
from moeconv import runtime
from moeconv.errors import (
    BadManifest,
    Damaged,
    DigestsMissing,
    SourceChanged,
    UsageProblem,
    quoted,
)
from moeconv.runtime.validate import validate_rank
from tests.models import FAMILIES, Disk, Model, disks, models
from tests.quantised.packing import FORMATS
from tests.quantised.test_formats import checkpoint, experts
from tests.runtime.models import like
from tests.shard.test_shards import placements


@given(models(), disks(), st.data())
def test_an_output_opens_and_a_flipped_bit_is_named_with_its_tensor(
    model: Model, disk: Disk, data: st.DataObject
):
    layouts = list(FAMILIES[model.family].layouts)
    source, target = (data.draw(st.sampled_from(layouts)) for _ in range(2))
    ep = data.draw(st.sampled_from((1, 2, 3)))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        src = disk.write(root / "src", model.tensors(source), model.config)
        moeconv.shard(
            src,
            root / "out",
            ep_size=ep,
            placement=data.draw(placements(model, ep)),
            layout=target,
            from_layout=source,
            allow_duplicates=True,
        )
        for rank in range(ep):
            runtime.open(root / "out", ep_rank=rank, ep_size=ep, verify="digest")
        files = [
            f
            for f in sorted((root / "out").glob("*-of-*.safetensors"))
            if any(a < b for _, a, b in read_header(f))
        ]
        victim = data.draw(st.sampled_from(files))
        raw = victim.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        at = data.draw(st.integers(start * 8, len(raw) * 8 - 1))
        flip(victim, at)
        struck = [t for t in read_header(victim) if t[1] <= at // 8 - start < t[2]]
        for rank in range(ep):
            if victim.name.startswith("rank") and f"rank-{rank:05d}" not in victim.name:
                runtime.open(root / "out", ep_rank=rank, ep_size=ep, verify="digest")
                continue
            runtime.open(root / "out", ep_rank=rank, ep_size=ep)
            with pytest.raises(Damaged, match="of this rank's matrices") as caught:
                runtime.open(root / "out", ep_rank=rank, ep_size=ep, verify="digest")
            assert quoted(struck[0][0]) in str(caught.value)


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file."""
    with path.open("r+b") as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))


def read_header(path: Path) -> list[tuple[str, int, int]]:
    """Names and bytes of the tensors, counted from the start of the data."""
    raw = path.read_bytes()
    doc = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return [(n, *t["data_offsets"]) for n, t in doc.items() if n != "__metadata__"]


@pytest.mark.parametrize("layout", [None, "per-expert", "stacked", "sglang"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_quantised_format(name: str, layout: str | None, tmp_path: Path):
    form = FORMATS[name]
    src = checkpoint(tmp_path / "src", form, experts(form))
    moeconv.shard(src, tmp_path / "out", ep_size=3, layout=layout)
    for rank in range(3):
        runtime.open(tmp_path / "out", ep_rank=rank, ep_size=3, verify="digest")
    victim = tmp_path / "out" / "rank-00001-of-00003-00001-of-00001.safetensors"
    flip(victim, random.Random(name).randrange(8192 * 8, victim.stat().st_size * 8))
    with pytest.raises(Damaged):
        runtime.open(tmp_path / "out", ep_rank=1, ep_size=3, verify="digest")


@pytest.mark.parametrize("name", [n for n in FORMATS if "weight" not in FORMATS[n].dtypes])
def test_packed_experts_without_their_weight_are_not_experts(name: str, tmp_path: Path):
    form = FORMATS[name]
    src = checkpoint(tmp_path / "src", form, experts(form))
    moeconv.shard(src, tmp_path / "out", ep_size=3)
    shard = runtime.open(tmp_path / "out", ep_rank=1, ep_size=3)
    (packed,) = {"weight_packed", "qweight"} & form.dtypes.keys()
    entries = [s.entry for s in shard.own]
    lacking = [e for e in entries if e.expert is None or e.expert.component != packed]
    with pytest.raises(BadManifest, match="no weight of down, gate, up"):
        validate_rank(
            shard.output.root,
            shard.rows,
            [s.entry for s in shard.common],
            lacking,
            rank=1,
            ep_size=3,
        )


@pytest.mark.parametrize("layout", ["kn", "megablocks", "up-gate", "fused"])
def test_whole_outputs_with_transposed_matrices(layout: str, tmp_path: Path):
    form = FORMATS["fp8 by tensor"]
    src = checkpoint(tmp_path / "src", form, experts(form))
    moeconv.fuse(src, tmp_path / "out", layout=layout)
    runtime.open(tmp_path / "out", ep_rank=0, ep_size=1, verify="digest")


def test_every_damaged_matrix_is_counted_and_few_are_named(tmp_path: Path):
    form = FORMATS["fp8 by tensor"]
    src = checkpoint(tmp_path / "src", form, experts(form))
    moeconv.fuse(src, tmp_path / "out")
    (victim,) = (tmp_path / "out").glob("*.safetensors")
    raw = bytearray(victim.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    raw[start:] = bytes(b ^ 255 for b in raw[start:])
    victim.write_bytes(raw)
    with pytest.raises(Damaged) as caught:
        runtime.open(tmp_path / "out", ep_rank=0, ep_size=1, verify="digest")
    assert "27 of this rank's matrices" in str(caught.value)  # three parts of 3 x 3 matrices
    assert "and 7 more" in str(caught.value)


def test_digests_that_were_not_taken_are_not_a_match(tmp_path: Path):
    form = FORMATS["fp8 by tensor"]
    src = checkpoint(tmp_path / "src", form, experts(form))
    moeconv.shard(src, tmp_path / "out", ep_size=3, virtual=True, layout="per-expert")
    with pytest.raises(DigestsMissing, match="--fill"):
        runtime.open(tmp_path / "out", ep_rank=1, ep_size=3, verify="digest")
    moeconv.verify(tmp_path / "out", level="source", source=src, fill=True)
    runtime.open(tmp_path / "out", ep_rank=1, ep_size=3, verify="digest")


def test_nothing_else_can_be_verified(tmp_path: Path):
    with pytest.raises(UsageProblem, match="not a kind of verification"):
        runtime.open(tmp_path, ep_rank=0, ep_size=1, verify="source")


# --- what is read through a verified shard later -----------------------------------------------
STACK = "model.layers.0.mlp.experts"
ROW, NEW = (0, 1, 2, 0, 1, 2), (0, 2, 1, 0, 1, 2)  # rank 0 gets expert 2, which rank 1 has first


def sharded(folder: Path, layout: str, *, virtual: bool = False) -> Path:
    """A set of three ranks with two slots each; its digests are taken."""
    form = FORMATS["fp8 by channel"]
    src = checkpoint(folder / "src", form, experts(form))
    row = {STACK: ROW}
    moeconv.shard(src, folder / "out", ep_size=3, placement=row, layout=layout, virtual=virtual)
    if virtual:
        moeconv.verify(folder / "out", level="source", source=src, fill=True)
    return folder / "out"


def flipped(path: Path, at: int) -> None:
    """Turn the lowest bit of a byte, and keep the time."""
    facts = path.stat()
    flip(path, at * 8)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize("layout", ["fused", "per-expert", "sglang", "stacked"])
def test_what_comes_from_another_rank_is_compared_with_its_digests(tmp_path: Path, layout: str):
    out = sharded(tmp_path, layout)
    victim = out / "rank-00001-of-00003-00001-of-00001.safetensors"
    data = 8 + int.from_bytes(victim.read_bytes()[:8], "little")
    tensors = read_header(victim)
    assert len(tensors) == {"fused": 4, "per-expert": 12, "sglang": 4, "stacked": 6}[layout]
    for name, start, stop in tensors:
        slots = 1 if layout == "per-expert" else 2
        for slot in range(slots):
            at = data + start + slot * (stop - start) // slots + 1
            wanted = ".0." in name.removeprefix(STACK) if layout == "per-expert" else slot == 0
            flipped(victim, at)
            shard = runtime.open(out, ep_rank=0, ep_size=3, verify="digest")
            if wanted:  # expert 2 is in the first of that rank's slots
                with pytest.raises(Damaged, match="of this rank's matrices") as caught:
                    shard.replace({STACK: NEW})
                assert quoted(name) in str(caught.value)
            else:
                shard.replace({STACK: NEW}).load()
            runtime.open(out, ep_rank=0, ep_size=3).replace({STACK: NEW})
            flipped(victim, at)
    shard = runtime.open(out, ep_rank=0, ep_size=3, verify="digest")
    moved = shard.replace({STACK: NEW})
    assert moved.shard.verify
    flipped(victim, data + tensors[0][1] + 1)
    with pytest.raises(Damaged):
        moved.shard.replace({STACK: ROW}).shard.replace({STACK: NEW})


def test_a_file_of_another_rank_that_changes_after_it_was_verified(tmp_path: Path):
    out = sharded(tmp_path, "fused")
    moves = runtime.open(out, ep_rank=0, ep_size=3, verify="digest").replace({STACK: NEW})
    flip(out / "rank-00001-of-00003-00001-of-00001.safetensors", 8 * 9000)
    with pytest.raises(SourceChanged):
        moves.load()


def test_virtual_outputs_with_digests_are_verified_when_placed_anew(tmp_path: Path):
    out = sharded(tmp_path, "per-expert", virtual=True)
    source = tmp_path / "src" / "model.safetensors"
    start = {name: at for name, at, _ in read_header(source)}
    data = 8 + int.from_bytes(source.read_bytes()[:8], "little")
    shard = runtime.open(out, ep_rank=0, ep_size=3, verify="digest")
    shard.replace({STACK: NEW})
    flipped(source, data + start[f"{STACK}.2.up_proj.weight"])
    shard = runtime.open(out, ep_rank=0, ep_size=3, verify="digest")
    with pytest.raises(Damaged, match=r"experts\.2\.up\.weight"):
        shard.replace({STACK: NEW})


def test_a_copy_of_a_virtual_output_s_source_is_verified_where_asked(tmp_path: Path):
    out, copy = sharded(tmp_path, "per-expert", virtual=True), tmp_path / "copy"
    shutil.copytree(tmp_path / "src", copy, copy_function=shutil.copyfile)
    os.utime(copy / "model.safetensors", ns=(1, 1))
    runtime.open(out, ep_rank=0, ep_size=3, source=copy, verify="digest")
    flip(copy / "model.safetensors", (copy / "model.safetensors").stat().st_size * 8 - 1)
    runtime.open(out, ep_rank=2, ep_size=3, source=copy)  # only its header is looked at
    found = set()
    for rank in range(3):
        try:
            runtime.open(out, ep_rank=rank, ep_size=3, source=copy, verify="digest")
        except Damaged:
            found.add(rank)
    assert found == {1, 2}  # it was expert 2


@pytest.mark.parametrize("placed", [False, True])
def test_an_updater_of_a_verified_output_verifies_the_newer_ones(tmp_path: Path, placed: bool):
    out, newer = sharded(tmp_path, "fused"), tmp_path / "newer"
    shutil.copytree(out, newer)
    shard = runtime.open(out, ep_rank=0, ep_size=3, verify="digest")
    model = like(shard)
    updater = shard.updater(model)
    updater.load(shard)
    if placed:
        shard.replace({STACK: NEW}).load_into(model)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    updater.load(runtime.open(newer, ep_rank=0, ep_size=3))
    rank = int(placed)  # what comes out of another rank's file counts as well
    victim = newer / f"rank-0000{rank}-of-00003-00001-of-00001.safetensors"
    flipped(victim, 8 + int.from_bytes(victim.read_bytes()[:8], "little") + 1)
    damaged = runtime.open(newer, ep_rank=0, ep_size=3)
    with pytest.raises(Damaged):
        updater.load(damaged)
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8))
    plain = runtime.open(out, ep_rank=0, ep_size=3).updater(model)
    if not placed:  # nobody asked for it
        plain.load(damaged)
