"""Mixed stacks, gaps, and configs that lie: what hurt others, one test each."""

import re
from pathlib import Path

import pytest

import moeconv
from moeconv.errors import (
    AmbiguousLayout,
    ConfigMismatch,
    ExpertGap,
    MissingExpert,
    MixedLayouts,
    UnknownExpertTensor,
)
from tests.cli import run
from tests.families.plain import QWEN, planned
from tests.helpers import Spec, read_tensors, tree_sha256, write_checkpoint
from tests.phantoms import Shape, phantom, rows

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 12, "hidden_size": 16}


def test_an_index_of_300_instead_of_3_is_a_gap(tmp_path: Path):
    """transformers sorts and stacks: it would load this reordered, without a word."""
    text = QWEN.replace("{0-11}", "{0-10}").splitlines()
    text += [line.replace("{0-10}", "300") for line in text]
    with pytest.raises(ExpertGap):
        planned(tmp_path, "\n".join(text), {"model_type": "qwen3_moe"})


def test_experts_are_ordered_as_numbers(tmp_path: Path):
    src = write_checkpoint(
        tmp_path / "src",
        {
            f"model.layers.0.mlp.experts.{e}.{p}_proj.weight": ("U8", (1, 1), bytes([e]))
            for e in sorted(range(12), key=str)
            for p in ("gate", "up", "down")
        },
        {"model_type": "qwen3_moe"},
    )
    moeconv.fuse(src, tmp_path / "out")
    down = read_tensors(tmp_path / "out")["model.layers.0.mlp.experts.down_proj"]
    assert down == ("U8", (12, 1, 1), bytes(range(12)))


def test_both_forms_in_one_stack_are_refused(tmp_path: Path):
    text = QWEN + "\nmodel.layers.0.mlp.experts.gate_up_proj BF16 12,16,16"
    with pytest.raises(MixedLayouts):
        planned(tmp_path, text, {"model_type": "qwen3_moe"})


def test_one_stack_fused_and_another_not_is_fine(tmp_path: Path):
    text = QWEN + "\nmtp.layers.0.mlp.experts.gate_up_proj BF16 12,16,16"
    text += "\nmtp.layers.0.mlp.experts.down_proj BF16 12,16,8"
    result = planned(tmp_path, text, {"model_type": "qwen3_moe"})
    assert any("1 stack already `fused`" in note for note in result.plan.notes)


def test_half_an_expert_does_not_consume_the_others(tmp_path: Path):
    tensors = rows(QWEN)
    del tensors["model.layers.0.mlp.experts.7.up_proj.weight"]
    src = phantom(tmp_path / "src", tensors, {"model_type": "qwen3_moe"})
    with pytest.raises(MissingExpert, match="expert 7's"):
        moeconv.fuse(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_transposed_form_is_asked_about_where_shapes_leave_it_open(tmp_path: Path):
    text = "model.layers.0.mlp.experts.gate_up_proj BF16 4,16,16\n"
    text += "model.layers.0.mlp.experts.down_proj BF16 4,16,8"
    with pytest.raises(AmbiguousLayout):
        planned(tmp_path, text, {"model_type": "qwen3_vl_moe"})


def test_ernie_without_a_key_for_where_text_ends(tmp_path: Path):
    with pytest.raises(ConfigMismatch, match="shares its expert ids"):
        planned(tmp_path, QWEN, {"model_type": "ernie4_5_vl_moe"})


OTHERS = """mtp.layers.0.{}.{{0-11}}.{} BF16 8,16
mtp.layers.0.{}.{{0-11}}.{} BF16 8,16
mtp.layers.0.{}.{{0-11}}.{} BF16 16,8"""


def others(block: str, *projections: str) -> str:
    """QWEN and a layer of experts under other names."""
    words = [word for p in projections for word in (block, f"{p}.weight")]
    return f"{QWEN}\n{OTHERS.format(*words)}"


def test_a_stack_under_another_family_s_names_is_taken_and_reported(tmp_path: Path):
    text = others("block_sparse_moe.experts", "w1", "w3", "w2")
    config = {"model_type": "qwen3_moe", "moe_intermediate_size": 8, "intermediate_size": 99}
    src = phantom(tmp_path / "src", rows(text), config)
    result = moeconv.fuse(src, tmp_path / "out")
    assert [s.recipe for s in result.plan.stacks] == ["qwen3_moe", "mixtral"]
    assert any("recipe `mixtral`, not `qwen3_moe`" in n for n in result.plan.notes)
    assert moeconv.verify(tmp_path / "out", level="source", source=src).problems == ()
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


def test_a_gap_in_a_stack_under_another_family_s_names_is_found(tmp_path: Path):
    text = others("block_sparse_moe.experts", "w1", "w3", "w2")
    tensors = {n: t for n, t in rows(text).items() if ".block_sparse_moe.experts.3." not in n}
    src = phantom(tmp_path / "src", tensors, {"model_type": "qwen3_moe"})
    with pytest.raises(ExpertGap):
        moeconv.fuse(src, tmp_path / "out")


@pytest.mark.parametrize("block", ["mlp.moe.experts", "brand_new.experts", "mlp.experts.expert_"])
def test_experts_under_names_that_nobody_knows_are_refused(block: str, tmp_path: Path):
    text = others(block, "gate_proj", "up_proj", "down_proj").replace("expert_.", "expert_")
    with pytest.raises(UnknownExpertTensor):
        planned(tmp_path, text, {"model_type": "qwen3_moe"})


def test_shared_experts_are_not_among_them(tmp_path: Path):
    text = others("mlp.shared_experts", "gate_proj", "up_proj", "down_proj")
    assert len(planned(tmp_path, text, {"model_type": "qwen3_moe"}).plan.stacks) == 1


ONE_BY_ONE = """{0}.{{0-3}}.{1}.weight BF16 8,16
{0}.{{0-3}}.{2}.weight BF16 8,16
{0}.{{0-3}}.{3}.weight BF16 16,8
"""
LAYERS = {
    "mistral_large4": ONE_BY_ONE.format("layers.{0-2}.experts", "w1", "w3", "w2")
    + "layers.{0-2}.gate.weight BF16 4,16",
    "longcat_flash": ONE_BY_ONE.format(
        "model.layers.{0-2}.mlp.experts", "gate_proj", "up_proj", "down_proj"
    )
    + "model.layers.{0-2}.mlp.router.classifier.weight BF16 6,16",
    "gemma4": "model.language_model.layers.{0-2}.experts.gate_up_proj BF16 4,16,16\n"
    "model.language_model.layers.{0-2}.experts.down_proj BF16 4,16,8\n"
    "model.language_model.layers.{0-2}.router.proj.weight BF16 4,16",
    "step3p7": "model.layers.{0-2}.moe.gate_proj.weight BF16 4,8,16\n"
    "model.layers.{0-2}.moe.up_proj.weight BF16 4,8,16\n"
    "model.layers.{0-2}.moe.down_proj.weight BF16 4,16,8\n"
    "model.layers.{0-2}.moe.router_bias F32 4",
}


@pytest.mark.parametrize("family", LAYERS)
def test_a_layer_that_lost_its_experts_is_recognised_by_its_router(family: str, tmp_path: Path):
    config: dict[str, object] = {"model_type": family}
    text = LAYERS[family] + "\nmodel.layers.{0-3}.self_attn.gate.weight BF16 4,16"
    whole = rows(text)
    one = re.compile(r"layers\.1\.(.*experts|moe\.[a-z_]*_proj)")
    lost = {n: t for n, t in whole.items() if not one.search(n)}
    assert len(planned(tmp_path / "whole", text, config).plan.stacks) == 3
    dense = {n: t for n, t in lost.items() if "layers.1." not in n or "attn" in n}
    moeconv.fuse(phantom(tmp_path / "dense", dense, config), tmp_path / "out", dry_run=True)
    with pytest.raises(MissingExpert, match="no experts at all"):
        moeconv.fuse(phantom(tmp_path / "lost", lost, config), tmp_path / "out")


@pytest.mark.parametrize("both", [False, True])
def test_ernie_with_the_vision_experts_of_a_layer_lost(both: bool, tmp_path: Path):
    tensors: dict[str, Shape] = {}
    for layer in range(3):
        for e in range(3 if layer == 1 else 6):
            width = 8 if e < 3 else 4
            for p, shape in (("gate", (width, 16)), ("up", (width, 16)), ("down", (16, width))):
                tensors[f"model.layers.{layer}.mlp.experts.{e}.{p}_proj.weight"] = ("BF16", shape)
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = ("BF16", (16, 3))
        if layer != 1 or both:
            tensors[f"model.layers.{layer}.mlp.gate.weight_1"] = ("BF16", (16, 3))
    config = {
        "model_type": "ernie4_5_vl_moe",
        "moe_num_experts": [3, 3],
        "moe_intermediate_size": [8, 4],
    }
    src = phantom(tmp_path / "src", tensors, config)
    if both:
        with pytest.raises(MissingExpert):
            moeconv.fuse(src, tmp_path / "out")
    else:  # a layer of text only
        assert len(moeconv.fuse(src, tmp_path / "out", dry_run=True).plan.stacks) == 5


# without the router, which would decide
EXPERTS_ALONE = "\n".join(row for row in QWEN.splitlines() if "mlp.gate" not in row)


@pytest.mark.parametrize("other", ["num_experts", "num_local_experts", "moe_num_experts"])
def test_every_number_of_experts_in_config_json_counts(other: str, tmp_path: Path):
    config: dict[str, object] = {"model_type": "glm4_moe", "n_routed_experts": 12}
    planned(tmp_path / "agreeing", QWEN, config | {other: 12})
    with pytest.raises(ConfigMismatch, match=other):
        planned(tmp_path / "lying", EXPERTS_ALONE, config | {other: 13})


def test_nemotron_has_another_number_of_experts_in_its_mtp(tmp_path: Path):
    text = """backbone.layers.1.mixer.experts.{0-3}.up_proj.weight BF16 8,16
backbone.layers.1.mixer.experts.{0-3}.down_proj.weight BF16 16,8
mtp.layers.0.mixer.experts.{0-1}.up_proj.weight BF16 8,16
mtp.layers.0.mixer.experts.{0-1}.down_proj.weight BF16 16,8"""
    config: dict[str, object] = {"model_type": "nemotron_h", "n_routed_experts": 4}
    result = planned(tmp_path / "right", text, config | {"mtp_n_routed_experts": 2})
    assert [s.experts for s in result.plan.stacks] == [4, 2]
    with pytest.raises(ConfigMismatch, match="mtp_n_routed_experts"):
        planned(tmp_path / "lying", text, config | {"mtp_n_routed_experts": 3})


def test_fused_text_of_dots3_is_not_taken_for_vision(tmp_path: Path):
    """The fused names of both are alike; per expert they are not."""
    text = "".join(
        f"model.{name}.1.mlp.experts.gate_up_proj BF16 4,16,16\n"
        f"model.{name}.1.mlp.experts.down_proj BF16 4,16,8\n"
        for name in ("language_model.layers", "vision_tower.blocks")
    )
    src = phantom(tmp_path / "src", rows(text), {"model_type": "dots3_note"})
    moeconv.unfuse(src, tmp_path / "out")
    kinds = {"language_model": "gate_proj", "vision_tower": "fc1"}
    made = read_tensors(tmp_path / "out")
    for name, first in kinds.items():
        projections = {n.split(".")[-2] for n in made if name in n}
        assert first in projections
        assert len(projections) == 3


def test_the_number_of_experts_may_be_under_llm_config(tmp_path: Path):
    config = {"model_type": "qwen3_moe", "llm_config": {"num_experts": 13}}
    with pytest.raises(ConfigMismatch, match="llm_config"):
        planned(tmp_path, EXPERTS_ALONE, config)


def ernie(tmp_path: Path) -> Path:
    """Five text experts of width 3 and four vision experts of width 2."""
    count = iter(range(256))
    shapes: dict[str, Shape] = {}
    for e in range(9):
        width = 3 if e < 5 else 2
        for p, shape in (("gate", (width, 2)), ("up", (width, 2)), ("down", (2, width))):
            shapes[f"model.layers.1.mlp.experts.{e}.{p}_proj.weight"] = ("U8", shape)
    tensors = {
        name: (dtype, shape, bytes([next(count)]) * (shape[0] * shape[1]))
        for name, (dtype, shape) in shapes.items()
    }
    config = {
        "model_type": "ernie4_5_vl_moe",
        "text_config": {"moe_num_experts": [5, 4], "moe_intermediate_size": [3, 2]},
    }
    return write_checkpoint(tmp_path / "src", tensors, config)


def test_ernie_shares_one_row_of_ids(tmp_path: Path):
    src = ernie(tmp_path)
    moeconv.fuse(src, tmp_path / "out")
    source, made = read_tensors(src), read_tensors(tmp_path / "out")
    assert made.keys() == {
        f"model.layers.1.mlp.{kind}_moe.experts.{p}_proj"
        for kind in ("text", "vision")
        for p in ("gate_up", "down")
    }
    down = made["model.layers.1.mlp.vision_moe.experts.down_proj"]
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    assert down == ("U8", (4, 2, 2), b"".join(source[name.format(e)][2] for e in range(5, 9)))
    assert moeconv.verify(tmp_path / "out", level="source", source=src).ok
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)
    moeconv.unfuse(tmp_path / "out", tmp_path / "alone", layout="per-expert")
    assert read_tensors(tmp_path / "alone") == source


def test_ernie_by_ranks(tmp_path: Path):
    src = ernie(tmp_path)
    for layout in ("fused", "per-expert"):
        out = tmp_path / layout
        moeconv.shard(src, out, ep_size=1, layout=layout)
        assert moeconv.verify(out, level="source", source=src).problems == ()
        assert moeconv.verify(out, level="structure").problems == ()
        moeconv.merge(out, tmp_path / f"{layout}-back")
        assert tree_sha256(tmp_path / f"{layout}-back") == tree_sha256(src)


def test_inspect_names_what_belongs_to_the_experts_without_being_one(tmp_path: Path):
    text = QWEN + "\nmodel.layers.0.mlp.gate.e_score_correction_bias F32 12"
    text += "\nmodel.layers.0.mlp.shared_experts.gate_proj.weight BF16 8,16"
    text += "\nmodel.layers.0.self_attn.q_proj.weight BF16 8,16"
    src = phantom(tmp_path / "src", rows(text), MIXTRAL)
    done = run.moeconv("inspect", src)
    assert "the names win" in done.err
    lines = done.out.splitlines()
    named = next(line for line in lines if line.startswith("routers and shared experts"))
    assert named.endswith(
        "mlp.gate.e_score_correction_bias, mlp.gate.weight, mlp.shared_experts.gate_proj.weight"
    )


def test_recipes_list_has_families_layouts_and_formats():
    out = run.moeconv("recipes", "list").out
    rows_of = {line.split()[0]: line for line in out.splitlines() if line}
    assert "megablocks" in rows_of["deepseek_v4"]
    assert "NVFP4 of modelopt" in rows_of["weight_scale_2"]
    assert "per-expert" in rows_of["nllb_moe"]


def test_hunyuan_has_up_before_gate(tmp_path: Path):
    """`gate_and_up_proj` is cut in two and the second half is gate, whatever its name says."""
    stack = "model.layers.0.mlp.experts"
    tensors: dict[str, Spec] = {
        f"{stack}.0.gate_and_up_proj.weight": ("BF16", (2, 2), b"UP..GATE"),
        f"{stack}.0.down_proj.weight": ("BF16", (2, 1), b"DOWN"),
    }
    src = write_checkpoint(tmp_path / "src", tensors, {"model_type": "hunyuan"})
    moeconv.fuse(src, tmp_path / "out")
    made = read_tensors(tmp_path / "out")
    assert made[f"{stack}.gate_up_proj"] == ("BF16", (1, 2, 2), b"GATEUP..")
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


def test_dbrx_has_gate_in_w1_up_in_v1_and_down_transposed(tmp_path: Path):
    stack = "transformer.blocks.0.ffn.experts"
    tensors: dict[str, Spec] = {
        f"{stack}.mlp.w1": ("U8", (4, 3), b"g00g01g10g11"),
        f"{stack}.mlp.v1": ("U8", (4, 3), b"u00u01u10u11"),
        f"{stack}.mlp.w2": ("U8", (4, 3), b"abcdefABCDEF"),
    }
    config = {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 2}}
    src = write_checkpoint(tmp_path / "src", tensors, config)
    moeconv.fuse(src, tmp_path / "out", layout="sglang")
    assert read_tensors(tmp_path / "out") == {
        f"{stack}.w13_weight": ("U8", (2, 4, 3), b"g00g01u00u01g10g11u10u11"),
        f"{stack}.w2_weight": ("U8", (2, 3, 2), b"adbecfADBECF"),
    }
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


def test_jetmoe_has_gate_first(tmp_path: Path):
    jetmoe: dict[str, Spec] = {
        "model.layers.0.mlp.input_linear.weight": ("BF16", (1, 2, 2), b"GATEUP.."),
        "model.layers.0.mlp.output_linear.weight": ("BF16", (1, 2, 1), b"DOWN"),
    }
    src = write_checkpoint(tmp_path / "jetmoe", jetmoe, {"model_type": "jetmoe"})
    moeconv.unfuse(src, tmp_path / "out", layout="per-expert")
    name = "model.layers.0.mlp.experts.0.{}_proj.weight"
    assert {n: data for n, (_, _, data) in read_tensors(tmp_path / "out").items()} == {
        name.format("gate"): b"GATE",
        name.format("up"): b"UP..",
        name.format("down"): b"DOWN",
    }
