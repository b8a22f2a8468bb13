"""What `shard` and `merge` refuse, and what they say."""

import json
import os
from pathlib import Path

import pytest

import moeconv
from moeconv.errors import (
    BadPlacement,
    NotAnOutput,
    NotVirtual,
    SourceChanged,
    SourceMissing,
    UnknownLayout,
    UnsafeOutput,
    UsageProblem,
    WouldOverwrite,
)
from moeconv.placement.model import Placement
from tests.badinput.builders import config, fused, qwen, write
from tests.badinput.checks import refused, untouched

STACK = "model.layers.0.mlp.experts"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Four experts in two layers."""
    return write(tmp_path / "src", qwen(layers=2), config=config(num_hidden_layers=2))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Nothing yet."""
    return tmp_path / "out"


def refuses(kind: type[moeconv.MoeconvError], *facts: str, src: Path, out: Path, **more: object):
    """`shard` refuses, planned and for real, and touches nothing."""
    return refused(kind, *facts, src=src, out=out, verb=moeconv.shard, **more)


def test_experts_that_ranks_cannot_share(src: Path, out: Path):
    # E = 4 on 3 ranks: 3 slots more or 2 of them; the nearest are named
    refuses(BadPlacement, "4 experts", "ep 3", "2 redundant", src=src, out=out, ep_size=3)


def test_redundant_experts_that_do_not_fill_the_ranks(src: Path, out: Path):
    facts = ("4 experts and 3 redundant", "2 redundant", "4 redundant")
    refuses(BadPlacement, *facts, src=src, out=out, ep_size=2, redundant=3)


def test_one_expert_twice_on_a_rank(src: Path, out: Path):
    facts = ("expert 0 is twice on rank 0", "slots 0, 4", STACK)
    refuses(BadPlacement, *facts, src=src, out=out, ep_size=1, redundant=4)
    done = moeconv.shard(src, out, ep_size=1, redundant=4, allow_duplicates=True)
    assert done.plan.replica_bytes > 0
    assert moeconv.verify(out, level="source", source=src).ok


def test_all_that_is_wrong_with_a_map_at_once(src: Path, out: Path):
    bad = json.dumps({"physical_to_logical_map": [[0, 1, 2, 4], [0, 0, 2, 3]]})
    facts = ("layer 0", "holds expert 4", "expert 3 is in no slot", "layer 1", "expert 1 is in no")
    refuses(BadPlacement, *facts, src=src, out=out, ep_size=2, placement=bad)


def test_a_map_of_another_model(src: Path, out: Path):
    rows = json.dumps([[0, 1, 2, 3]] * 5)
    refuses(BadPlacement, "5 rows", "2", src=src, out=out, ep_size=2, placement=rows)


def test_a_map_for_layers_that_are_not_there(src: Path, out: Path):
    wrong = Placement(4, (0, 7), ((0, 1, 2, 3), (0, 1, 2, 3)))
    refuses(BadPlacement, "layer 7", "layer 1", src=src, out=out, ep_size=2, placement=wrong)


def test_rows_for_a_stack_that_is_not_there(src: Path, out: Path):
    wrong = {"model.layers.9.mlp.experts": (0, 1, 2, 3)}
    refuses(BadPlacement, "model.layers.9", src=src, out=out, ep_size=2, placement=wrong)


def test_redundancy_that_is_not_the_maps(src: Path, out: Path):
    rows = json.dumps([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)
    refuses(
        UsageProblem,
        "`--redundant 2`",
        "8 slots are 4 more than the 4 experts",
        src=src,
        out=out,
        ep_size=2,
        placement=rows,
        redundant=2,
    )


def test_a_map_that_is_neither_a_file_nor_a_rule(src: Path, out: Path):
    refuses(UsageProblem, "`balanced`", src=src, out=out, ep_size=2, placement="balanced")


def test_an_invalid_layout(src: Path, out: Path):
    refuses(UnknownLayout, "`sideways`", "`fused`", src=src, out=out, ep_size=2, layout="sideways")


def test_out_that_is_not_empty(src: Path, out: Path):
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refuses(WouldOverwrite, "notes.txt", src=src, out=out, ep_size=2)


def test_merge_of_what_is_not_an_output(src: Path, out: Path):
    refused(NotAnOutput, "moeconv.json", src=src, out=out, verb=moeconv.merge)


# --- virtual -----------------------------------------------------------------------------------
def test_a_layout_that_turns_the_values_is_not_virtual(tmp_path: Path, out: Path):
    source = write(tmp_path / "vl", fused((4, 24, 16), (4, 8, 24)), config=config("qwen3_vl_moe"))
    facts = ("down_proj", "another order", "`--layout`")
    refuses(NotVirtual, *facts, src=source, out=out, ep_size=2, virtual=True)
    moeconv.shard(source, out, ep_size=2, virtual=True, layout="hub")


def test_a_virtual_output_whose_source_has_changed(src: Path, out: Path):
    moeconv.shard(src, out, ep_size=2, virtual=True)
    victim = src / "model.safetensors"
    facts = victim.stat()
    os.utime(victim, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    for ask in (moeconv.open_source, moeconv.fingerprint):
        with untouched(src, out), pytest.raises(SourceChanged, match=r"model\.safetensors"):
            ask(out)
    (problem,) = moeconv.verify(out).problems
    assert isinstance(problem, SourceChanged)
    os.utime(victim, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert moeconv.verify(out, level="structure").ok


def test_a_virtual_output_whose_source_is_gone(src: Path, out: Path):
    moeconv.shard(src, out, ep_size=2, virtual=True)
    src.rename(src.with_name("moved"))
    with pytest.raises(SourceMissing):
        moeconv.open_source(out)


def test_nothing_is_written_into_the_source_of_a_virtual_output(src: Path, out: Path):
    moeconv.shard(src, out, ep_size=2, virtual=True)
    refused(UnsafeOutput, "SRC", src=out, out=src / "inside", verb=moeconv.merge)


def test_digests_of_a_source_that_has_them_are_carried(src: Path, tmp_path: Path, out: Path):
    moeconv.fuse(src, tmp_path / "fused")
    moeconv.shard(tmp_path / "fused", out, ep_size=2, redundant=2, virtual=True)
    assert moeconv.verify(out).ok
    assert moeconv.fingerprint(out) == moeconv.fingerprint(src)


def test_fill_is_for_the_level_that_compares(src: Path, out: Path):
    moeconv.shard(src, out, ep_size=2, virtual=True)
    with pytest.raises(UsageProblem, match="--fill"):
        moeconv.verify(out, fill=True)


def test_fill_adds_nothing_where_the_source_is_another(src: Path, tmp_path: Path, out: Path):
    moeconv.shard(src, out, ep_size=2, virtual=True)
    other = write(tmp_path / "other", qwen(layers=2), config=config(num_hidden_layers=2))
    raw = bytearray((other / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (other / "model.safetensors").write_bytes(raw)
    with untouched(out):
        assert not moeconv.verify(out, level="source", source=other, fill=True).ok


def test_a_virtual_output_of_a_virtual_output_points_to_the_bytes(
    src: Path, tmp_path: Path, out: Path
):
    moeconv.shard(src, out, ep_size=2, virtual=True)
    moeconv.shard(out, tmp_path / "again", ep_size=4, virtual=True)
    root = json.loads((tmp_path / "again" / "moeconv.json").read_bytes().partition(b"\n")[0])
    assert root["source"]["directory"] == str(src.resolve())
