"""Sizes of blocks and groups: config.json says them, for one kind of layers or for several."""

from pathlib import Path

import pytest

import moeconv
from moeconv.errors import ConfigMismatch, LayoutContradiction, MoeconvError
from tests.phantoms import Shape, phantom
from tests.quantised.test_refusals import ASYMMETRIC, BLOCKS, GPTQ, STACK, per_expert, refused


def config(**groups: object) -> dict[str, object]:
    """What compressed-tensors says: a group for each kind of layers, by its weights' sizes."""
    named = {name: {"targets": ["Linear"], "weights": sizes} for name, sizes in groups.items()}
    return {"model_type": "qwen3_moe", "quantization_config": {"config_groups": named}}


def made(tmp_path: Path, tensors: dict[str, Shape], said: dict[str, object]) -> dict[str, str]:
    """The axes of the fused tensors, by what follows the stack's name."""
    src = phantom(tmp_path / "src", tensors, said)
    plan = moeconv.fuse(src, tmp_path / "out", dry_run=True).plan
    tensors_ = (t for f in plan.files for t in f.tensors)
    return {t.name.removeprefix(f"{STACK}."): t.expert.axes for t in tensors_ if t.expert}


@pytest.mark.parametrize("sizes", [[32], [32, 32], [64, 32], [128, 32, 64]])
@pytest.mark.parametrize("parts", [ASYMMETRIC, GPTQ])
def test_experts_may_be_in_groups_of_any_of_them(
    parts: dict[str, str], sizes: list[int], tmp_path: Path
):
    groups = {f"group_{n}": {"group_size": size} for n, size in enumerate(sizes)}
    axes = made(tmp_path, per_expert(parts, width=64), config(**groups))
    assert "K/32" in axes.get("gate_up_proj_zero_point", axes.get("gate_up_proj_scales", ""))


@pytest.mark.parametrize("block", [[128, 128], "128x128", "128 x 128"])
def test_a_block_structure_may_be_a_text(block: object, tmp_path: Path):
    parts = {"weight": "F8_E4M3 N K", "weight_scale": "F32 N//128 K//128"}
    tensors = per_expert(parts, width=256)
    attention = {"block_structure": [64, 64], "group_size": 32}
    said = config(group_0=attention, group_1={"block_structure": block})
    if block == "128 x 128":  # what nobody writes is not guessed at
        refused(LayoutContradiction, tmp_path, tensors, said, "F32 [2, 2]", "O/block.0 K/block.1")
    else:
        axes = made(tmp_path, tensors, said)
        assert axes["gate_up_proj_scale"] == "E (G O/128) K/128"


def test_two_sizes_that_both_fit_are_not_chosen_from(tmp_path: Path):
    parts = {"qweight": "I32 K//8 N", "qzeros": "I32 1 N//8", "scales": "F16 1 N"}
    said = config(group_0={"group_size": 512}, group_1={"group_size": 256})
    facts = ("several block or group sizes", "`K/512 O/8` or `K/256 O/8`")
    refused(ConfigMismatch, tmp_path, per_expert(parts, width=64), said, *facts)


def test_a_size_that_none_of_them_needs_is_ignored(tmp_path: Path):
    parts = {"weight": "F8_E4M3 N K", "weight_scale": "F32 N 1"}
    said = config(group_0={"group_size": 64}, group_1={"group_size": None})
    assert made(tmp_path, per_expert(parts, width=64), said)["gate_up_proj_scale"] == "E (G O) 1"


@pytest.mark.parametrize(
    ("parts", "said", "kind", "facts"),
    [
        # blocks, and nothing says how large
        (BLOCKS, {}, ConfigMismatch, ("F32 [2, 2]", "O K/32", "weight_block_size`")),
        # a width that no recipe has
        (
            {"weight_packed": "I32 N K//10", "weight_scale": "BF16 N K//32"},
            {"quantization_config": {"group_size": 32}},
            LayoutContradiction,
            ("weight_packed`, I32 [256, 25]", "`O K/8`, `O K/2`, `O K/4`, `O K/16`"),
        ),
        # the weights are known, their scales are in groups that are not
        (
            {"weight": "F8_E4M3 N K", "weight_scale": "F32 N 3"},
            {"quantization_config": {"group_size": 32, "weight_block_size": [128, 128]}},
            LayoutContradiction,
            ("weight_scale`, F32 [256, 3]", "one number, `1`, `O 1`"),
        ),
        # of several parts the one that is odd
        (
            {**ASYMMETRIC, "weight_zero_point": "I32 N 3"},
            {"quantization_config": {"group_size": 32}},
            LayoutContradiction,
            ("weight_zero_point`, I32 [256, 3]", "`O/4 K/32`"),
        ),
    ],
)
def test_what_fits_no_interpretation_is_reported_with_all_of_them(
    parts: dict[str, str],
    said: dict[str, object],
    kind: type[MoeconvError],
    facts: tuple[str, ...],
    tmp_path: Path,
):
    tensors = per_expert(parts, width=256)
    refused(kind, tmp_path, tensors, {"model_type": "qwen3_moe"} | said, *facts)
