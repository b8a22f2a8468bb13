"""Block fp8 in transformers: fused loads to the same bits as per expert, kept in fp8 or not.

Where it dequantises on load it needs `moeconv.runtime.dequantize_fused_fp8()` for stacks.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

import moeconv
import moeconv.runtime
from moeconv.errors import StraddlingBlock, UnsupportedTransformers
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


def published(model_type: str, root: Path, scale_dtype: torch.dtype) -> type[PreTrainedModel]:
    """A tiny checkpoint whose routed experts are block fp8, and its model class."""
    model = tiny_model(model_type)
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
@pytest.mark.parametrize("numbers", [0, 1, 2])
def test_dequantising_a_stack_that_is_transposed_on_loading(tmp_path: Path, *, numbers: int):
    """transformers has a rule for these names already, which turns [E, K, O]: it comes after."""
    model = tiny_model("qwen3_vl_moe")
    model.save_pretrained(tmp_path)
    tensors = dict(file_tensors(tmp_path))
    stacks = [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    true = {}
    for name in stacks:
        plain = tensors[name].float().mT.contiguous()  # transformers saves it unturned
        experts, rows, columns = plain.shape
        pair = numbers == 2 and "gate_up" in name
        # in the file gate and up are columns
        grid = torch.rand(experts, 1, 2 if pair else 1) + 0.5
        scales = grid.reshape(experts, *([2] if pair else []))
        if not numbers:
            scales = grid = torch.rand(experts, rows // 8, columns // 8) + 0.5
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
        assert torch.equal(parameters[name], true[name].mT)


# how transformers holds each family's stacks: as [E, O, K] or turned, and gate and up in halves,
# alternating, or apart in two dimensions
HOLDS = {
    "llama4_text": "turned halves",
    "aria_text": "turned halves",
    "openai_privacy_filter": "turned halves",
    "gpt_oss": "turned alternating",
    "dbrx": "flat",
    "mixtral": "halves",
    "longcat_flash": "halves",
    "jetmoe": "halves",
}
# under these names, JetMoE's beside the experts' module
STORED = (
    *("gate_up_proj", "down_proj", "mlp.w1", "mlp.v1", "mlp.w2"),
    *(".input_linear.weight", ".output_linear.weight"),
)
# one for each expert and projection: a grid of blocks, or a number in the three ways it is written
SHAPES: dict[str, tuple[int, ...] | None] = {"blocks": None, "[]": (), "[1]": (1,), "[1,1]": (1, 1)}


def by_hand(
    gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, holds: str
) -> list[torch.Tensor]:
    """The parameters that hold these experts, [E, O, K] each."""
    if holds == "flat":
        return [gate.flatten(0, 1), up.flatten(0, 1), down.mT.flatten(0, 1)]
    joined = torch.stack([gate, up], 2) if "alternating" in holds else torch.stack([gate, up], 1)
    gate_up = joined.flatten(1, 2)
    return [gate_up.mT, down.mT] if "turned" in holds else [gate_up, down]


def one_by_one(
    model_type: str, scales: tuple[int, ...] | None, root: Path
) -> tuple[type[PreTrainedModel], dict[str, dict[str, list[torch.Tensor]]]]:
    """A checkpoint of fp8 experts, its model class, and what multiplied matrices each stack has."""
    model = tiny_model(model_type)
    model.save_pretrained(root / "plain")
    moeconv.unfuse(root / "plain", root / "alone", layout="per-expert")
    tensors: dict[str, torch.Tensor] = {}
    true: dict[str, dict[str, list[torch.Tensor]]] = {}
    generator = torch.Generator().manual_seed(1)
    for name, tensor in sorted(
        file_tensors(root / "alone").items(), key=lambda item: natural(item[0])
    ):
        found = re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)\.weight", name)
        tensors[name] = tensor
        if found is None:
            continue
        grid = (tensor.shape[0] // BLOCK, tensor.shape[1] // BLOCK) if scales is None else scales
        scale = torch.rand(grid, generator=generator) + 0.5
        wide = scale
        if scales is None:
            wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        tensors[name] = tensor.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        matrix = (tensors[name].float() * wide).to(torch.bfloat16)
        true.setdefault(found[1], {}).setdefault(found[2], []).append(matrix)
    (root / "src").mkdir()
    save_file(tensors, root / "src" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / "plain" / "config.json").read_bytes())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK] if scales is None else None,
    }
    (root / "src" / "config.json").write_text(json.dumps(config))
    return type(model), true


def natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def stacks_of(true: dict[str, list[torch.Tensor]], holds: str) -> list[torch.Tensor]:
    names = ("w1", "v1", "w2") if "v1" in true else ("w1", "w3", "w2")
    if "w1" not in true:
        names = ("gate_proj", "up_proj", "down_proj")
    gate, up, down = (torch.stack(true[name]) for name in names)
    return by_hand(gate, up, down, holds)


@pytest.mark.usefixtures("fused_fp8")
@pytest.mark.parametrize("scales", SHAPES)
@pytest.mark.parametrize("model_type", HOLDS)
def test_dequantised_by_hand(model_type: str, scales: str, tmp_path: Path):
    """Each parameter is what the matrices and scales make one by one."""
    model_class, true = one_by_one(model_type, SHAPES[scales], tmp_path)
    if (model_type, scales) == ("gpt_oss", "blocks"):
        with pytest.raises(StraddlingBlock):
            moeconv.fuse(tmp_path / "src", tmp_path / "out")
        return
    moeconv.fuse(tmp_path / "src", tmp_path / "out")
    loaded, told = model_class.from_pretrained(
        tmp_path / "out", output_loading_info=True, **DEQUANTISE
    )
    assert not any(told.values())
    parameters = {n.rpartition("layers.")[2]: p for n, p in loaded.named_parameters()}
    assert true
    for stack, matrices in true.items():
        at = stack.rpartition("layers.")[2].replace("block_sparse_moe", "mlp")
        held = [
            p
            for part in STORED
            if (p := parameters.get(f"{at}.{part}".replace(".experts..", "."))) is not None
        ]
        wanted = stacks_of(matrices, HOLDS[model_type])
        assert len(held) == len(wanted)
        for parameter, by_matrix in zip(held, wanted, strict=True):
            assert torch.equal(parameter, by_matrix)


def with_scales(
    model_type: str, shapes: dict[str, tuple[int, ...]], root: Path
) -> type[PreTrainedModel]:
    """A fused fp8 checkpoint as others might write it, blocks of 8, and its model class."""
    model = tiny_model(model_type)
    model.save_pretrained(root)
    tensors = dict(file_tensors(root))
    for name in list(tensors):
        part = name.rpartition(".experts.")[2]
        if part in shapes:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.rand(shapes[part]) + 0.5
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / "config.json").read_bytes())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (root / "config.json").write_text(json.dumps(config))
    return type(model)


@pytest.mark.usefixtures("fused_fp8")
@pytest.mark.parametrize(
    ("model_type", "part", "shape"),
    [
        # not turned with the weights, [8, 32, 96] and [8, 48, 32]; both would divide
        ("llama4_text", "gate_up_proj", (8, 12, 4)),
        ("aria_text", "fc1.weight", (8, 12, 4)),
        ("aria_text", "fc2.weight", (8, 4, 6)),
        ("openai_privacy_filter", "gate_up_proj", (8, 12, 4)),
        ("openai_privacy_filter", "down_proj", (8, 4, 6)),
        # another size of blocks, two numbers for down, the numbers of other experts
        ("llama4_text", "gate_up_proj", (8, 2, 6)),
        ("llama4_text", "down_proj", (8, 2)),
        ("aria_text", "fc2.weight", (8, 2, 1)),
        ("llama4_text", "down_proj", (4, 6, 4)),
        # columns of gate and up in turn: blocks of which?
        ("gpt_oss", "gate_up_proj", (8, 4, 12)),
        # DBRX's w2 as [(E K/8) O/8] is right, not turned it has three dimensions
        ("dbrx", "mlp.w2", (8, 4, 3)),
        ("dbrx", "mlp.w1", (8, 2)),
    ],
)
def test_what_is_not_certain_is_refused(
    model_type: str, part: str, shape: tuple[int, ...], tmp_path: Path
):
    model_class = with_scales(model_type, {part: shape}, tmp_path)
    with pytest.raises(RuntimeError, match="conversion"):
        model_class.from_pretrained(tmp_path, **DEQUANTISE)


@pytest.mark.usefixtures("fused_fp8")
def test_fp8_experts_without_a_rule_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers would cast them as they are, and name the scales as unexpected."""
    monkeypatch.setattr("moeconv.integrations.transformers_fp8._stacks", lambda _: [])
    model_class = with_scales("openai_privacy_filter", {"down_proj": (8, 6, 4)}, tmp_path)
    with pytest.raises(ValueError, match="unfuse --layout per-expert"):
        model_class.from_pretrained(tmp_path, **DEQUANTISE)


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
    monkeypatch.delitem(sys.modules, "moeconv.integrations.transformers_fp8", raising=False)
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    with pytest.raises(UnsupportedTransformers, match="per-expert") as caught:
        moeconv.runtime.dequantize_fused_fp8()
    assert caught.value.code == "unsupported-transformers"
