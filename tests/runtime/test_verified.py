"""`open(..., verify="digest")`: right sets open in every layout, and no flipped bit gets in."""

import json
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeconv
from moeconv import runtime
from moeconv.errors import BadManifest, Damaged, DigestsMissing, UsageProblem, quoted
from moeconv.runtime.complete import check_complete
from tests.models import FAMILIES, Disk, Model, disks, models
from tests.quantised.packing import FORMATS
from tests.quantised.test_formats import checkpoint, experts
from tests.shard.test_shards import placements


@given(models(), disks(), st.data())
def test_a_set_opens_and_a_flipped_bit_is_named_with_its_tensor(
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
def test_packed_experts_without_their_weight_are_none(name: str, tmp_path: Path):
    form = FORMATS[name]
    src = checkpoint(tmp_path / "src", form, experts(form))
    moeconv.shard(src, tmp_path / "out", ep_size=3)
    shard = runtime.open(tmp_path / "out", ep_rank=1, ep_size=3)
    (packed,) = {"weight_packed", "qweight"} & form.dtypes.keys()
    entries = [s.entry for s in shard.own]
    lacking = [e for e in entries if e.expert is None or e.expert.component != packed]
    with pytest.raises(BadManifest, match="no weight of down, gate, up"):
        check_complete(
            shard.home.root,
            shard.rows,
            [s.entry for s in shard.common],
            lacking,
            rank=1,
            ep_size=3,
        )


@pytest.mark.parametrize("layout", ["kn", "megablocks", "up-gate", "fused"])
def test_whole_sets_with_turned_matrices(layout: str, tmp_path: Path):
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


def test_digests_that_nobody_took_are_no_match(tmp_path: Path):
    form = FORMATS["fp8 by tensor"]
    src = checkpoint(tmp_path / "src", form, experts(form))
    moeconv.shard(src, tmp_path / "out", ep_size=3, virtual=True, layout="per-expert")
    with pytest.raises(DigestsMissing, match="--fill"):
        runtime.open(tmp_path / "out", ep_rank=1, ep_size=3, verify="digest")
    moeconv.verify(tmp_path / "out", level="source", source=src, fill=True)
    runtime.open(tmp_path / "out", ep_rank=1, ep_size=3, verify="digest")


def test_nothing_else_can_be_verified(tmp_path: Path):
    with pytest.raises(UsageProblem, match="nothing to verify"):
        runtime.open(tmp_path, ep_rank=0, ep_size=1, verify="source")
