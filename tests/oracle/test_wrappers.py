"""Models of several parts whose own type no recipe knows: the language model's type counts."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import moeconv
from moeconv.errors import UnknownFamily
from tests.helpers import tree_sha256
from tests.oracle.tiny import family, keep_in_float32, randomize
from tests.oracle.torchbytes import file_bits, model_bits

TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14, "num_channels": 3,
}  # fmt: skip
SQUARE = {"image_size": [28, 28], "patch_size": [14, 14]}
WRAPPERS = [
    ("mistral3", "mistral4", {"model_type": "pixtral", "head_dim": 16, **TOWER}),
    ("internvl", "qwen3_moe", {"model_type": "internvl_vision", **TOWER, **SQUARE}),
    ("llava", "mixtral", {"model_type": "clip_vision_model", **TOWER}),
]


def saved(root: Path, wrapper: str, text: str, tower: dict[str, object]) -> type[PreTrainedModel]:
    """A tiny wrapper around a family's tiny model; its class."""
    parts = {"model_type": wrapper, "text_config": family(text)["config"], "vision_config": tower}
    config = transformers.CONFIG_MAPPING[wrapper].from_dict(parts)
    auto = transformers.AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.bfloat16)
    keep_in_float32(model)
    randomize(model, 0)
    model.save_pretrained(root)
    return type(model)


@pytest.mark.parametrize(("wrapper", "text", "tower"), WRAPPERS)
def test_the_language_model_decides(
    wrapper: str, text: str, tower: dict[str, object], tmp_path: Path
):
    model_class = saved(tmp_path / "src", wrapper, text, tower)
    plan = moeconv.fuse(tmp_path / "src", tmp_path / "out").plan
    assert any(f"`{wrapper}`" in note and f"`{text}`" in note for note in plan.notes)
    assert [s.layout for s in plan.stacks] == ["fused"] * len(plan.stacks) != []
    before = model_class.from_pretrained(tmp_path / "src", dtype=torch.bfloat16)
    after, told = model_class.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(told.values())
    assert model_bits(after) == model_bits(before)
    after.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = {n for n in file_bits(tmp_path / "fused") if ".experts." in n}
    ours = {n for n in file_bits(tmp_path / "out") if ".experts." in n}
    assert {n.rpartition(".layers.")[2] for n in names} == {
        n.rpartition(".layers.")[2].replace("block_sparse_moe", "mlp") for n in ours
    }
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(tmp_path / "src")


def test_a_wrapper_around_nothing_known(tmp_path: Path):
    saved(tmp_path, *WRAPPERS[1])
    config = json.loads((tmp_path / "config.json").read_bytes())
    config["text_config"]["model_type"] = "brand_new"
    config["text_config"].pop("architectures", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownFamily, match="--recipe qwen3_moe"):
        moeconv.fuse(tmp_path, tmp_path.with_name("out"))
