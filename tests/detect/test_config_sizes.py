"""Sizes that config.json states, and where the tensors contradict them."""

from moeconv.checkpoint.config import Config
from moeconv.core.strict_json import Json
from moeconv.detect.config_sizes import (
    config_mismatches,
    layer_count,
    mtp_layer_count,
    stated_block_sizes,
    stated_sizes,
    states_scales,
)
from tests.detect.stacks import STACK, experts, layout, matched, recipe, stored

FP8: Json = {"quant_method": "fp8", "weight_block_size": [3, 5]}


def config(**doc: Json) -> Config:
    return Config(doc, present=True)


def test_sizes_come_from_the_recipes_first_section_that_has_any():
    inner: Json = {"num_local_experts": 2, "intermediate_size": 4}
    stated = stated_sizes(matched(experts(2)), config(text_config=inner, num_local_experts=9))
    assert stated == {"experts": 2, "width": 4}


def test_a_size_that_is_not_a_positive_integer_is_not_stated():
    doc: dict[str, Json] = {"num_local_experts": True, "intermediate_size": 0, "hidden_size": "8"}
    assert stated_sizes(matched(experts(1)), config(**doc)) == {}


def test_sizes_that_the_tensors_contradict_are_named():
    doc: dict[str, Json] = {"num_local_experts": 3, "intermediate_size": 4, "hidden_size": 7}
    sizes = {"experts": 2, "width": 4, "hidden": 8}
    problems = config_mismatches(matched(experts(2)), sizes, config(**doc))
    assert [p.at for p in problems] == [
        f"config.json, key `{key}`" for key in ("num_local_experts", "hidden_size")
    ]


def test_scales_are_stated_by_the_method_but_not_for_modules_left_alone():
    assert states_scales(config(quantization_config=FP8), recipe(), STACK)
    assert not states_scales(config(quantization_config={"quant_method": "mxfp"}), recipe(), STACK)
    left: Json = {"quant_method": "fp8", "modules_to_not_convert": [STACK]}
    assert not states_scales(config(quantization_config=left), recipe(), STACK)
    other: Json = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
    assert states_scales(config(quantization_config=other), recipe(), STACK)


def test_block_sizes_are_stated_for_those_that_the_layout_names():
    scale = stored(f"{STACK}.0.w1.weight_scale_inv", (2, 2), "F32")
    stack, layouts = matched([*experts(1, "F8_E4M3"), scale]), [layout("per-expert")]
    stated = stated_block_sizes(stack, layouts, config(quantization_config=FP8))
    assert stated.choices == [{"block.0": 3, "block.1": 5}]
    nothing = stated_block_sizes(stack, layouts, config())
    assert nothing.choices == [{}]
    assert {"block.0", "block.1"} <= nothing.unstated.keys()


def test_layers_and_prediction_layers():
    doc = config(num_hidden_layers=4, num_layers=2, num_nextn_predict_layers=1)
    assert layer_count(doc, "") == 2
    assert mtp_layer_count(doc) == 1
    assert layer_count(config(num_layers=0), "") is None
