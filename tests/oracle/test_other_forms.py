"""transformers is the judge of the forms that are not per expert: turned, foreign, fused only."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import moeconv
from moeconv.errors import AmbiguousLayout, NoPerExpertForm
from tests.helpers import tree_sha256
from tests.oracle.tiny import logits, tiny_model
from tests.oracle.torchbytes import bits, file_bits, file_tensors, loaded, model_bits

VL_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def turned(source: Path, target: Path) -> Path:
    """A Qwen3-VL checkpoint of transformers as the Hub has it: experts [E, H, 2I] and [E, I, H]."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {
        name: tensor.transpose(1, 2).contiguous() if name.endswith(VL_EXPERTS) else tensor
        for name, tensor in file_tensors(source).items()
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def assert_same_model(model: nn.Module, root: Path) -> None:
    """What transformers loads from `root` has the bits of `model`, and says the same."""
    twin = loaded(model, root)
    assert model_bits(twin) == model_bits(model)
    assert bits(logits(twin)) == bits(logits(model))


def test_qwen3_vl_from_the_hub_and_back(tmp_path: Path):
    model = tiny_model("qwen3_vl_moe")
    model.save_pretrained(tmp_path / "saved")
    hub = turned(tmp_path / "saved", tmp_path / "hub")
    assert_same_model(model, hub)  # the judge takes it for a file of the Hub

    moeconv.fuse(hub, tmp_path / "fused")
    assert_same_model(model, tmp_path / "fused")
    assert file_bits(tmp_path / "fused") == file_bits(tmp_path / "saved")

    through = moeconv.fuse(hub, tmp_path / "through", layout="hub")
    assert file_bits(tmp_path / "through") == file_bits(hub)
    assert any("copied through" in note for note in through.plan.notes)

    moeconv.fuse(tmp_path / "saved", tmp_path / "rehub", layout="hub")
    assert file_bits(tmp_path / "rehub") == file_bits(hub)
    moeconv.fuse(tmp_path / "fused", tmp_path / "rehub2", layout="hub")
    assert file_bits(tmp_path / "rehub2") == file_bits(hub)

    moeconv.unfuse(tmp_path / "fused", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(hub)


@pytest.mark.parametrize(("halves", "mixed"), [(1, "mixed-gate-up"), (2, "mixed-down")])
def test_qwen3_vl_where_a_tensor_is_square(halves: int, mixed: str, tmp_path: Path):
    """I is H/2 or H: one tensor is square, and transformers turns only the other one."""
    config = tiny_model("qwen3_vl_moe").config
    config.text_config.moe_intermediate_size = config.text_config.hidden_size * halves // 2
    torch.manual_seed(0)
    model = type(tiny_model("qwen3_vl_moe"))._from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "right")
    right = file_bits(tmp_path / "right")
    hub = turned(tmp_path / "right", tmp_path / "hub")
    # a mixed-up file of the kind that is out there: loaded from the Hub's form and saved again
    type(model).from_pretrained(hub).save_pretrained(tmp_path / "mixed")
    assert file_bits(tmp_path / "mixed") != right

    moeconv.fuse(hub, tmp_path / "from-hub")
    assert file_bits(tmp_path / "from-hub") == right
    assert_same_model(model, tmp_path / "from-hub")
    for form, layout in (("right", "fused"), ("mixed", mixed)):
        out = tmp_path / f"from-{form}"
        with pytest.raises(AmbiguousLayout) as refusal:
            moeconv.fuse(tmp_path / form, out)
        assert refusal.value.exit_code == 2
        assert not out.exists()
        moeconv.fuse(tmp_path / form, out, from_layout=layout)
        assert file_bits(out) == right
        assert moeconv.verify(out).ok
        moeconv.unfuse(out, tmp_path / f"{form}-back")
        assert tree_sha256(tmp_path / f"{form}-back") == tree_sha256(tmp_path / form)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "qwen3_5_moe", "dots1"])
def test_unfuse_of_a_file_that_transformers_fused(model_type: str, tmp_path: Path):
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "published")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    moeconv.unfuse(tmp_path / "fused", tmp_path / "out")
    assert file_bits(tmp_path / "out") == file_bits(tmp_path / "published")
    assert_same_model(model, tmp_path / "out")
    # its origin was fused: unfusing our own set gives that back, not something per expert
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(tmp_path / "fused")


@pytest.mark.parametrize(
    "model_type", ["mixtral", "nemotron_h", "kimi_k25", "qwen3_omni_moe_thinker"]
)
def test_transformers_own_names_are_read_too(model_type: str, tmp_path: Path):
    """A fused file has the module names of transformers; in some families they are others."""
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    moeconv.unfuse(tmp_path / "fused", tmp_path / "out", layout="per-expert")
    assert not any(name.endswith("gate_up_proj") for name in file_bits(tmp_path / "out"))
    assert_same_model(model, tmp_path / "out")
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(tmp_path / "fused")


FUSED_ONLY = (
    "aria_text",
    "diffusion_gemma",
    "gemma4",
    "granitemoe_swa",
    "hy_v4",
    "mistral4",
    "muse_spark_text",
    "openai_privacy_filter",
    "zaya",
)


@pytest.mark.parametrize("model_type", [*FUSED_ONLY, "llama4_text"])
def test_each_expert_of_a_fused_family_is_what_transformers_takes_it_for(
    model_type: str, tmp_path: Path
):
    """Which rows are gate and which are up, by what the module says of itself."""
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "src", save_original_format=False)
    moeconv.unfuse(tmp_path / "src", tmp_path / "out", layout="per-expert")
    files = file_tensors(tmp_path / "out")
    stacks = {n.rpartition(".")[0] for n in file_tensors(tmp_path / "src") if "gate_up_proj" in n}
    assert stacks
    for stack in stacks:
        module = model.get_submodule(stack)
        # Llama 4 is older than these attributes, and both
        turned_ = getattr(module, "is_transposed", True)
        halves = getattr(module, "is_concatenated", True)
        for e, joined in enumerate(module.gate_up_proj):
            gate_up = joined.T if turned_ else joined
            down = module.down_proj[e].T if turned_ else module.down_proj[e]
            gate, up = gate_up.chunk(2) if halves else (gate_up[::2], gate_up[1::2])
            assert torch.equal(files[f"{stack}.{e}.gate_proj.weight"], gate)
            assert torch.equal(files[f"{stack}.{e}.up_proj.weight"], up)
            assert torch.equal(files[f"{stack}.{e}.down_proj.weight"], down)


@pytest.mark.parametrize("model_type", ["gpt_oss", "granitemoe"])
def test_families_that_are_published_fused_only(model_type: str, tmp_path: Path):
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "src", save_original_format=False)
    with pytest.raises(NoPerExpertForm) as refusal:
        moeconv.unfuse(tmp_path / "src", tmp_path / "out")
    assert refusal.value.exit_code == 5
    assert "per-expert" in (refusal.value.fix or "")
    assert not (tmp_path / "out").exists()

    moeconv.unfuse(tmp_path / "src", tmp_path / "out", layout="per-expert")
    assert_each_expert_alone(model, tmp_path / "out")
    assert moeconv.verify(tmp_path / "out", level="source", source=tmp_path / "src").ok
    moeconv.fuse(tmp_path / "out", tmp_path / "fused")
    assert file_bits(tmp_path / "fused") == file_bits(tmp_path / "src")
    assert_same_model(model, tmp_path / "fused")
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(tmp_path / "src")


def assert_each_expert_alone(model: nn.Module, out: Path) -> None:
    """Every expert of the model's fused parameters, found again as [out, in] matrices."""
    files = file_tensors(out)
    params = dict(model.named_parameters())
    stacks = sorted(n.removesuffix(".gate_up_proj") for n in params if n.endswith("gate_up_proj"))
    assert stacks
    for stack in stacks:
        for e, gate_up in enumerate(params[f"{stack}.gate_up_proj"]):
            one = {p: files[f"{stack}.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")}
            down = params[f"{stack}.down_proj"][e]
            if f"{stack}.gate_up_proj_bias" in params:  # gpt-oss: turned, gate and up in turn
                assert torch.equal(one["gate"], gate_up.T[0::2])
                assert torch.equal(one["up"], gate_up.T[1::2])
                assert torch.equal(one["down"], down.T)
                bias = params[f"{stack}.gate_up_proj_bias"][e]
                assert torch.equal(files[f"{stack}.{e}.gate_proj.bias"], bias[0::2])
                assert torch.equal(files[f"{stack}.{e}.up_proj.bias"], bias[1::2])
            else:
                assert torch.equal(torch.cat([one["gate"], one["up"]]), gate_up)
                assert torch.equal(one["down"], down)
