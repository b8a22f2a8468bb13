"""Where config.json says one thing and the tensors another: the names win, or it is refused."""

from pathlib import Path

import pytest

from moeconv.errors import ConfigMismatch, UnknownExpertTensor, UnknownFamily
from tests.families.plain import QWEN, planned

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 12, "hidden_size": 16}


def test_where_config_json_says_another_family_the_names_win(tmp_path: Path):
    result = planned(tmp_path, QWEN, MIXTRAL)
    assert [s.recipe for s in result.plan.stacks] == ["qwen3_moe"]
    assert any("`mixtral`" in n and "the names win" in n for n in result.plan.notes)


@pytest.mark.parametrize(
    ("model_type", "architecture", "other"),
    [
        ("kimi_k2", "DeepseekV3ForCausalLM", "deepseek_v3"),
        ("qwen3_5_moe_text", "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe"),
        ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", None),
        ("deepseek_v3", "DeepseekV3ForCausalLM", None),
        ("bailing_moe_v2", "BailingV2MoeForCausalLM", None),
        ("kimi_k25_text", "KimiK25TextForCausalLM", None),
        ("bailing_moe", "BailingMoeV2ForCausalLM", "bailing_moe_v2"),
        ("kimi_k2", "NobodyKnowsForCausalLM", None),
    ],
)
def test_a_type_and_an_architecture_of_two_families_are_reported(
    model_type: str, architecture: str, other: str | None, tmp_path: Path
):
    config = {"model_type": model_type, "architectures": [architecture]}
    plan = planned(tmp_path, QWEN, config).plan
    said = [n for n in plan.notes if "the names of the tensors decide" in n]
    assert [f"`{other}`" in note for note in said] == ([True] if other else [])
    assert [s.recipe for s in plan.stacks] == ["qwen3_moe"]


def test_a_config_that_names_only_its_language_model(tmp_path: Path):
    plan = planned(tmp_path, QWEN, {"text_config": {"model_type": "qwen3_moe"}}).plan
    assert any(n.startswith("there is no model_type; the `text_config`") for n in plan.notes)


def test_names_win_only_where_they_leave_no_layout_open(tmp_path: Path):
    """`gate_up_proj` is turned in some families: another family's config.json decides nothing."""
    fused = "transformer.blocks.0.mlp.experts.gate_up_proj BF16 4,16,16\n"
    fused += "transformer.blocks.0.mlp.experts.down_proj BF16 4,16,8"
    with pytest.raises(UnknownExpertTensor, match=r"mlp\.experts\.gate_up_proj"):
        planned(tmp_path, fused, {"model_type": "dbrx"})


def test_stacks_that_no_recipe_knows_are_reported(tmp_path: Path):
    """MLX's, alone: there are experts, but nothing can be done. Beside others: left as they are."""
    mlx = "\n".join(
        f"model.layers.1.mlp.switch_mlp.{p}_proj.weight BF16 4,{shape}"
        for p, shape in (("gate", "8,16"), ("up", "8,16"), ("down", "16,8"))
    )
    with pytest.raises(UnknownExpertTensor, match="switch_mlp"):
        planned(tmp_path / "alone", mlx, {"model_type": "qwen3_moe"})
    for name, text in (("mlx", mlx), ("step3", mlx.replace("mlp.switch_mlp", "moe"))):
        plan = planned(tmp_path / name, f"{QWEN}\n{text}", {"model_type": "qwen3_moe"}).plan
        (note,) = (n for n in plan.notes if "named like fused experts" in n)
        assert "[4, 8, 16] and 2 tensors more" in note


def test_a_model_type_that_nobody_knows_is_not_guessed(tmp_path: Path):
    with pytest.raises(UnknownFamily):
        planned(tmp_path, QWEN, {"model_type": "brand_new"})


@pytest.mark.parametrize("there", [(0, 1), (0, 2), (2,)])
def test_a_layer_that_is_not_there_at_all(there: tuple[int, ...], tmp_path: Path):
    """A directory without an index and without a shard: nothing else says that it is short."""
    text = "\n".join(QWEN.replace("layers.0", f"layers.{n}") for n in there)
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 3}
    lost = next(n for n in range(3) if n not in there)
    with pytest.raises(ConfigMismatch, match=rf"layer {lost} has no tensor.* states 3 layers"):
        planned(tmp_path / "lost", text, config)
    dense = "\n".join(f"model.layers.{n}.input_layernorm.weight BF16 16" for n in range(3))
    assert len(planned(tmp_path / "dense", f"{text}\n{dense}", config).plan.stacks) == len(there)


LAYERS = "\n".join(f"model.layers.{n}.input_layernorm.weight BF16 16" for n in range(4))


@pytest.mark.parametrize(
    ("text", "config"),
    [
        # LongCat counts the halves of its layers, too
        (LAYERS, {"num_layers": 4, "num_hidden_layers": 8}),
        # the last ones that are counted are those of MTP, in a tree of their own
        (LAYERS, {"num_hidden_layers": 5, "num_nextn_predict_layers": 1}),
        (LAYERS, {"num_hidden_layers": 6, "text_config": {"mtp_num_hidden_layers": 2}}),
        # experts without anything beside them are no model
        ("", {"num_hidden_layers": 61}),
        # numbers before the layer's
        (LAYERS, {"num_hidden_layers": 4}),
    ],
)
def test_layers_that_nobody_misses(text: str, config: dict[str, object], tmp_path: Path):
    experts = "\n".join(QWEN.splitlines()[:3])
    planned(tmp_path / "plain", f"{experts}\n{text}", {"model_type": "qwen3_moe"} | config)
    staged = f"{experts}\n{text}".replace("model.", "towers.1.model.")
    planned(tmp_path / "staged", staged, {"model_type": "qwen3_moe"} | config)


def test_more_layers_than_those_of_mtp_are_missed(tmp_path: Path):
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 6, "num_nextn_predict_layers": 1}
    with pytest.raises(ConfigMismatch, match="layer 4 has no tensor"):
        planned(tmp_path, f"{QWEN}\n{LAYERS}", config)


def test_mtp_alone_is_not_a_whole_model(tmp_path: Path):
    text = QWEN.replace("layers.0", "layers.61") + "\nmodel.layers.61.eh_proj.weight BF16 16,32"
    planned(tmp_path, text, {"model_type": "deepseek_v3", "num_hidden_layers": 61})
