"""The router is the witness: how many experts a stack has where config.json is another model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moeconv
from moeconv.errors import ConfigMismatch, ExpertOutOfRange
from tests.badinput.builders import Tensors, fused, qwen, write
from tests.badinput.checks import refused
from tests.helpers import tree_sha256

ROUTER = "model.layers.0.mlp.gate.weight"
BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"


def _source(
    root: Path, tensors: Tensors, *, stated: int, router: int | None, bias: int | None = None
) -> Path:
    kept = {name: spec for name, spec in tensors.items() if name != ROUTER}
    hidden = tensors["model.embed_tokens.weight"][1][1]
    if router is not None:
        kept[ROUTER] = ("F32", (router, hidden))
    if bias is not None:
        kept[BIAS] = ("F32", (bias,))
    return write(root, kept, config={"model_type": "qwen3_moe", "num_experts": stated}, index=False)


def test_a_pruned_model_with_the_config_of_the_whole_one(src: Path, tmp_path: Path) -> None:
    _source(src, qwen(4), stated=8, router=4, bias=4)
    result = moeconv.fuse(src, tmp_path / "out")
    notes = [n for n in result.source.detection.notes if "config.json says 8" in n]
    assert len(notes) == 1
    assert "the tensors have 4 experts; so has the router" in notes[0]
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


def test_a_pruned_model_that_is_fused(src: Path, tmp_path: Path) -> None:
    tensors = fused((4, 16, 8), (4, 8, 8))
    tensors["model.embed_tokens.weight"] = ("BF16", (32, 8))
    _source(src, tensors, stated=8, router=4)
    assert moeconv.unfuse(src, tmp_path / "out").source.detection.stacks[0].sizes.experts == 4


@pytest.mark.parametrize("stated", [4, 8])
def test_a_config_that_the_tensors_agree_with_needs_no_witness(
    src: Path, out: Path, stated: int
) -> None:
    # zero-computation experts have rows in the router, too
    _source(src, qwen(stated), stated=stated, router=stated + 2)
    result = moeconv.fuse(src, out, dry_run=True)
    assert not [note for note in result.source.detection.notes if "config.json says" in note]


def test_a_second_key_that_is_stale_is_noted(src: Path, out: Path) -> None:
    _source(src, qwen(4), stated=4, router=4)
    stale = {"model_type": "qwen3_moe", "num_experts": 4, "n_routed_experts": 8}
    (src / "config.json").write_text(json.dumps(stale))
    result = moeconv.fuse(src, out, dry_run=True)
    assert [n for n in result.source.detection.notes if "key `n_routed_experts`" in n]


def test_experts_that_are_lost(src: Path, out: Path) -> None:
    _source(src, qwen(4), stated=8, router=8)
    refused(ConfigMismatch, "config.json says 8", "4 experts", "8 rows", src=src, out=out)


@pytest.mark.parametrize(("router", "bias"), [(None, None), (6, None), (4, 8)])
def test_a_router_that_is_no_witness(
    src: Path, out: Path, router: int | None, bias: int | None
) -> None:
    _source(src, qwen(4), stated=8, router=router, bias=bias)
    said = "" if router is None or bias else f"its router has {router} rows"
    refused(ConfigMismatch, "config.json says 8", said, src=src, out=out)


def test_no_fix_tells_to_remove_experts(src: Path, out: Path) -> None:
    _source(src, qwen(8), stated=4, router=None)
    problem = refused(ExpertOutOfRange, "states only 4", src=src, out=out)
    assert "remove" not in str(problem.fix)
