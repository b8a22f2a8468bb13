"""Every slot of every rank right, nothing lost, nothing twice, and always a way back."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize

import moeconv
from moeconv.cli.demo_checkpoint import make_checkpoint
from moeconv.errors import NotVirtual
from tests.helpers import tree_sha256
from tests.models import FAMILIES, Disk, Model, disks, models
from tests.shard.reading import Rows, expected, experts_of, tensors_by_rank

EPS = (1, 2, 3, 8)


@st.composite
def rows(draw: st.DrawFn, experts: int, ep: int) -> tuple[int, ...]:
    """A permuted row with redundant experts, of a length that the ranks can share."""
    least = -(-experts // ep) * ep
    slots = least + ep * draw(st.integers(0, 2))
    more = draw(
        st.lists(st.integers(0, experts - 1), min_size=slots - experts, max_size=slots - experts)
    )
    return tuple(draw(st.permutations([*range(experts), *more])))


@st.composite
def placements(draw: st.DrawFn, model: Model, ep: int) -> Rows:
    """A row for each stack."""
    return {n: draw(rows(experts_of(parts), ep)) for n, parts in model.stacks.items()}


@given(models(), disks(), st.data())
def test_each_rank_holds_its_slots_and_merge_gives_the_source(
    model: Model, disk: Disk, data: st.DataObject
):
    layouts = list(FAMILIES[model.family].layouts)
    source, target = (data.draw(st.sampled_from(layouts)) for _ in range(2))
    ep = data.draw(st.sampled_from(EPS))
    placement = data.draw(placements(model, ep))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        src = disk.write(root / "src", model.tensors(source), model.config)
        before = tree_sha256(src)
        result = moeconv.shard(
            src,
            root / "out",
            ep_size=ep,
            placement=placement,
            allow_duplicates=True,
            layout=target,
            from_layout=source,
            max_shard_size=data.draw(st.sampled_from((1, 8192, 10**9))),
            jobs=data.draw(st.sampled_from((1, 3))),
        )
        assert tensors_by_rank(root / "out") == expected(model, target, placement, ep)
        written = sum(
            len(d) for held in tensors_by_rank(root / "out").values() for *_, d in held.values()
        )
        assert written == result.plan.tensor_bytes
        assert (
            written
            == sum(len(d) for *_, d in model.tensors(target).values()) + result.plan.replica_bytes
        )
        assert moeconv.fingerprint(root / "out") == model.fingerprint
        for level in ("structure", "digest"):
            assert moeconv.verify(root / "out", level=level).problems == ()
        report = moeconv.verify(root / "out", level="source", source=src, from_layout=source)
        assert report.problems == ()
        moeconv.merge(root / "out", root / "back")
        assert tree_sha256(root / "back") == before
        assert tree_sha256(src) == before


@given(models(), disks(), st.data())
def test_ranks_to_other_ranks_and_back_is_the_identity(
    model: Model, disk: Disk, data: st.DataObject
):
    layouts = list(FAMILIES[model.family].layouts)
    one, other = (data.draw(st.sampled_from(layouts)) for _ in range(2))
    eps = [data.draw(st.sampled_from(EPS)) for _ in range(2)]
    first, second = (data.draw(placements(model, ep)) for ep in eps)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        src = disk.write(root / "src", model.tensors(layouts[0]), model.config)
        before = tree_sha256(src)

        def shard(a: Path, b: str, ep: int, placement: Rows, layout: str, **more: str) -> None:
            moeconv.shard(
                a,
                root / b,
                ep_size=ep,
                placement=placement,
                allow_duplicates=True,
                layout=layout,
                **more,  # type: ignore[arg-type]
            )

        shard(src, "a", eps[0], first, one, from_layout=layouts[0])
        shard(root / "a", "b", eps[1], second, other)
        assert tensors_by_rank(root / "b") == expected(model, other, second, eps[1])
        shard(root / "b", "c", eps[0], first, one)
        assert tree_sha256(root / "c") == tree_sha256(root / "a")
        assert {d.mark for d in moeconv.diff(root / "a", root / "b")} == {"="}
        moeconv.unfuse(root / "b", root / "back")
        assert tree_sha256(root / "back") == before
        # a whole output of ours, and one made of ranks, are the same whole output
        moeconv.merge(root / "b", root / "whole", layout=one)
        moeconv.fuse(src, root / "direct", layout=one, from_layout=layouts[0])
        assert tree_sha256(root / "whole") == tree_sha256(root / "direct")


@given(models(), disks(), st.data())
def test_a_virtual_output_is_its_source_seen_by_ranks(
    model: Model, disk: Disk, data: st.DataObject
):
    layouts = list(FAMILIES[model.family].layouts)
    source, target = (data.draw(st.sampled_from(layouts)) for _ in range(2))
    ep = data.draw(st.sampled_from(EPS))
    placement = data.draw(placements(model, ep))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        src = disk.write(root / "src", model.tensors(source), model.config)
        before = tree_sha256(src)

        def shard(a: Path, b: str, layout: str, *, virtual: bool, known: str | None) -> None:
            moeconv.shard(
                a,
                root / b,
                ep_size=ep,
                placement=placement,
                allow_duplicates=True,
                virtual=virtual,
                layout=layout,
                from_layout=known,
            )

        try:
            shard(src, "v", target, virtual=True, known=source)
        except NotVirtual:
            assert not (root / "v").exists()
            return
        assert not list((root / "v").glob("rank-*"))
        assert not list((root / "v").glob("common-*"))
        assert runs_by_rank(root / "v") == {
            rank: {name: d for name, (*_, d) in held.items()}
            for rank, held in expected(model, target, placement, ep).items()
        }
        assert moeconv.verify(root / "v", level="structure").problems == ()
        assert [p.code for p in moeconv.verify(root / "v").problems] == ["digests-missing"]
        report = moeconv.verify(
            root / "v", level="source", source=src, from_layout=source, fill=True
        )
        assert report.problems == ()
        assert moeconv.verify(root / "v").problems == ()
        assert moeconv.fingerprint(root / "v") == model.fingerprint
        # made from it, a set of files is the one made from the source
        if source == "per-expert":
            shard(root / "v", "w", target, virtual=False, known=None)
            shard(src, "x", target, virtual=False, known=source)
            assert tree_sha256(root / "w") == tree_sha256(root / "x")
            moeconv.merge(root / "v", root / "back")
            assert tree_sha256(root / "back") == before


def runs_by_rank(out: Path) -> dict[int | None, dict[str, bytes]]:
    """The bytes that the parts of a virtual set point to, followed by hand."""
    root = json.loads((out / "moeconv.json").read_bytes().partition(b"\n")[0])
    files = [Path(root["source"]["directory"]) / f["name"] for f in root["source"]["files"]]
    raws = [f.read_bytes() for f in files]
    found: dict[int | None, dict[str, bytes]] = {}
    for entry in root["parts"]:
        doc = json.loads((out / entry["name"]).read_bytes())
        found[doc["rank"]] = {
            t["name"]: b"".join(raws[f][at : at + n] for f, at, n in t["runs"])
            for t in doc.get("virtual", [])
        }
    return found


@given(models(), disks(), st.data())
def test_any_flipped_byte_is_found(model: Model, disk: Disk, data: st.DataObject):
    """In replicas, too: each file is held against its own digests and against the source."""
    source = next(iter(FAMILIES[model.family].layouts))
    ep = data.draw(st.sampled_from(EPS))
    placement = data.draw(placements(model, ep))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        src = disk.write(root / "src", model.tensors(source), model.config)
        moeconv.shard(
            src,
            root / "out",
            ep_size=ep,
            placement=placement,
            allow_duplicates=True,
            from_layout=source,
        )
        files = [f for f in sorted((root / "out").glob("*-of-*")) if f.stat().st_size > 4096]
        victim = data.draw(st.sampled_from(files))
        raw = bytearray(victim.read_bytes())
        at = data.draw(st.integers(8 + int.from_bytes(raw[:8], "little"), len(raw) - 1))
        raw[at] ^= 0x10
        victim.write_bytes(raw)
        problems = moeconv.verify(root / "out").problems
        assert len(problems) == 1
        assert victim.name in str(problems[0])
        assert not moeconv.verify(root / "out", level="source", source=src, from_layout=source).ok


@pytest.mark.parametrize("redundant", [0, 8])
def test_the_demo_by_hand(tmp_path: Path, redundant: int):
    """One case that can be read: gate_up of rank 3 of 8 is rows of the source, by name."""
    make_checkpoint(tmp_path / "src")
    moeconv.shard(tmp_path / "src", tmp_path / "out", ep_size=8, redundant=redundant)
    by_rank = tensors_by_rank(tmp_path / "out")
    whole = {
        name: data
        for path in sorted((tmp_path / "src").glob("*.safetensors"))
        for name, (_, _, data) in _stock(path).items()
    }
    stack = "model.layers.1.mlp.experts"
    share = (16 + redundant) // 8
    for rank in range(8):
        dtype, shape, data = by_rank[rank][f"{stack}.gate_up_proj"]
        assert (dtype, shape) == ("F16", (share, 128, 128))
        experts = [(rank * share + s) % 16 for s in range(share)]
        assert data == b"".join(
            whole[f"{stack}.{e}.{p}_proj.weight"] for e in experts for p in ("gate", "up")
        )


def _stock(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        n: (f["dtype"], tuple(f["shape"]), bytes(f["data"]))
        for n, f in deserialize(path.read_bytes())
    }
