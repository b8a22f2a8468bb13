"""Models of transformers: built on meta, loaded from a set, the same logits to the bit."""

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import moeconv.runtime
from moeconv.errors import DoesNotFit
from tests.runtime.handmade import Fused, Made, same, write_set

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 40,
    "num_experts_per_tok": 2,
}


def qwen(*, tied: bool) -> PreTrainedModel:
    """A tiny Qwen3-MoE."""
    config = Qwen3MoeConfig(**SIZES, num_experts=6, head_dim=8, tie_word_embeddings=tied)
    return Qwen3MoeForCausalLM(config)


def deepseek(*, tied: bool) -> PreTrainedModel:
    """A tiny DeepSeek-V3: a dense layer first, correction biases as persistent buffers."""
    config = DeepseekV3Config(
        **SIZES, n_routed_experts=6, n_group=2, topk_group=1, first_k_dense_replace=1,
        kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def made_of(model: PreTrainedModel, *, tied: bool) -> Made:
    """All of a model in one rank's trivial placement."""
    made = Made({}, {}, {}, 1)
    for name, value in model.state_dict().items():
        stack, _, last = name.rpartition(".")
        if last in ("gate_up_proj", "down_proj") and value.dim() == 3:
            axes, projections = (
                ("E (G O) K", ("gate", "up")) if last == "gate_up_proj" else ("E O K", ("down",))
            )
            made.experts[name] = Fused(stack, value.clone(), axes, projections)
            made.rows[stack] = tuple(range(6))
        elif not (tied and name == "lm_head.weight"):
            made.common[name] = value.clone()
    return made


@pytest.mark.parametrize("build", [qwen, deepseek])
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_logits(tmp_path: Path, build: object, tied: bool):
    torch.manual_seed(0)
    model = build(tied=tied).eval()
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.uniform_(-0.1, 0.1)
    out = write_set(tmp_path / "set", made_of(model, tied=tied))
    shard = moeconv.runtime.open(out, ep_rank=0, ep_size=1)
    with init_empty_weights(include_buffers=False):
        empty = build(tied=tied)
    if tied:
        empty.lm_head.weight = torch.nn.Parameter(empty.lm_head.weight.clone())
        with pytest.raises(DoesNotFit) as caught:
            shard.load_into(empty)
        assert "tie_weights" in str(caught.value)
        empty.tie_weights()
    report = shard.load_into(empty)
    assert report.tied == (("lm_head.weight",) if tied else ())
    assert not any(t.is_meta for t in [*empty.parameters(), *empty.buffers()])
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert same(empty.eval()(ids).logits, model(ids).logits)
