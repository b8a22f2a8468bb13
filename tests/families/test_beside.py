"""What stands beside the experts, and in which files: none of it says what is an expert."""

import json
from pathlib import Path

import pytest

import moeconv
from moeconv.errors import DuplicateTensor
from tests.families.plain import QWEN, planned
from tests.helpers import INDEX_NAME, Spec, read_tensors, tree_sha256, write_checkpoint
from tests.phantoms import phantom, rows

BESIDE = {
    # experts of attention, which a place in the name tells from routed ones
    "v_experts": "model.layers.0.self_attn.v_experts.{0-11}.weight BF16 16,16",
    "v_experts of three": "model.layers.0.self_attn.v_experts.{0-11}.up_proj.weight BF16 8,16",
    # dense parts under the words of experts
    "shared_mlp": "model.layers.0.mlp.shared_mlp.gate_proj.weight BF16 8,16",
    "share_expert": "model.layers.0.share_expert.up_proj.weight BF16 8,16",
    "a dense layer": "model.layers.1.mlp.gate_proj.weight BF16 8,16",
    "stray buffers": "model.layers.{0-3}.self_attn.rotary_emb.inv_freq BF16 8",
    "ids of experts as values": "model.layers.0.mlp.gate.tid2eid I64 128,2",
    "a scale for each expert": "model.layers.0.router.per_expert_scale BF16 12",
    "balancing of one more": "model.layers.0.mlp.gate.balancing_biases F32 13",
}


@pytest.mark.parametrize("what", BESIDE)
def test_what_is_beside_experts_is_copied(what: str, tmp_path: Path):
    src = phantom(tmp_path / "src", rows(f"{QWEN}\n{BESIDE[what]}"), {"model_type": "qwen3_moe"})
    plan = moeconv.fuse(src, tmp_path / "out").plan
    made = {entry.source: entry.into for entry in plan.ledger if entry.verb == "copied"}
    for name, (dtype, shape) in rows(BESIDE[what]).items():
        assert made[name] == (name,)
        assert read_tensors(tmp_path / "out")[name][:2] == (dtype, shape)
    assert len(plan.stacks) == 1


def test_arctic_has_dense_blocks_among_and_beside_its_experts(tmp_path: Path):
    text = """model.layers.1.block_sparse_moe.experts.{0-3}.w1.weight BF16 8,16
model.layers.1.block_sparse_moe.experts.{0-3}.w3.weight BF16 8,16
model.layers.1.block_sparse_moe.experts.{0-3}.w2.weight BF16 16,8
model.layers.1.block_sparse_moe.gate.weight BF16 4,16
model.layers.0.block_sparse_moe.mlp.w1.weight BF16 8,16
model.layers.{0-1}.residual_mlp.w1.weight BF16 8,16"""
    plan = planned(tmp_path, text, {"model_type": "arctic"}).plan
    assert [s.name for s in plan.stacks] == ["model.layers.1.block_sparse_moe.experts"]
    assert sum(entry.verb == "copied" for entry in plan.ledger) == 4


def test_grok_1_has_names_of_its_own(tmp_path: Path):
    stack = "model.layers.0.moe_block.experts"
    tensors: dict[str, Spec] = {}
    for e in range(2):
        for number, p in enumerate(("linear", "linear_v", "linear_1")):
            shape = (1, 3) if p != "linear_1" else (3, 1)
            tensors[f"{stack}.{e}.{p}.weight"] = ("U8", shape, bytes([10 * e + number] * 3))
    config = {"model_type": "grok-1", "num_experts": 2, "hidden_size": 3, "intermediate_size": 1}
    src = write_checkpoint(tmp_path / "src", tensors, config)
    moeconv.fuse(src, tmp_path / "out")
    assert read_tensors(tmp_path / "out") == {
        f"{stack}.gate_up_proj": ("U8", (2, 2, 3), bytes([0] * 3 + [1] * 3 + [10] * 3 + [11] * 3)),
        f"{stack}.down_proj": ("U8", (2, 3, 1), bytes([2] * 3 + [12] * 3)),
    }


@pytest.mark.parametrize(
    "names",
    [
        ("model-1-of-2", "model-2-of-2"),
        ("model-00000-of-00001", "model-00001-of-00001"),
        ("model-00001-of-00130", "model-00125-of-00130"),
        ("model.safetensors-00001-of-00002", "model.safetensors-00002-of-00002"),
        ("model_pp0_ep0_shard0", "model_mtp"),
        ("quant_model_weights-00001-of-00001", "rot"),
    ],
)
def test_names_of_files_say_nothing(names: tuple[str, str], tmp_path: Path):
    """With their index, and without; and the first names come back."""
    for index in (True, False):
        src = phantom(tmp_path / f"src-{index}", rows(QWEN), {"model_type": "qwen3_moe"})
        listed = (src / INDEX_NAME).read_text()
        for number, name in enumerate(names, 1):
            old = f"model-{number:05d}-of-00002.safetensors"
            (src / old).rename(src / f"{name}.new")
            listed = listed.replace(old, f"{name}.safetensors")
        for name in names:
            (src / f"{name}.new").rename(src / f"{name}.safetensors")
        if index:
            (src / INDEX_NAME).write_text(listed)
        else:
            (src / INDEX_NAME).unlink()
        moeconv.fuse(src, tmp_path / f"out-{index}")
        assert len(read_tensors(tmp_path / f"out-{index}")) == 3
        moeconv.unfuse(tmp_path / f"out-{index}", tmp_path / f"back-{index}")
        assert tree_sha256(tmp_path / f"back-{index}") == tree_sha256(src)


def test_files_cut_for_tensor_parallelism_are_refused(tmp_path: Path):
    """Grok 2: each of eight files has its slice of the same tensors."""
    tensors = {n: s for n, s in rows(QWEN).items() if "gate.weight" not in n}
    src = phantom(tmp_path / "src", tensors, {"model_type": "qwen3_moe"})
    (src / INDEX_NAME).unlink()
    first = src / "model-00001-of-00002.safetensors"
    first.rename(src / "pytorch_model-00001-TP-000.safetensors")
    second = src / "model-00002-of-00002.safetensors"
    second.rename(src / "pytorch_model-00002-TP-common.safetensors")
    cut = (src / "pytorch_model-00001-TP-000.safetensors").read_bytes()
    (src / "pytorch_model-00001-TP-001.safetensors").write_bytes(cut)
    with pytest.raises(DuplicateTensor):
        moeconv.fuse(src, tmp_path / "out")


def test_a_weight_and_its_scale_are_in_different_files(tmp_path: Path):
    """By turns in two files: no expert has all its parts in one."""
    parts = "\n".join(
        f"model.layers.0.mlp.experts.{{0-3}}.{p}_proj.{part}"
        for p, n, k in (("gate", 16, 32), ("up", 16, 32), ("down", 32, 16))
        for part in (f"weight F8_E4M3 {n},{k}", f"weight_scale_inv F32 {n // 8},{k // 8}")
    )
    by_file = sorted(rows(parts).items(), key=lambda item: item[0].replace("weight", ""))
    config = {
        "model_type": "qwen3_moe",
        "quantization_config": {"weight_block_size": [8, 8]},
    }
    src = phantom(tmp_path / "src", dict(by_file), config)
    where = json.loads((src / INDEX_NAME).read_bytes())["weight_map"]
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    assert where[name] != where[f"{name}_scale_inv"]
    moeconv.fuse(src, tmp_path / "out")
    assert moeconv.verify(tmp_path / "out", level="source", source=src).ok
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)
