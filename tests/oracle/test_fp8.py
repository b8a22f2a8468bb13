"""Block fp8 in transformers: kept in fp8, fused loads to the same bits as per expert.

Dequantised on load, only experts one by one come out right: fused ones lose their scales there.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moeconv
from tests.helpers import tree_sha256
from tests.oracle.tiny import tiny_model
from tests.oracle.torchbytes import file_tensors, model_bits

BLOCK = 8


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


def test_dequantising_is_equal_where_experts_are_apart(tmp_path: Path):
    """transformers 5.23 dequantises experts one by one only: fused ones lose their scales there.

    Where this fails, transformers has mended it: drop the note of weight_scale_inv.
    """
    model_class = published("qwen3_moe", tmp_path / "src", torch.float32)
    notes = moeconv.fuse(tmp_path / "src", tmp_path / "out").plan.notes
    assert any("leaves out" in note for note in notes)
    moeconv.unfuse(tmp_path / "out", tmp_path / "alone", layout="per-expert")
    before = model_class.from_pretrained(tmp_path / "src")
    again = model_class.from_pretrained(tmp_path / "alone")
    assert model_bits(again) == model_bits(before)
    fused, told = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert "model.layers.0.mlp.experts.gate_up_proj_scale_inv" in told["unexpected_keys"]
    assert model_bits(fused) != model_bits(before)
