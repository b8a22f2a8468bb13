"""Experts that are missing, odd, or too many: the damage that must never pass for success."""

from pathlib import Path

import pytest

import moeconv
from moeconv.errors import (
    ExpertDtype,
    ExpertGap,
    ExpertOutOfRange,
    ExpertShape,
    LayoutContradiction,
    MissingExpert,
    MissingScale,
    MixedLayouts,
    MoeconvError,
    ScaleWithoutWeight,
    UnknownExpertTensor,
)
from tests.badinput.builders import (
    SHARD,
    STACK,
    Tensors,
    added,
    changed,
    config,
    fp8_config,
    fused,
    qwen,
    without,
    write,
)
from tests.badinput.checks import holds, refused, within

FP8 = qwen(dtype="F8_E4M3", block=8)


def test_a_gap_in_the_expert_ids(src: Path, out: Path):
    write(src, without(qwen(), ".experts.2."))
    refused(ExpertGap, STACK, "expert 2", "up to 3", "states 4 experts", src=src, out=out)


def test_a_gap_of_many_ids_is_shortened(src: Path, out: Path):
    tensors = qwen(30)
    tensors = without(tensors, *(f".experts.{e}." for e in range(5, 25)))
    write(src, tensors, config=config(experts=30))
    refused(ExpertGap, "expert 5", "5, 6, 7", "14 more", "states 30 experts", src=src, out=out)


def test_an_expert_id_at_the_number_of_experts(src: Path, out: Path):
    write(src, without(qwen(5), "mlp.gate.weight"))
    refused(ExpertOutOfRange, STACK, "expert 4", "states only 4", "config.json", src=src, out=out)


def test_an_expert_id_far_beyond_the_number_of_experts(src: Path, out: Path):
    write(src, added(qwen(), f"{STACK}.9000000000.up_proj.weight"))
    with within(5):
        refused(ExpertOutOfRange, STACK, "9000000000", "states only 4", src=src, out=out)


def test_one_projection_of_one_expert_is_missing(src: Path, out: Path):
    write(src, without(qwen(), ".experts.3.up_proj"))
    refused(
        MissingExpert,
        STACK,
        "expert 3's `up_proj.weight`",
        "3 of 4",
        "states 4 experts",
        src=src,
        out=out,
    )


def test_one_projection_of_all_experts_is_missing(src: Path, out: Path):
    write(src, without(qwen(), "down_proj"))
    refused(
        MissingExpert, STACK, "down_proj.weight", "0 of 4", "no expert has it", src=src, out=out
    )


def test_the_last_experts_are_missing(src: Path, out: Path):
    # nothing but config.json tells that there should be more; ids 0, 1, 2 have no gap
    write(src, without(qwen(), ".experts.3."))
    with pytest.raises(MoeconvError) as caught:
        moeconv.fuse(src, out)
    problem = caught.value
    assert problem.code in ("config-mismatch", "missing-expert")
    holds(problem, type(problem), STACK, "num_experts", "says 4", "have 3")
    refused(type(problem), src=src, out=out)


def test_a_fused_stack_without_its_down_tensor(src: Path, out: Path):
    write(src, without(fused(), "down_proj"))
    refused(MissingExpert, STACK, "down_proj", "gate_up_proj", src=src, out=out)


def test_the_same_stack_in_both_layouts(src: Path, out: Path):
    write(src, {**qwen(), **fused()})
    refused(
        MixedLayouts,
        f"{STACK}.gate_up_proj",
        "`per-expert`, `fused`",
        "two layouts",
        "keep only one of the two",
        src=src,
        out=out,
    )


def test_one_stack_half_fused(src: Path, out: Path):
    tensors = added(without(qwen(), "down_proj"), f"{STACK}.down_proj", shape=(4, 24, 8))
    write(src, tensors)
    # who was told to keep one of the two would lose the other's experts
    said = ("`per-expert`, `fused`", "no tensor is in both", "remove neither")
    refused(MixedLayouts, f"{STACK}.down_proj", *said, src=src, out=out)


def test_one_expert_of_another_shape(src: Path, out: Path):
    write(src, changed(qwen(), part="experts.1.up_proj", shape=(6, 24)))
    refused(
        ExpertShape, f"{STACK}.1.up_proj.weight", "[6, 24]", "[8, 24]", "3 of 4", src=src, out=out
    )


def test_one_expert_transposed(src: Path, out: Path):
    write(src, changed(qwen(), part="experts.1.down_proj", shape=(8, 24)))
    refused(
        ExpertShape, f"{STACK}.1.down_proj.weight", "[8, 24]", "[24, 8]", "3 of 4", src=src, out=out
    )


def test_all_experts_transposed(src: Path, out: Path):
    write(src, changed(qwen(), part="down_proj", shape=(8, 24)))
    refused(LayoutContradiction, STACK, "down_proj.weight", "[8, 24]", "needs 24", src=src, out=out)


def test_gates_and_ups_of_different_width(src: Path, out: Path):
    write(src, changed(qwen(), part="up_proj", shape=(6, 24)))
    refused(LayoutContradiction, STACK, "up_proj.weight", "[6, 24]", "needs 8", src=src, out=out)


def test_one_expert_of_another_dtype(src: Path, out: Path):
    write(src, changed(qwen(), part="experts.2.gate_proj", dtype="F32"))
    refused(ExpertDtype, f"{STACK}.2.gate_proj.weight", "F32", "BF16", "3 of 4", src=src, out=out)


def test_gates_and_ups_of_different_dtype(src: Path, out: Path):
    write(src, changed(qwen(), part="up_proj", dtype="F16"))
    refused(
        ExpertDtype, STACK, "gate_proj.weight", "up_proj.weight", "BF16 and F16", src=src, out=out
    )


def test_a_scale_without_its_weight(src: Path, out: Path):
    write(src, without(FP8, "experts.1.up_proj.weight", but="_scale_inv"), config=fp8_config(8))
    refused(ScaleWithoutWeight, f"{STACK}.1.up_proj.weight_scale_inv", "1 tensor", src=src, out=out)


def test_some_experts_with_a_scale_and_others_without(src: Path, out: Path):
    write(src, without(FP8, "experts.1.up_proj.weight_scale_inv"), config=fp8_config(8))
    refused(
        MissingScale, f"{STACK}.1.up_proj.weight", "weight_scale_inv", "3 of 4", src=src, out=out
    )


def test_gates_with_a_scale_and_ups_without(src: Path, out: Path):
    tensors = without(FP8, *(f".{e}.up_proj.weight_scale_inv" for e in range(4)))
    write(src, tensors, config=fp8_config(8))
    refused(MissingScale, STACK, "weight_scale_inv", "gate and up", src=src, out=out)


def test_gate_and_up_with_a_scale_and_down_in_fp8_without(src: Path, out: Path):
    # a down projection in another dtype may well have none, but these are fp8 like the others
    write(src, without(FP8, "down_proj.weight_scale_inv"), config=fp8_config(8))
    refused(MissingScale, STACK, "weight_scale_inv", "down_proj", src=src, out=out)


def test_bare_fp8_throughout_is_fine(src: Path, out: Path):
    write(src, qwen(dtype="F8_E4M3"))
    moeconv.fuse(src, out)
    assert moeconv.verify(out, level="source", source=src).ok


def test_fp8_with_scales_throughout_is_fine(src: Path, out: Path):
    write(src, FP8, config=fp8_config(8))
    moeconv.fuse(src, out)
    assert moeconv.verify(out, level="source", source=src).ok


@pytest.mark.parametrize(
    "rest", ["0.gate_proj.weight_zero", "0.router.weight", "007.up_proj.weight", "9.x", "0."]
)
def test_an_unknown_rest_inside_an_expert(src: Path, out: Path, rest: str):
    write(src, added(qwen(), f"{STACK}.{rest}"))
    refused(
        UnknownExpertTensor,
        f"`{STACK}.{rest}`",
        "qwen3_moe",
        "1 tensor",
        "--recipe",
        src=src,
        out=out,
    )


@pytest.mark.parametrize("suffix", ["_blocks", "_scales_2", ".weight", "_scale_inv_2", "2"])
def test_an_unknown_suffix_of_a_fused_name(src: Path, out: Path, suffix: str):
    name = f"{STACK}.gate_up_proj{suffix}"
    write(src, added(fused(), name))
    refused(UnknownExpertTensor, f"`{name}`", "qwen3_moe", "--recipe", src=src, out=out)


def test_all_bad_stacks_are_reported_at_once(src: Path, out: Path):
    write(src, without(qwen(layers=3), "layers.0.mlp.experts.1.", "layers.2.mlp.experts.3.up"))
    problem = refused(ExpertGap, "layers.0", src=src, out=out)
    assert [p.code for p in problem.also] == ["missing-expert"]
    assert "layers.2.mlp.experts" in str(problem)


_DAMAGED: dict[str, Tensors] = {
    "gap": without(qwen(), ".experts.2."),
    "out-of-range": without(qwen(5), "mlp.gate.weight"),
    "missing": without(qwen(), ".experts.3.up_proj"),
    "both-layouts": {**qwen(), **fused()},
    "shape": changed(qwen(), part="experts.1.up_proj", shape=(6, 24)),
    "dtype": changed(qwen(), part="experts.2.gate_proj", dtype="F32"),
    "pair-dtype": changed(qwen(), part="up_proj", dtype="F16"),
    "contradiction": changed(qwen(), part="up_proj", shape=(6, 24)),
    "unknown": added(qwen(), f"{STACK}.0.x"),
    "scale-alone": without(FP8, "experts.1.up_proj.weight", but="_scale_inv"),
    "scale-lacking": without(FP8, "experts.1.up_proj.weight_scale_inv"),
}


@pytest.mark.parametrize("case", _DAMAGED)
def test_the_message_names_the_file(src: Path, out: Path, case: str):
    # in a checkpoint of 160 shards, a tensor's name alone does not say what to download again
    write(src, _DAMAGED[case], config=fp8_config(8))
    with pytest.raises(MoeconvError) as caught:
        moeconv.fuse(src, out)
    assert SHARD in str(caught.value)


def test_an_enormous_expert_id_without_config_is_refused_at_once(src: Path, out: Path):
    # the ids that are missing may be told, but not all be listed first
    write(src, added(qwen(), f"{STACK}.2000000000.up_proj.weight"), config={})
    with within(1):
        refused(ExpertGap, STACK, "2000000000", src=src, out=out, recipe="qwen3_moe")


def test_an_expert_id_of_five_thousand_digits(src: Path, out: Path):
    # Python itself refuses to turn so many digits into an integer
    write(src, added(qwen(), f"{STACK}.{'9' * 5000}.up_proj.weight"))
    with pytest.raises(MoeconvError):
        moeconv.fuse(src, out)


def test_a_layer_with_a_router_but_no_experts(src: Path, out: Path):
    # all experts of a layer gone, the router still there: no id, no gap, nothing else would say so
    router = {f"model.layers.{n}.mlp.gate.weight": ("BF16", (4, 24)) for n in range(3)}
    whole = {**qwen(layers=3), **router}
    write(src, without(whole, "layers.1.mlp.experts."))
    refused(
        MissingExpert,
        "`model.layers.1.mlp.experts` has no experts at all",
        "`model.layers.1.mlp.gate.weight`",
        "2 other layers",
        src=src,
        out=out,
    )


def test_a_dense_layer_has_no_router_and_is_fine(src: Path, out: Path):
    # E = 4 rows elsewhere, even in every layer, are no router: only the experts' own block counts
    router = {f"model.layers.{n}.mlp.gate.weight": ("BF16", (4, 24)) for n in (1, 2)}
    norms = {f"model.layers.{n}.self_attn.q_norm.weight": ("BF16", (4,)) for n in range(3)}
    dense = {"model.layers.0.mlp.gate_proj.weight": ("BF16", (4, 24))}
    whole = {**qwen(layers=3), **router, **norms, **dense}
    write(src, without(whole, "layers.0.mlp.experts.", "layers.0.mlp.gate.weight"))
    assert len(moeconv.fuse(src, out).plan.stacks) == 2
