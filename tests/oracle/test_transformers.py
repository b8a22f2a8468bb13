"""transformers is the judge: its own checkpoints, converted and back, for every family."""

import inspect
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import moeconv
from tests.helpers import tree_sha256
from tests.oracle.tiny import IMPOSSIBLE, MODEL_TYPES, SPEAKING, logits, tiny_model
from tests.oracle.torchbytes import bits, file_bits, file_tensors, loaded, model_bits

# What transformers renames on load, beside fusing, and moeconv leaves as it was published:
# (prefix in the published names, the same in transformers' own), by model type.
RENAMED = {
    "aria": ("language_model.model.", "model.language_model."),
    "deepseek_ocr2": ("model.", "model.language_model."),
    "deepseek_v4": (".ffn.", ".mlp."),
    "dots3_note": ("model.", "model.language_model."),
    "ernie4_5_vl_moe": ("model.", "model.language_model."),
    "inkling2": ("model.llm.", "model.language_model."),
    "inkling2_text": ("model.llm.", "model."),
    "inkling_mm_model": ("model.llm.", "model.language_model."),
    "kimi_k25": ("language_model.model.blocks.", "model.language_model.layers."),
    "kimi_linear": ("block_sparse_moe.", "mlp."),
    "minimax": ("block_sparse_moe.", "mlp."),
    "minimax_m2": ("block_sparse_moe.", "mlp."),
    "minimax_m3_vl": ("language_model.model.", "model.language_model."),
    "mistral_large4": ("layers.", "model.language_model.layers."),
    "mixtral": ("block_sparse_moe.", "mlp."),
    "nemo_speechlm": ("llm.model.", "model.language_model."),
    "nemotron_h": ("backbone.", "model."),
    "nemotron_h_omni": ("backbone.", "model."),
    "phimoe": ("block_sparse_moe.", "mlp."),
    "qwen3_omni_moe": ("thinker.model.", "thinker.model.language_model."),
    "qwen3_omni_moe_thinker": ("model.", "model.language_model."),
    "step3p7": ("model.", "model.language_model."),
    "unlimited_ocr": ("model.", "model.language_model."),
}
# and the block around the experts
BLOCKS = {
    "dots3_note": ("vision_encoder.", "model.vision_tower."),
    "minimax_m3_vl": (".block_sparse_moe.", ".mlp."),
    "mistral_large4": (".experts.", ".mlp.experts."),
    "mistral_large4_text": (".experts.", ".mlp.experts."),
}


def is_expert(name: str) -> bool:
    """Whether a tensor holds routed experts; Granite, JetMoE and Step do not say so."""
    stacked = re.search(r"\.moe\.(gate|up|down)_proj\.|\.(in|out)put_linear\.", name)
    return bool(stacked) or bool(re.search(r"(^|\.)experts\.(?!e_score_correction_bias)", name))


@dataclass(frozen=True)
class Case:
    """A model, its published form, what moeconv makes of it, and transformers' own fused file."""

    model_type: str
    model: nn.Module
    src: Path
    out: Path
    back: Path
    theirs: Path


@pytest.fixture(scope="module", params=[m for m in MODEL_TYPES if m not in IMPOSSIBLE])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    """Every conversion once a family; the tests below look at what came out."""
    root = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param)
    made = Case(request.param, model, *(root / n for n in ("src", "out", "back", "theirs")))
    size = sum(t.nbytes for t in model.state_dict().values())
    model.save_pretrained(made.src, max_shard_size=size // 4)
    model.save_pretrained(made.theirs, save_original_format=False)
    moeconv.fuse(made.src, made.out)
    moeconv.unfuse(made.out, made.back)
    yield made
    shutil.rmtree(root)


def test_transformers_loads_the_same_model(case: Case):
    twin = loaded(case.model, case.out)
    assert model_bits(twin) == model_bits(loaded(case.model, case.src))
    if case.model_type not in SPEAKING:
        return
    assert model_bits(twin) == model_bits(case.model)
    said = logits(twin)
    assert torch.isfinite(said).all()
    assert bits(said) == bits(logits(case.model))


def test_experts_are_those_that_transformers_would_have_saved(case: Case):
    old, new = RENAMED.get(case.model_type, ("", ""))
    block, own = BLOCKS.get(case.model_type, ("", ""))
    ours = {
        n.replace(old, new, 1).replace(block, own, 1): b
        for n, b in file_bits(case.out).items()
        if is_expert(n)
    }
    theirs = {n: b for n, b in file_bits(case.theirs).items() if is_expert(n)}
    assert ours
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if ours[n] != theirs[n]] == []


def test_all_other_tensors_are_untouched(case: Case):
    source, out = file_bits(case.src), file_bits(case.out)
    assert {n: b for n, b in out.items() if not is_expert(n)} == {
        n: b for n, b in source.items() if not is_expert(n)
    }


def test_unfuse_gives_back_the_very_files(case: Case):
    assert len(list(case.src.glob("*.safetensors"))) > 1
    assert tree_sha256(case.back) == tree_sha256(case.src)


def test_proofs_agree(case: Case):
    prints = {moeconv.fingerprint(root) for root in (case.src, case.out, case.back)}
    assert len(prints) == 1
    for level in ("structure", "digest"):
        report = moeconv.verify(case.out, level=level)
        assert report.ok, report.problems
        assert {report.fingerprint} == prints
    report = moeconv.verify(case.out, level="source", source=case.src)
    assert report.ok, report.problems
    assert {d.mark for d in moeconv.diff(case.src, case.out)} == {"="}


def test_every_expert_is_in_its_own_place(tmp_path: Path):
    """Held against the published tensors one by one, without transformers' fusing code."""
    model = tiny_model("qwen3_moe")
    experts, width = model.config.num_experts, model.config.moe_intermediate_size
    model.save_pretrained(tmp_path / "src")
    moeconv.fuse(tmp_path / "src", tmp_path / "out")
    source, out = file_tensors(tmp_path / "src"), file_tensors(tmp_path / "out")
    for layer in range(model.config.num_hidden_layers):
        stack = f"model.layers.{layer}.mlp.experts"
        gate_up, down = out.pop(f"{stack}.gate_up_proj"), out.pop(f"{stack}.down_proj")
        assert len(gate_up) == len(down) == experts
        for e in range(experts):
            one = {p: source.pop(f"{stack}.{e}.{p}_proj.weight") for p in ("gate", "up", "down")}
            assert torch.equal(gate_up[e, :width], one["gate"])
            assert torch.equal(gate_up[e, width:], one["up"])
            assert torch.equal(down[e], one["down"])
    assert out.keys() == source.keys()


def test_what_cannot_be_a_case_cannot(tmp_path: Path):
    """The reasons in IMPOSSIBLE are true."""
    assert IMPOSSIBLE.keys() == {"doge", "cosmos3_omni", "vitpose_backbone"}
    for model_type in ("doge", "cosmos3_omni"):
        model = tiny_model(model_type)
        assert not any(is_expert(name) for name in model.state_dict())
    # what it calls experts are plain layers, and its forward is told which one to use
    pose = tiny_model("vitpose_backbone")
    assert "dataset_index" in inspect.signature(pose.forward).parameters
    assert not any("router" in name or ".gate." in name for name in pose.state_dict())
