"""`diff` and `fingerprint` read what they speak of; recorded digests are believed only if asked."""

import json
import os
import shutil
from pathlib import Path

import pytest

import moeconv
from moeconv.errors import Damaged
from tests.cli.run import moeconv as command
from tests.verification.forged import flip


def damaged(out: Path) -> Path:
    """A copy with one bit of its data turned around."""
    copy = out.with_name(f"{out.name}-damaged")
    shutil.copytree(out, copy)
    flip(max(copy.glob("*.safetensors")))
    return copy


@pytest.mark.parametrize("kind", ["out", "ranks"])
def test_a_damaged_output_is_not_the_same(kind: str, src: Path, request: pytest.FixtureRequest):
    bad = damaged(request.getfixturevalue(kind))
    differing = [d for d in moeconv.diff(bad, src) if d.mark != "="]
    assert [(d.mark, d.why, d.damaged) for d in differing] == [("*", "bytes", ("A",))]
    with pytest.raises(Damaged) as caught:
        moeconv.fingerprint(bad)
    assert differing[0].address in str(caught.value)


def test_two_outputs_that_are_damaged_alike(out: Path):
    bad = damaged(out)
    found = moeconv.diff(bad, bad)
    assert {d.mark for d in found} == {"="}
    assert [d.damaged for d in found if d.damaged] == [("A", "B")]
    done = command("diff", bad, bad)
    assert done.code == 1
    assert "A is damaged: 1 matrix" in done.err
    assert "B is damaged: 1 matrix" in done.err
    doc = json.loads(command("diff", bad, bad, "--json").out)
    assert doc["damaged"]["a"] == doc["damaged"]["b"] != []


def test_replicas_that_differ_in_an_output_without_digests(src: Path, tmp_path: Path):
    """Nothing is recorded, but of two copies of an expert one must be wrong."""
    out = tmp_path / "later"
    moeconv.shard(src, out, ep_size=2, redundant=2, digests="later")
    assert moeconv.fingerprint(out) == moeconv.fingerprint(src)
    checkpoint = moeconv.open_source(out).checkpoint
    rank = next(f for f in checkpoint.files if f.name.startswith("rank-00001"))
    tensor = next(t for t in rank.header.tensors if t.name.endswith("gate_up_proj"))
    flip(rank.path, tensor.offset + tensor.nbytes - 1)  # the last slot is a replica
    with pytest.raises(Damaged, match="damaged"):
        moeconv.fingerprint(out)
    assert any(d.damaged for d in moeconv.diff(src, out))


def test_a_virtual_output_is_compared_with_its_digests(src: Path, tmp_path: Path):
    out = tmp_path / "v"
    moeconv.shard(src, out, ep_size=2, virtual=True, layout="per-expert")
    assert moeconv.verify(out, level="source", source=src, fill=True).ok
    value = moeconv.fingerprint(out)
    path = src / "model.safetensors"
    facts = path.stat()
    flip(path)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(Damaged):
        moeconv.fingerprint(out)
    assert moeconv.fingerprint(out, recorded=True) == value


def test_recorded_digests_are_believed_where_asked(out: Path, src: Path):
    bad = damaged(out)
    assert moeconv.fingerprint(bad, recorded=True) == moeconv.fingerprint(src)
    assert {d.mark for d in moeconv.diff(bad, src, recorded=True)} == {"="}
    for verb in (["diff", bad, src], ["fingerprint", bad]):
        done = command(*verb, "--recorded", "--json")
        assert done.code == 0
        assert json.loads(done.out)["recorded"] is True
        assert "were trusted" in done.err
        assert json.loads(command(verb[0], src, *verb[2:], "--json").out)["recorded"] is False


def test_an_output_that_lacks_digests_is_read_all_the_same(src: Path, tmp_path: Path):
    moeconv.fuse(src, tmp_path / "later", digests="later")
    bad = damaged(tmp_path / "later")
    assert {d.mark for d in moeconv.diff(bad, src, recorded=True)} == {"=", "*"}


def test_progress_is_in_bytes_of_both_sides(out: Path, src: Path):
    seen: list[tuple[int, int]] = []
    moeconv.diff(out, src, progress=lambda *at: seen.append(at))
    both = sum(moeconv.open_source(p).checkpoint.tensor_bytes for p in (out, src))
    assert seen[-1] == (both, both)
    seen.clear()
    moeconv.diff(out, src, recorded=True, progress=lambda *at: seen.append(at))
    assert seen[-1] == (both // 2, both // 2)
