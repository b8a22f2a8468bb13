"""Scales and biases that are not there: each is missed, and nothing is said of what needs none."""

from pathlib import Path

import pytest

import moeconv
from moeconv.errors import ExpertDtype, MissingScale, ScaleWithoutWeight
from tests.phantoms import Shape, phantom
from tests.quantised.test_refusals import (
    ASYMMETRIC,
    AWQ,
    GPTQ,
    GROUPS,
    PLAIN,
    STACK,
    per_expert,
    refused,
)


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape"])
@pytest.mark.parametrize("which", ["1.up_proj", "gate_proj", "down_proj"])
def test_a_companion_that_is_missing(part: str, which: str, tmp_path: Path):
    parts = {"weight_packed": "I32 N K//8", "weight_scale": "BF16 N K//32", "weight_shape": "I64 2"}
    tensors = {
        name: spec
        for name, spec in per_expert(parts, width=64).items()
        if not name.endswith(f"{which}.{part}")
    }
    refused(MissingScale, tmp_path, tensors, GROUPS, part)


def test_one_expert_of_16_bits_among_fp8_is_reported_as_that(tmp_path: Path):
    """It has no scales because it needs none: there is nothing to download."""
    tensors = per_expert({"weight": "F8_E4M3 N K", "weight_scale": "F32 N 1"}, width=64)
    tensors |= {
        n.replace(".0.", ".2.").replace("layers.2", "layers.0"): t for n, t in tensors.items()
    }
    for name, (_, shape) in list(tensors.items()):
        if ".experts.2." in name:
            tensors[name] = ("BF16", shape)
    for p in ("gate", "up", "down"):
        del tensors[f"{STACK}.2.{p}_proj.weight_scale"]
    src = phantom(tmp_path / "src", tensors, {"model_type": "qwen3_moe"})
    with pytest.raises(ExpertDtype) as refusal:
        moeconv.fuse(src, tmp_path / "out")
    assert "2.gate_proj.weight` has dtype BF16, not F8_E4M3" in str(refusal.value)
    assert "missing-scale" not in str(refusal.value)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"weight": "F8_E4M3 N K"}, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ({"weight": "U8 N K//2"}, {"quant_method": "modelopt"}),
        ({"weight": "I8 N K"}, {"quant_method": "compressed-tensors"}),
        ({"weight_packed": "U8 N K//2"}, None),
        # what is left says nothing of how large the numbers are
        ({"weight": "F8_E4M3 N K", "input_scale": "F32"}, {"quant_method": "fp8"}),
    ],
)
def test_weights_that_lost_all_their_scales(
    parts: dict[str, str], said: dict[str, object] | None, tmp_path: Path
):
    config = {"model_type": "qwen3_moe"} | ({"quantization_config": said} if said else {})
    refused(MissingScale, tmp_path, per_expert(parts, width=64), config, "but no scales")


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"quant_method": "none"},
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        {"quant_method": "fp8", "modules_to_not_convert": ["experts"]},
        {"quant_method": "compressed-tensors", "ignore": [STACK]},
        {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0"]},
    ],
)
def test_fp8_that_was_left_alone_needs_no_scales(said: dict[str, object], tmp_path: Path):
    """What others cast, or what a quantiser was told to leave; it is said all the same."""
    config = {"model_type": "qwen3_moe", "quantization_config": said}
    src = phantom(tmp_path / "src", per_expert({"weight": "F8_E4M3 N K"}, width=64), config)
    notes = moeconv.fuse(src, tmp_path / "out", dry_run=True).plan.notes
    assert any("F8_E4M3 without scales" in note for note in notes) == bool(said)


def test_fp8_that_nothing_says_is_scaled_is_what_it_is(tmp_path: Path):
    src = phantom(tmp_path / "f8", per_expert({"weight": "F8_E5M2 N K"}, width=64), PLAIN)
    assert moeconv.fuse(src, tmp_path / "out", dry_run=True).plan.notes == ()
    src = phantom(tmp_path / "u8", per_expert({"weight": "U8 N K"}, width=64), PLAIN)
    (note,) = moeconv.fuse(src, tmp_path / "out", dry_run=True).plan.notes
    assert note.startswith("1 stack of U8 without scales")


def test_a_companion_without_its_packed_weight(tmp_path: Path):
    parts = {"weight_packed": "I32 N K//8", "weight_scale": "BF16 N K//32"}
    tensors = per_expert(parts, width=64)
    del tensors[f"{STACK}.1.up_proj.weight_packed"]
    refused(ScaleWithoutWeight, tmp_path, tensors, GROUPS, "1.up_proj.weight_scale")


def test_a_whole_layer_without_the_scales_that_others_have(tmp_path: Path):
    tensors = per_expert({"weight": "F8_E4M3 N K", "weight_scale": "F32 N 1"}, width=64)
    plain = per_expert({"weight": "F8_E4M3 N K"}, width=64)
    bf16 = per_expert({"weight": "BF16 N K"}, width=64)
    for layer, of in ((1, tensors), (2, bf16)):
        tensors |= {n.replace(".0.mlp", f".{layer}.mlp"): t for n, t in of.items()}
    src = phantom(tmp_path / "mixed", tensors, {"model_type": "qwen3_moe"})
    assert len(moeconv.fuse(src, tmp_path / "out", dry_run=True).plan.stacks) == 3
    tensors |= {n.replace(".0.mlp", ".3.mlp"): t for n, t in plain.items()}
    config = {"model_type": "qwen3_moe"}
    refused(MissingScale, tmp_path, tensors, config, "layers.3.mlp.experts` lacks `weight_scale`")


@pytest.mark.parametrize("parts", [GPTQ, AWQ, ASYMMETRIC])
def test_packed_experts_without_any_scale(parts: dict[str, str], tmp_path: Path):
    left = {name: text for name, text in parts.items() if "scale" not in name}
    refused(MissingScale, tmp_path, per_expert(left, width=64), GROUPS, "but no scales")


@pytest.mark.parametrize("lost", ["gate_up_proj_bias", "down_proj_bias"])
def test_gpt_oss_without_one_of_its_biases(lost: str, tmp_path: Path):
    tensors: dict[str, Shape] = {
        f"{STACK}.gate_up_proj": ("BF16", (2, 16, 8)),
        f"{STACK}.gate_up_proj_bias": ("BF16", (2, 8)),
        f"{STACK}.down_proj": ("BF16", (2, 4, 16)),
        f"{STACK}.down_proj_bias": ("BF16", (2, 16)),
    }
    del tensors[f"{STACK}.{lost}"]
    refused(MissingScale, tmp_path, tensors, {"model_type": "gpt_oss"}, "`bias`")
