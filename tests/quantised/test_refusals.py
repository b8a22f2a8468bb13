"""What cannot be joined to the bit is refused, with the numbers; what is odd is said."""

from collections.abc import Mapping
from pathlib import Path

import pytest

import moeconv
from moeconv.errors import (
    ConfigMismatch,
    ExpertDtype,
    ExpertGap,
    ExpertOutOfRange,
    LayoutContradiction,
    MissingExpert,
    MissingScale,
    MoeconvError,
    StraddlingBlock,
)
from tests.helpers import Spec, read_tensors, tree_sha256, write_checkpoint
from tests.phantoms import Shape, phantom, rows

STACK = "model.layers.0.mlp.experts"
FP8 = {"model_type": "qwen3_moe", "quantization_config": {"weight_block_size": [128, 128]}}
PLAIN = {"model_type": "qwen3_moe"}
GROUPS = {"model_type": "qwen3_moe", "quantization_config": {"group_size": 32}}


def per_expert(parts: Mapping[str, str], *, width: int, hidden: int = 256) -> dict[str, Shape]:
    """Two experts; parts: `DTYPE sizes`, in N and K, by name."""
    out: dict[str, Shape] = {}
    for p, n, k in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
        for part, text in parts.items():
            dtype, *sizes = text.split()
            shape = tuple(int(eval(size, {"N": n, "K": k})) for size in sizes)  # noqa: S307
            for e in range(2):
                out[f"{STACK}.{e}.{p}_proj.{part}"] = (dtype, shape)
    return out


BLOCKS = {"weight": "F8_E4M3 N K", "weight_scale_inv": "F32 -(-N//128) -(-K//128)"}
GPTQ = {"qweight": "I32 K//8 N", "qzeros": "I32 K//32 -(-N//8)", "scales": "F16 K//32 N"}
AWQ = {"qweight": "I32 K -(-N//8)", "qzeros": "I32 K//32 -(-N//8)", "scales": "F16 K//32 N"}
GPTQ8 = {"qweight": "I32 -(-K//4) N", "qzeros": "I32 K//32 -(-N//4)", "scales": "F16 K//32 N"}
ASYMMETRIC = {
    "weight_packed": "I32 N K//8",
    "weight_scale": "BF16 N K//32",
    "weight_zero_point": "I32 -(-N//8) K//32",
    "weight_shape": "I64 2",
}

ASYMMETRIC8 = {
    "weight_packed": "I32 N -(-K//4)",
    "weight_scale": "BF16 N K//32",
    "weight_zero_point": "I32 -(-N//4) K//32",
}


def refused(
    kind: type[MoeconvError],
    tmp_path: Path,
    tensors: Mapping[str, Shape],
    config: Mapping[str, object],
    *facts: str,
) -> None:
    src = phantom(tmp_path / "src", tensors, config)
    with pytest.raises(kind) as caught:
        moeconv.fuse(src, tmp_path / "out")
    for fact in facts:
        assert fact in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("width", [192, 64, 200])
def test_blocks_that_straddle_gate_and_up(width: int, tmp_path: Path):
    facts = ("blocks of 128", f"{width} rows", "keep this stack per-expert")
    refused(StraddlingBlock, tmp_path, per_expert(BLOCKS, width=width), FP8, *facts)


@pytest.mark.parametrize("width", [128, 384])
def test_blocks_that_do_not(width: int, tmp_path: Path):
    src = phantom(tmp_path / "src", per_expert(BLOCKS, width=width), FP8)
    moeconv.fuse(src, tmp_path / "out", dry_run=True)


def test_straddling_blocks_may_stay_apart(tmp_path: Path):
    src = phantom(tmp_path / "src", per_expert(BLOCKS, width=192), FP8)
    moeconv.fuse(src, tmp_path / "out", layout="stacked")
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


@pytest.mark.parametrize(
    ("parts", "width", "packed"),
    [
        (AWQ, 36, 8),
        (AWQ, 100, 8),
        (GPTQ, 36, 8),
        (GPTQ8, 34, 4),
        (GPTQ8, 102, 4),
        (ASYMMETRIC, 36, 8),
        (ASYMMETRIC8, 34, 4),
    ],
)
def test_packed_rows_that_straddle(parts: dict[str, str], width: int, packed: int, tmp_path: Path):
    parts = {
        k: v.replace("K//8", "-(-K//8)").replace("K//32", "-(-K//32)") for k, v in parts.items()
    }
    tensors = per_expert(parts, width=width)
    facts = (f"blocks of {packed}", f"{width} rows")
    refused(StraddlingBlock, tmp_path, tensors, GROUPS, *facts)


def test_int4_without_zero_points_needs_no_multiple_of_eight(tmp_path: Path):
    parts = {"weight_packed": "I32 N -(-K//8)", "weight_scale": "BF16 N -(-K//32)"}
    src = phantom(tmp_path / "src", per_expert(parts, width=36), GROUPS)
    plan = moeconv.fuse(src, tmp_path / "out", dry_run=True).plan
    made = {t.name: t.shape for f in plan.files for t in f.tensors}
    assert made[f"{STACK}.gate_up_proj_packed"] == (2, 72, 32)


@pytest.mark.parametrize(
    ("rows_of_scales", "kind"), [(3, LayoutContradiction), (4, StraddlingBlock)]
)
def test_unfusing_a_scale_that_straddles(
    rows_of_scales: int, kind: type[MoeconvError], tmp_path: Path
):
    """Joined first and quantised then: 384 rows have 3 blocks, two halves of 192 would have 4."""
    tensors = rows(f"""{STACK}.gate_up_proj F8_E4M3 2,384,256
        {STACK}.gate_up_proj_scale_inv F32 2,{rows_of_scales},2
        {STACK}.down_proj F8_E4M3 2,256,192
        {STACK}.down_proj_scale_inv F32 2,2,2""")
    src = phantom(tmp_path / "src", tensors, FP8)
    with pytest.raises(kind) as caught:
        moeconv.unfuse(src, tmp_path / "out")
    facts = ("needs 4 instead of 3",)
    if rows_of_scales == 4:
        facts = ("blocks of 128", "192 rows", "the checkpoint that this one was joined from")
    assert all(fact in str(caught.value) for fact in facts)
    assert not (tmp_path / "out").exists()


def test_a_block_size_is_never_inferred(tmp_path: Path):
    tensors = per_expert(BLOCKS, width=256)
    refused(ConfigMismatch, tmp_path, tensors, {"model_type": "qwen3_moe"}, "block size")


def test_no_block_size_is_asked_for_where_there_are_no_blocks(tmp_path: Path):
    """Of fp8 by tensor, another tensor is wrong: that is said."""
    tensors = per_expert({"weight": "F8_E4M3 N K", "weight_scale_inv": "F32"}, width=256)
    for e in range(2):
        tensors[f"{STACK}.{e}.down_proj.weight"] = ("F8_E4M3", (256, 128))
    plain = {"model_type": "qwen3_moe", "quantization_config": {"quant_method": "fp8"}}
    src = phantom(tmp_path / "src", tensors, plain)
    with pytest.raises(MoeconvError) as caught:
        moeconv.fuse(src, tmp_path / "out", dry_run=True)
    assert "block size" not in str(caught.value)
    assert "0.down_proj.weight" in str(caught.value)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F32"])
def test_half_a_matrix_is_not_taken_for_a_packed_one(dtype: str, tmp_path: Path):
    tensors = per_expert({"weight": f"{dtype} N K"}, width=64)
    for e in range(2):
        tensors[f"{STACK}.{e}.down_proj.weight"] = (dtype, (256, 32))
    config = {"model_type": "qwen3_moe"}
    refused(LayoutContradiction, tmp_path, tensors, config, "[256, 32]", "64")


def test_one_projection_by_tensor_and_another_by_channel(tmp_path: Path):
    tensors = per_expert({"weight": "F8_E4M3 N K", "weight_scale": "F32 N 1"}, width=256)
    for e in range(2):
        tensors[f"{STACK}.{e}.up_proj.weight_scale"] = ("F32", ())
    src = phantom(tmp_path / "src", tensors, {"model_type": "qwen3_moe"})
    with pytest.raises((LayoutContradiction, ConfigMismatch)):
        moeconv.fuse(src, tmp_path / "out")


@pytest.mark.parametrize(
    ("parts", "component", "dtype"),
    [
        (BLOCKS, "weight_scale_inv", "BF16"),
        (GPTQ, "scales", "BF16"),
        (ASYMMETRIC, "weight_scale", "F16"),
        (ASYMMETRIC, "weight_shape", "I32"),
        ({"weight": "BF16 N K", "bias": "BF16 N"}, "bias", "F32"),
    ],
)
def test_gate_and_up_of_other_dtypes_are_not_joined(
    parts: dict[str, str], component: str, dtype: str, tmp_path: Path
):
    """Of as many bytes or not: the bits of one would be read as the other."""
    tensors = per_expert(parts, width=256)
    for e in range(2):
        name = f"{STACK}.{e}.up_proj.{component}"
        was, shape = tensors[name]
        tensors[name] = (dtype, shape)
    config = FP8 if parts is BLOCKS else GROUPS
    refused(ExpertDtype, tmp_path, tensors, config, was, dtype, component)
    for verb, layout in ((moeconv.shard, "up-gate"), (moeconv.fuse, "sglang")):
        extra = {"ep_size": 2} if verb is moeconv.shard else {}
        with pytest.raises(ExpertDtype):
            verb(tmp_path / "src", tmp_path / "out", layout=layout, **extra)
    moeconv.unfuse(tmp_path / "src", tmp_path / "alone")
    moeconv.unfuse(tmp_path / "alone", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(tmp_path / "src")


def test_experts_in_two_formats(tmp_path: Path):
    tensors = per_expert({"weight_packed": "I32 N K//8"}, width=64)
    for e in range(2):
        del tensors[f"{STACK}.{e}.gate_proj.weight_packed"]
        tensors[f"{STACK}.{e}.gate_proj.weight"] = ("BF16", (64, 256))
    refused(ExpertDtype, tmp_path, tensors, GROUPS, "two formats", "weight_packed")


def test_down_may_be_of_another_format(tmp_path: Path):
    """Mixed precision in one layer is normal: decided for each tensor, never for a checkpoint."""
    tensors = per_expert({"weight": "U8 N K//2", "weight_scale": "F8_E4M3 N K//16"}, width=64)
    for e in range(2):
        del tensors[f"{STACK}.{e}.down_proj.weight_scale"]
        tensors[f"{STACK}.{e}.down_proj.weight"] = ("BF16", (256, 64))
    src = phantom(tmp_path / "src", tensors, {"model_type": "qwen3_moe"})
    plan = moeconv.fuse(src, tmp_path / "out", dry_run=True).plan
    made = {t.name: t.shape for f in plan.files for t in f.tensors}
    assert made[f"{STACK}.gate_up_proj"] == (2, 128, 128)
    assert made[f"{STACK}.down_proj"] == (2, 256, 64)


NF4 = {
    "weight": "U8 N*K//2 1",
    "weight.absmax": "F32 N*K//64",
    "weight.quant_map": "F32 16",
    "weight.quant_state.bitsandbytes__nf4": "U8 90",
}


def test_bitsandbytes_is_passed_through_and_reported(tmp_path: Path):
    tensors = per_expert(NF4, width=64)
    blob = f"{STACK}.1.up_proj.weight.quant_state.bitsandbytes__nf4"
    tensors[blob] = ("U8", (88,))  # a JSON text, as long as its numbers
    src = phantom(tmp_path / "src", tensors, {"model_type": "qwen3_moe"})
    plan = moeconv.fuse(src, tmp_path / "out").plan
    assert any("copied through unchanged" in note for note in plan.notes)
    assert {t.name for f in plan.files for t in f.tensors} == tensors.keys()
    assert read_tensors(tmp_path / "out") == read_tensors(src)
    assert moeconv.verify(tmp_path / "out", level="source", source=src).problems == ()
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


def test_one_stray_companion_makes_no_stack_one_that_is_passed(tmp_path: Path):
    tensors = per_expert({"weight": "BF16 N K"}, width=64)
    tensors[f"{STACK}.1.up_proj.SCB"] = ("F32", (64,))
    refused(MissingScale, tmp_path, tensors, {"model_type": "qwen3_moe"}, "`SCB`")


@pytest.mark.parametrize(
    ("lost", "kind"),
    [
        ("1.up_proj.", MissingExpert),
        ("0.", ExpertGap),
        ("1.up_proj.weight.absmax", MissingScale),
        ("1.", ConfigMismatch),
    ],
)
def test_experts_that_are_passed_are_counted(lost: str, kind: type[MoeconvError], tmp_path: Path):
    whole = per_expert(NF4, width=64)
    tensors = {n: t for n, t in whole.items() if not n.startswith(f"{STACK}.{lost}")}
    refused(kind, tmp_path, tensors, {"model_type": "qwen3_moe", "num_experts": 2})


def test_passed_experts_beyond_those_of_config_json(tmp_path: Path):
    config = {"model_type": "qwen3_moe", "num_experts": 1}
    refused(ExpertOutOfRange, tmp_path, per_expert(NF4, width=64), config)


def test_passed_experts_are_not_split_among_ranks_which_is_reported(tmp_path: Path):
    tensors = per_expert(NF4, width=64)
    plain = per_expert({"weight": "BF16 N K"}, width=64)
    tensors |= {name.replace(".0.mlp", ".1.mlp"): t for name, t in plain.items()}
    src = phantom(tmp_path / "src", tensors, {"model_type": "qwen3_moe"})
    notes = moeconv.shard(src, tmp_path / "out", ep_size=2).plan.notes
    assert any("(56.22 KB), not split among ranks" in note for note in notes), notes


def test_one_scale_for_all_experts_is_expanded_and_restored(tmp_path: Path):
    """Step 3 by tensor: `[1]` stands for every expert."""
    down = bytes(range(2 * 4 * 3))
    tensors: dict[str, Spec] = {
        "model.layers.1.moe.gate_proj.weight": ("F8_E4M3", (2, 3, 4), bytes(range(24))),
        "model.layers.1.moe.up_proj.weight": ("F8_E4M3", (2, 3, 4), bytes(range(24, 48))),
        "model.layers.1.moe.down_proj.weight": ("F8_E4M3", (2, 4, 3), down),
        "model.layers.1.moe.gate_proj.weight_scale": ("F32", (1,), b"gate"),
        "model.layers.1.moe.up_proj.weight_scale": ("F32", (1,), b"up.."),
        "model.layers.1.moe.down_proj.weight_scale": ("F32", (1,), b"down"),
    }
    src = write_checkpoint(tmp_path / "src", tensors, {"model_type": "step3p5"})
    result = moeconv.fuse(src, tmp_path / "out")
    made = read_tensors(tmp_path / "out")
    stack = "model.layers.1.mlp.experts"
    assert made[f"{stack}.gate_up_proj_scale"] == ("F32", (2, 2), b"gateup..gateup..")
    assert made[f"{stack}.down_proj_scale"] == ("F32", (2,), b"downdown")
    assert {f.verb for f in result.plan.ledger if "scale" in f.source} <= {"rearranged", "shared"}
    assert moeconv.verify(tmp_path / "out", level="source", source=src).problems == ()
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


def test_inkling_fp4_in_alternating_rows(tmp_path: Path):
    tensors: dict[str, Spec] = {}
    stack = "model.llm.layers.0.mlp.experts"
    rows_of = [bytes([10 * e + r] * 8) for e in range(2) for r in range(4)]
    tensors[f"{stack}.w13_weight"] = ("U8", (2, 4, 8), b"".join(rows_of))
    tensors[f"{stack}.w13_weight.scale"] = ("F8_E4M3", (2, 4, 1), bytes(range(8)))
    tensors[f"{stack}.w13_weight.scale2"] = ("F32", (2,), b"e..0e..1")
    tensors[f"{stack}.w2_weight"] = ("U8", (2, 16, 1), bytes(range(32)))
    tensors[f"{stack}.w2_weight.scale"] = ("F8_E4M3", (2, 16, 1), bytes(range(32)))
    tensors[f"{stack}.w2_weight.scale2"] = ("F32", (2,), b"d..0d..1")
    config = {
        "model_type": "inkling2",
        "text_config": {"n_routed_experts": 2, "moe_intermediate_size": 2, "hidden_size": 16},
    }
    src = write_checkpoint(tmp_path / "src", tensors, config)
    moeconv.fuse(src, tmp_path / "out")
    made = read_tensors(tmp_path / "out")
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    assert made[f"{stack}.gate_up_proj"][2] == b"".join(rows_of[n] for n in order)
    assert made[f"{stack}.gate_up_proj_block_scale"][2] == bytes(order)
    assert made[f"{stack}.gate_up_proj_scale2"] == ("F32", (2, 2), b"e..0e..0e..1e..1")
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


def test_mxfp4_of_gpt_oss_one_expert_at_a_time(tmp_path: Path):
    stack = "model.layers.0.mlp.experts"
    blocks, scales = bytes(range(2 * 4 * 16)), bytes(range(8))
    tensors: dict[str, Spec] = {
        f"{stack}.gate_up_proj_blocks": ("U8", (2, 4, 1, 16), blocks),
        f"{stack}.gate_up_proj_scales": ("U8", (2, 4, 1), scales),
        f"{stack}.gate_up_proj_bias": ("BF16", (2, 4), bytes(range(16))),
        f"{stack}.down_proj_blocks": ("U8", (2, 32, 1, 16), bytes(1024)),
        f"{stack}.down_proj_scales": ("U8", (2, 32, 1), bytes(64)),
        f"{stack}.down_proj_bias": ("BF16", (2, 32), bytes(128)),
    }
    config = {"model_type": "gpt_oss", "intermediate_size": 2, "hidden_size": 32}
    src = write_checkpoint(tmp_path / "src", tensors, config)
    moeconv.unfuse(src, tmp_path / "out", layout="per-expert")
    made = read_tensors(tmp_path / "out")
    assert made[f"{stack}.1.up_proj.blocks"] == (
        "U8",
        (2, 1, 16),
        blocks[5 * 16 : 6 * 16] + blocks[7 * 16 : 8 * 16],
    )
    assert made[f"{stack}.1.gate_proj.scales"] == ("U8", (2, 1), bytes([4, 6]))
    moeconv.fuse(tmp_path / "out", tmp_path / "again")
    assert read_tensors(tmp_path / "again") == tensors


def test_a_stated_size_that_does_not_fit_is_named(tmp_path: Path):
    """config.json says groups of 64, the scales are of 128."""
    parts = {
        "weight_packed": "I32 N K//8",
        "weight_scale": "BF16 N K//128",
        "weight_shape": "I64 2",
    }
    config = {"model_type": "qwen3_moe", "quantization_config": {"group_size": 64}}
    facts = ("weight_scale", "`group` 64", "does not fit")
    refused(ConfigMismatch, tmp_path, per_expert(parts, width=256), config, *facts)
