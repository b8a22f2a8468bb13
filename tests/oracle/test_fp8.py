"""Block fp8 in transformers: fused loads to the same bits as per expert, kept in fp8 or not.

Where it dequantises on load it needs `moeconv.runtime.dequantize_fused_fp8()` for stacks.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import moeconv
import moeconv.runtime
from moeconv.errors import UnsupportedTransformers
from tests.helpers import tree_sha256
from tests.oracle.tiny import tiny_model
from tests.oracle.torchbytes import file_tensors, model_bits

BLOCK = 8
# one for each way that transformers names, scopes and merges experts which it loads one by one
BY_EXPERT = [
    "deepseek_v3", "dots3_note", "glm4v_moe", "hunyuan_v1_moe", "jamba", "kimi_linear", "lfm2_moe",
    "longcat_flash", "minimax_m2", "minimax_m3_vl", "mistral_large4", "mixtral", "nemotron_h",
    "phimoe", "qwen3_5_moe", "qwen3_moe", "qwen3_omni_moe",
]  # fmt: skip


def quantised(weight: torch.Tensor, scale_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Block fp8 as it is published: e4m3 values and the factor that gives them back."""
    rows, columns = weight.shape
    tiles = weight.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = (tiles.abs().amax((1, 3)) / 448).to(scale_dtype).float()
    values = (tiles / scale[:, None, :, None]).reshape(rows, columns)
    return {
        "weight": values.to(torch.float8_e4m3fn),
        "weight_scale_inv": scale.to(scale_dtype),
    }


def published(model_type: str, root: Path, scale_dtype: torch.dtype) -> Any:
    """A tiny checkpoint whose routed experts are block fp8, and its model class."""
    model: Any = tiny_model(model_type)
    model.save_pretrained(root)
    tensors: dict[str, torch.Tensor] = {}
    linears = {n.removesuffix(".weight") for n in file_tensors(root) if n.endswith("proj.weight")}
    for name, tensor in file_tensors(root).items():
        if ".experts." in name:
            stem = name.removesuffix("weight")
            parts = quantised(tensor, scale_dtype)
            tensors |= {stem + part: value.contiguous() for part, value in parts.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / "config.json").read_bytes())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": [
            *sorted(n for n in linears if ".experts." not in n),
            "lm_head",
            *(f"model.layers.{n}.mlp.gate" for n in range(4)),
        ],
    }
    (root / "config.json").write_text(json.dumps(config))
    return type(model)


@pytest.mark.usefixtures("keeps_fp8")
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_the_same_parameters_before_and_after(
    model_type: str, scale_dtype: torch.dtype, tmp_path: Path
):
    model_class = published(model_type, tmp_path / "src", scale_dtype)
    moeconv.fuse(tmp_path / "src", tmp_path / "out")
    before, was = model_class.from_pretrained(tmp_path / "src", output_loading_info=True)
    after, told = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(was.values())
    assert not any(told.values())
    assert model_bits(after) == model_bits(before)
    params = dict(after.named_parameters())
    stack = "model.layers.1.mlp.experts"
    assert params[f"{stack}.gate_up_proj"].dtype is torch.float8_e4m3fn
    plain = dict(tiny_model(model_type).named_parameters())
    for name in ("gate_up_proj", "down_proj"):
        scale = params[f"{stack}.{name}_scale_inv"].float()
        grid = scale.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
        true = plain[f"{stack}.{name}"].float()
        assert torch.allclose(params[f"{stack}.{name}"].float() * grid, true, atol=0.03)
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(tmp_path / "src")


@pytest.fixture
def fused_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `dequantize_fused_fp8` changes in transformers, for one test."""
    quantizers = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
    monkeypatch.setitem(quantizers, "fp8", quantizers["fp8"])
    moeconv.runtime.dequantize_fused_fp8()


DEQUANTISE = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}


@pytest.mark.usefixtures("fused_fp8")
@pytest.mark.parametrize("model_type", BY_EXPERT)
def test_dequantising_is_equal_before_and_after(model_type: str, tmp_path: Path):
    model_class = published(model_type, tmp_path / "src", torch.float32)
    moeconv.fuse(tmp_path / "src", tmp_path / "out")
    assert any(n.endswith("proj_scale_inv") for n in file_tensors(tmp_path / "out"))
    before, was = model_class.from_pretrained(
        tmp_path / "src", output_loading_info=True, **DEQUANTISE
    )
    after, told = model_class.from_pretrained(
        tmp_path / "out", output_loading_info=True, **DEQUANTISE
    )
    assert not any(was.values())
    assert not any(told.values())
    assert model_bits(after) == model_bits(before)


@pytest.mark.usefixtures("fused_fp8")
@pytest.mark.parametrize("numbers", [False, True])
def test_dequantising_a_stack_that_is_turned_on_loading(tmp_path: Path, *, numbers: bool):
    """transformers has a rule for these names already, which turns [E, K, O]: it comes after."""
    model: Any = tiny_model("qwen3_vl_moe")
    model.save_pretrained(tmp_path)
    tensors = dict(file_tensors(tmp_path))
    stacks = [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    true = {}
    for name in stacks:
        plain = tensors[name].float()
        experts, rows, columns = plain.shape
        scales = torch.rand(experts, *([] if numbers else [rows // 8, columns // 8])) + 0.5
        grid = scales.reshape(experts, *((1, 1) if numbers else scales.shape[1:]))
        wide = grid.repeat_interleave(rows // grid.shape[1], 1)
        wide = wide.repeat_interleave(columns // grid.shape[2], 2)
        tensors[name] = plain.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        true[name] = (tensors[name].float() * wide).to(torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_bytes())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": None if numbers else [8, 8],
        "modules_to_not_convert": ["lm_head", "visual", "self_attn", "mlp.gate"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, told = type(model).from_pretrained(tmp_path, output_loading_info=True, **DEQUANTISE)
    assert not any(told.values())
    parameters = dict(loaded.named_parameters())
    assert stacks
    for name in stacks:
        turned = parameters[name].shape != true[name].shape
        assert torch.equal(parameters[name], true[name].mT if turned else true[name])


@pytest.mark.usefixtures("fused_fp8")
def test_stacks_that_are_not_quantised_load_as_ever(tmp_path: Path):
    """Beside quantised ones; transformers leaves them the dtype that they have in the file."""
    model_class = published("qwen3_moe", tmp_path / "src", torch.float32)
    tensors = {}
    for name, tensor in file_tensors(tmp_path / "src").items():
        if ".layers.1.mlp.experts." in name:
            if name.endswith("_scale_inv"):
                continue
            tensors[name] = tensor.float()
        else:
            tensors[name] = tensor
    save_file(tensors, tmp_path / "src" / "model.safetensors", metadata={"format": "pt"})
    moeconv.fuse(tmp_path / "src", tmp_path / "out")
    before = model_class.from_pretrained(tmp_path / "src", **DEQUANTISE)
    after = model_class.from_pretrained(tmp_path / "out", **DEQUANTISE)
    assert model_bits(after) == model_bits(before)
    assert after.model.layers[1].mlp.experts.down_proj.dtype is torch.float32


def test_transformers_alone_leaves_the_scales_of_stacks_out(tmp_path: Path):
    """Where this fails, transformers has mended it: `dequantize_fused_fp8` and its notes can go."""
    model_class = published("qwen3_moe", tmp_path / "src", torch.float32)
    notes = moeconv.fuse(tmp_path / "src", tmp_path / "out").plan.notes
    assert any("dequantize_fused_fp8" in note for note in notes)
    moeconv.unfuse(tmp_path / "out", tmp_path / "alone", layout="per-expert")
    before = model_class.from_pretrained(tmp_path / "src", **DEQUANTISE)
    again = model_class.from_pretrained(tmp_path / "alone", **DEQUANTISE)
    assert model_bits(again) == model_bits(before)
    fused, told = model_class.from_pretrained(
        tmp_path / "out", output_loading_info=True, **DEQUANTISE
    )
    assert "model.layers.0.mlp.experts.gate_up_proj_scale_inv" in told["unexpected_keys"]
    assert model_bits(fused) != model_bits(before)


def test_another_transformers_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "moeconv.runtime.fused_fp8", raising=False)
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    with pytest.raises(UnsupportedTransformers, match="per-expert") as caught:
        moeconv.runtime.dequantize_fused_fp8()
    assert caught.value.code == "unsupported-transformers"
