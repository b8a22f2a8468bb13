"""fp8 that transformers saved by default: weights expert by expert, scales of all in one tensor."""

from collections.abc import Mapping
from pathlib import Path

import pytest

import moeconv
from moeconv.errors import (
    ExpertGap,
    LayoutContradiction,
    MissingExpert,
    MissingScale,
    MixedLayouts,
    MoeconvError,
    UnknownLayout,
)
from tests.helpers import tree_sha256
from tests.phantoms import Shape, phantom, rows

STACK = "model.layers.0.mlp.experts"
CONFIG = {"model_type": "qwen3_moe", "num_experts": 3}
HALVES = f"""{STACK}.{{0-2}}.gate_proj.weight F8_E4M3 4,6
{STACK}.{{0-2}}.up_proj.weight F8_E4M3 4,6
{STACK}.{{0-2}}.down_proj.weight F8_E4M3 6,4
{STACK}.gate_up_proj_scale_inv F32 3,1,1
{STACK}.down_proj_scale_inv F32 3,1,1"""


def without(*parts: str) -> dict[str, Shape]:
    return {n: s for n, s in rows(HALVES).items() if not any(part in n for part in parts)}


def test_it_is_read(tmp_path: Path):
    src = phantom(tmp_path / "src", rows(HALVES), CONFIG)
    plan = moeconv.fuse(src, tmp_path / "out", dry_run=True).plan
    made = {t.name: t.shape for f in plan.files for t in f.tensors}
    assert made[f"{STACK}.gate_up_proj"] == (3, 8, 6)
    assert made[f"{STACK}.gate_up_proj_scale_inv"] == (3, 1, 1)
    assert [s.origin_layout for s in plan.stacks] == ["half-apart"]


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        (without(".1."), ExpertGap),
        (without("1.up_proj"), MissingExpert),
        (without("up_proj.weight"), MissingExpert),
        (without("down_proj_scale"), MissingScale),
        (without("gate_up_proj_scale"), MissingScale),
        # two experts under scales of three
        (without(".2."), LayoutContradiction),
        # a weight in both forms is one too many
        (rows(f"{HALVES}\n{STACK}.down_proj F8_E4M3 3,6,4"), MixedLayouts),
        (rows(f"{HALVES}\n{STACK}.1.up_proj.weight_scale_inv F32 1,1"), MixedLayouts),
    ],
)
def test_what_is_not_whole_is_refused(
    tensors: Mapping[str, Shape], kind: type[MoeconvError], tmp_path: Path
):
    blocks = {"quantization_config": {"weight_block_size": [128, 128]}}
    src = phantom(tmp_path / "src", tensors, {"model_type": "qwen3_moe"} | blocks)
    with pytest.raises(kind):
        moeconv.fuse(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_is_not_written(tmp_path: Path):
    src = phantom(tmp_path / "src", rows(HALVES), CONFIG)
    with pytest.raises(UnknownLayout, match="half-apart"):
        moeconv.fuse(src, tmp_path / "out", layout="half-apart")


FUSED = f"""{STACK}.gate_up_proj F8_E4M3 4,128,64
{STACK}.down_proj F8_E4M3 4,64,64
{STACK}.gate_up_proj_scale_inv F32 4,1,1
{STACK}.down_proj_scale_inv F32 4,1,1"""
APART = f"""{STACK}.{{0-3}}.gate_proj.weight F8_E4M3 64,64
{STACK}.{{0-3}}.up_proj.weight F8_E4M3 64,64
{STACK}.{{0-3}}.down_proj.weight F8_E4M3 64,64
{STACK}.gate_up_proj_scale_inv F32 4,1,1
{STACK}.down_proj_scale_inv F32 4,1,1"""


@pytest.mark.parametrize("text", [FUSED, APART], ids=["fused", "half apart"])
@pytest.mark.parametrize("layout", ["per-expert", "stacked", "sglang"])
def test_matrices_no_larger_than_a_block(text: str, layout: str, tmp_path: Path):
    """One number and a grid of one block look alike in an output: the manifest says which it is."""
    config = {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "quantization_config": {"weight_block_size": [128, 128]},
    }
    src, out = phantom(tmp_path / "src", rows(text), config), tmp_path / "out"
    if layout == "per-expert":
        moeconv.unfuse(src, out, layout=layout)
    else:
        moeconv.fuse(src, out, layout=layout)
    assert moeconv.verify(out).problems == ()
    assert moeconv.verify(out, level="source", source=src).problems == ()
    assert moeconv.fingerprint(out) == moeconv.fingerprint(src)
    moeconv.fuse(out, tmp_path / "again")
    moeconv.shard(out, tmp_path / "ranks", ep_size=2)
    for number, made in enumerate((out, tmp_path / "again")):
        moeconv.unfuse(made, tmp_path / f"back-{number}")
        assert tree_sha256(tmp_path / f"back-{number}") == tree_sha256(src)
    moeconv.merge(tmp_path / "ranks", tmp_path / "merged")
    assert tree_sha256(tmp_path / "merged") == tree_sha256(src)
