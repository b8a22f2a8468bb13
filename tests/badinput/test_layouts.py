"""Layouts that cannot be told, do not exist, or do not belong to the config; unknown families."""

from pathlib import Path

import pytest

import moeconv
from moeconv.errors import (
    AmbiguousLayout,
    BadConfig,
    BadJson,
    ConfigMismatch,
    DuplicateKey,
    LayoutContradiction,
    MoeconvError,
    NoExperts,
    NoPerExpertForm,
    StraddlingBlock,
    UnknownFamily,
    UnknownLayout,
)
from tests.badinput.builders import (
    STACK,
    added,
    config,
    fp8_config,
    fused,
    qwen,
    without,
    write,
)
from tests.badinput.checks import holds, refused

VL = "qwen3_vl_moe"
MIXED_GATE_UP = fused((4, 16, 16), (4, 16, 8))  # 2·I = H: gate_up is square, so it may be turned
MIXED_DOWN = fused((4, 32, 16), (4, 16, 16))  # I = H: down is square
HALF = config(VL, hidden=16)
EQUAL = config(VL, width=16, hidden=16)


# --- ambiguous ---------------------------------------------------------------------------------
def test_a_mixed_file_where_two_widths_are_hidden(src: Path, out: Path):
    write(src, MIXED_GATE_UP, config=HALF)
    refused(
        AmbiguousLayout,
        *(STACK, "`fused`, `mixed-gate-up`", "[4, 16, 16]", "[4, 16, 8]", "--from-layout"),
        src=src,
        out=out,
    )


def test_a_mixed_file_where_width_is_hidden(src: Path, out: Path):
    write(src, MIXED_DOWN, config=EQUAL)
    refused(
        AmbiguousLayout,
        *(STACK, "`fused`, `mixed-down`", "[4, 32, 16]", "[4, 16, 16]", "--from-layout"),
        src=src,
        out=out,
    )


@pytest.mark.parametrize("layout", ["fused", "mixed-gate-up"])
def test_from_layout_decides_an_ambiguous_stack(src: Path, out: Path, layout: str):
    write(src, MIXED_GATE_UP, config=HALF)
    done = moeconv.fuse(src, out, from_layout=layout)
    assert done.source.detection.stacks[0].layout.name == layout


def test_the_hub_layout_is_not_ambiguous_where_two_widths_are_hidden(src: Path, out: Path):
    # down [E, I, H] can be nothing but turned, and no program turns down alone
    write(src, fused((4, 16, 16), (4, 8, 16)), config=HALF)
    assert moeconv.fuse(src, out).source.detection.stacks[0].layout.name == "hub"


def test_from_layout_that_no_recipe_has(src: Path, out: Path):
    write(src, MIXED_GATE_UP, config=HALF)
    refused(
        UnknownLayout, "`nonsense`", "`hub`", "`fused`", src=src, out=out, from_layout="nonsense"
    )


def test_from_layout_that_the_shapes_contradict(src: Path, out: Path):
    write(src, fused(), config=config(VL))
    refused(LayoutContradiction, STACK, "hub", "[4, 24, 8]", src=src, out=out, from_layout="hub")


def test_from_layout_that_the_names_contradict(src: Path, out: Path):
    # what the user says is wrong; to go on without a word would be to guess
    write(src, fused(), config=config(VL))
    with pytest.raises(MoeconvError):
        moeconv.fuse(src, out, from_layout="per-expert")


# --- layouts that do not exist -----------------------------------------------------------------
def test_a_layout_that_the_family_does_not_have(src: Path, out: Path):
    write(src, qwen())
    refused(
        UnknownLayout,
        "`deepgemm`",
        "qwen3_moe",
        "`fused`",
        STACK,
        src=src,
        out=out,
        layout="deepgemm",
    )


def test_a_layout_that_is_only_ever_read(src: Path, out: Path):
    write(src, MIXED_DOWN, config=EQUAL)
    refused(
        UnknownLayout,
        *("`mixed-down`", "`hub`", STACK),
        src=src,
        out=out,
        from_layout="fused",
        layout="mixed-down",
    )


def test_a_family_that_is_published_fused_only(src: Path, out: Path):
    tensors = {
        f"{STACK}.gate_up_proj": ("BF16", (4, 16, 16)),
        f"{STACK}.down_proj": ("BF16", (4, 8, 16)),
    }
    said = {"model_type": "gpt_oss", "num_local_experts": 4, "intermediate_size": 8}
    write(src, tensors, config=said)
    refused(
        NoPerExpertForm,
        STACK,
        "gpt_oss",
        "--layout per-expert",
        src=src,
        out=out,
        verb=moeconv.unfuse,
    )


def test_a_block_that_straddles_two_projections(src: Path, out: Path):
    # 200 rows are two blocks of 128, the second half empty: the halves of the scales look even
    write(
        src,
        qwen(2, 200, 128, dtype="F8_E4M3", block=128),
        config=fp8_config(128, experts=2, width=200, hidden=128),
    )
    refused(StraddlingBlock, STACK, "gate_up_proj_scale_inv", "200", "128", src=src, out=out)


def test_a_foreign_fused_file_whose_blocks_straddle(src: Path, out: Path):
    tensors = added(
        fused((2, 400, 128), (2, 128, 200)), f"{STACK}.gate_up_proj_scale_inv", "F32", (2, 4, 1)
    )
    tensors = added(tensors, f"{STACK}.down_proj_scale_inv", "F32", (2, 1, 2))
    said = fp8_config(128, experts=2, width=200, hidden=128)
    write(src, tensors, config=said)
    refused(
        StraddlingBlock,
        *(STACK, "gate_up_proj_scale_inv", "200", "128"),
        src=src,
        out=out,
        verb=moeconv.unfuse,
    )


# --- config.json -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("said", "facts"),
    [
        (config(experts=8), ("num_experts", "says 8", "have 4", "experts")),
        (config(width=12), ("moe_intermediate_size", "says 12", "have 8", "width")),
        (config(hidden=16), ("hidden_size", "says 16", "have 24", "hidden")),
        (config(experts=0), ("num_experts", "says 0", "have 4")),
        (config(width=-8), ("moe_intermediate_size", "says -8", "have 8")),
    ],
    ids=["experts", "width", "hidden", "no-experts", "negative"],
)
def test_config_and_tensors_disagree(
    src: Path, out: Path, said: dict[str, object], facts: tuple[str, ...]
):
    write(src, without(qwen(), "mlp.gate.weight"), config=said)
    refused(ConfigMismatch, STACK, "config.json", *facts, src=src, out=out)


@pytest.mark.parametrize("value", ["8", 8.5, True])
def test_a_number_of_experts_that_is_not_an_integer(src: Path, out: Path, value: object):
    # said, but not comparable, is not the same as not said: the missing experts would go unseen
    tensors = without(qwen(), "mlp.gate.weight")
    write(src, tensors, config={**config(), "num_experts": value})
    with pytest.raises(MoeconvError) as caught:
        moeconv.fuse(src, out)
    holds(caught.value, type(caught.value), "config.json", "num_experts")


def test_all_disagreements_are_reported_at_once(src: Path, out: Path):
    write(src, qwen(), config=config(width=12, hidden=16))
    problem = refused(ConfigMismatch, "width", src=src, out=out)
    assert [p.code for p in problem.also] == ["config-mismatch"]


def test_scales_without_a_block_size_in_config(src: Path, out: Path):
    write(src, qwen(dtype="F8_E4M3", block=8))
    refused(
        ConfigMismatch,
        *(STACK, "weight_scale_inv", "quantization_config.weight_block_size"),
        src=src,
        out=out,
    )


@pytest.mark.parametrize("block", [[0, 8], [8], "8", [8.0, 8.0], [-8, -8], {}])
def test_an_invalid_block_size(src: Path, out: Path, block: object):
    said = config(quantization_config={"weight_block_size": block})
    write(src, qwen(dtype="F8_E4M3", block=8), config=said)
    refused(ConfigMismatch, "weight_block_size", "weight_scale_inv", src=src, out=out)


def test_scales_of_other_blocks_than_config_says(src: Path, out: Path):
    write(src, qwen(dtype="F8_E4M3", block=8), config=fp8_config(4))
    refused(LayoutContradiction, STACK, "weight_scale_inv", "[1, 3]", "needs 2", src=src, out=out)


def test_config_with_a_duplicate_key(src: Path, out: Path):
    write(src, qwen())
    text = (src / "config.json").read_text()
    (src / "config.json").write_text(text.replace("{", '{"num_experts": 128, ', 1))
    refused(DuplicateKey, "config.json", "`num_experts`", src=src, out=out)


def test_config_with_a_duplicate_key_deep_inside(src: Path, out: Path):
    write(src, qwen())
    (src / "config.json").write_text('{"text_config": {"a": 1, "a": 1}}')
    refused(DuplicateKey, "config.json", "`a`", src=src, out=out)


@pytest.mark.parametrize("text", ["", "{", "model_type: qwen3_moe", "{}{}", "\ufeff{}"])
def test_config_that_is_not_json(src: Path, out: Path, text: str):
    write(src, qwen())
    (src / "config.json").write_text(text, "utf-8")
    refused(BadJson, "config.json", src=src, out=out)


def test_config_that_is_not_an_object(src: Path, out: Path):
    write(src, qwen())
    (src / "config.json").write_text("[]")
    refused(BadConfig, "config.json", src=src, out=out)


def test_config_with_infinity_is_fine(src: Path, out: Path):
    # configs of state-space models carry it
    write(src, qwen())
    text = (src / "config.json").read_text()
    (src / "config.json").write_text(text.replace("{", '{"time_step_limit": [0.0, Infinity], ', 1))
    moeconv.fuse(src, out)


# --- families ----------------------------------------------------------------------------------
def test_an_unknown_family(src: Path, out: Path):
    write(src, qwen(), config=config("brand_new_moe"))
    refused(UnknownFamily, "`brand_new_moe`", STACK, "--recipe", "config.json", src=src, out=out)


def test_no_config_and_no_recipe(src: Path, out: Path):
    write(src, qwen(), config={})
    refused(UnknownFamily, "no config.json", STACK, "--recipe", src=src, out=out)


def test_a_model_without_experts(src: Path, out: Path):
    write(src, without(qwen(), "experts"))
    refused(NoExperts, "2 tensors", "--recipe", src=src, out=out)


def test_a_model_of_no_family_without_experts(src: Path, out: Path):
    write(src, {"model.embed_tokens.weight": ("BF16", (8, 8))}, config=config("llama"))
    refused(NoExperts, "1 tensor", "--recipe", src=src, out=out)


def test_experts_under_names_that_the_family_does_not_have(src: Path, out: Path):
    # to call this "no experts" would send the user the wrong way
    tensors = {n.replace("gate_proj", "w1"): s for n, s in fused().items()}
    tensors = {n.replace("_proj", "_w"): s for n, s in tensors.items()}
    write(src, tensors)
    with pytest.raises(MoeconvError) as caught:
        moeconv.fuse(src, out)
    assert f"{STACK}.gate_up_w" in str(caught.value)
