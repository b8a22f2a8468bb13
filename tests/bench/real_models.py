"""Real models, tensor by tensor: names, dtypes and shapes of what is published, and config.json."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

QWEN3_30B_LAYERS: Final = 48
# safetensors writes the tensors of a file by dtype in this order, then by name.
ITEM_BYTES: Final = {"U8": 1, "F32": 4, "BF16": 2, "F8_E4M3": 1}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named tensor without its data."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint to be: its tensors in the order of the modules, which fills the shards."""

    config: dict[str, object]
    tensors: Callable[[], Iterator[Tensor]]
    count_digits: int = 5
    """Digits of the number of files in a file name; DeepSeek writes six."""


def qwen3_30b(layers: int) -> Model:
    def bf16(name: str, *shape: int) -> Tensor:
        return Tensor(f"{name}.weight", "BF16", shape)

    def tensors() -> Iterator[Tensor]:
        yield bf16("model.embed_tokens", 151936, 2048)
        for layer in range(layers):
            p = f"model.layers.{layer}"
            yield bf16(f"{p}.self_attn.q_proj", 4096, 2048)
            yield bf16(f"{p}.self_attn.k_proj", 512, 2048)
            yield bf16(f"{p}.self_attn.v_proj", 512, 2048)
            yield bf16(f"{p}.self_attn.o_proj", 2048, 4096)
            yield bf16(f"{p}.self_attn.q_norm", 128)
            yield bf16(f"{p}.self_attn.k_norm", 128)
            yield bf16(f"{p}.mlp.gate", 128, 2048)
            for expert in range(128):
                yield bf16(f"{p}.mlp.experts.{expert}.gate_proj", 768, 2048)
                yield bf16(f"{p}.mlp.experts.{expert}.up_proj", 768, 2048)
                yield bf16(f"{p}.mlp.experts.{expert}.down_proj", 2048, 768)
            yield bf16(f"{p}.input_layernorm", 2048)
            yield bf16(f"{p}.post_attention_layernorm", 2048)
        yield bf16("model.norm", 2048)
        yield bf16("lm_head", 151936, 2048)

    return Model({**_QWEN3_30B_CONFIG, "num_hidden_layers": layers}, tensors)


@dataclass(frozen=True, slots=True)
class _DeepSeek:
    """What differs between the models of DeepSeek-V3's architecture."""

    experts: int
    heads: int
    dense: int
    vocabulary: int
    mtp: int | None  # the MTP layer, where it is published
    rotary: bool  # whether the layers store their rotary frequencies
    config: dict[str, object]


def _deepseek(which: _DeepSeek) -> Model:
    vocabulary, heads = which.vocabulary, which.heads

    def bf16(name: str, *shape: int) -> Tensor:
        return Tensor(f"{name}.weight", "BF16", shape)

    def fp8(name: str, out: int, into: int) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", "F8_E4M3", (out, into))
        yield Tensor(f"{name}.weight_scale_inv", "F32", (-(-out // 128), -(-into // 128)))

    def mlp(name: str, width: int) -> Iterator[Tensor]:
        yield from fp8(f"{name}.gate_proj", width, 7168)
        yield from fp8(f"{name}.up_proj", width, 7168)
        yield from fp8(f"{name}.down_proj", 7168, width)

    def layer_tensors(layer: int) -> Iterator[Tensor]:
        p = f"model.layers.{layer}"
        if layer == which.mtp:
            yield bf16(f"{p}.embed_tokens", vocabulary, 7168)
            yield bf16(f"{p}.enorm", 7168)
            yield bf16(f"{p}.hnorm", 7168)
            yield bf16(f"{p}.eh_proj", 7168, 14336)
        yield from fp8(f"{p}.self_attn.q_a_proj", 1536, 7168)
        yield bf16(f"{p}.self_attn.q_a_layernorm", 1536)
        yield from fp8(f"{p}.self_attn.q_b_proj", 192 * heads, 1536)
        yield from fp8(f"{p}.self_attn.kv_a_proj_with_mqa", 576, 7168)
        yield bf16(f"{p}.self_attn.kv_a_layernorm", 512)
        yield from fp8(f"{p}.self_attn.kv_b_proj", 256 * heads, 512)
        yield from fp8(f"{p}.self_attn.o_proj", 7168, 128 * heads)
        if which.rotary:
            yield Tensor(f"{p}.self_attn.rotary_emb.inv_freq", "F32", (32,))
        if layer < which.dense:
            yield from mlp(f"{p}.mlp", 18432)
        else:
            yield bf16(f"{p}.mlp.gate", which.experts, 7168)
            yield Tensor(f"{p}.mlp.gate.e_score_correction_bias", "F32", (which.experts,))
            yield from mlp(f"{p}.mlp.shared_experts", 2048)
            for expert in range(which.experts):
                yield from mlp(f"{p}.mlp.experts.{expert}", 2048)
        yield bf16(f"{p}.input_layernorm", 7168)
        yield bf16(f"{p}.post_attention_layernorm", 7168)
        if layer == which.mtp:
            yield bf16(f"{p}.shared_head.norm", 7168)
            yield bf16(f"{p}.shared_head.head", vocabulary, 7168)

    def tensors() -> Iterator[Tensor]:
        yield bf16("model.embed_tokens", vocabulary, 7168)
        for layer in range(_DEEPSEEK_LAYERS + (which.mtp is not None)):
            yield from layer_tensors(layer)
        yield bf16("model.norm", 7168)
        yield bf16("lm_head", vocabulary, 7168)

    return Model(which.config, tensors, count_digits=6)


def _deepseek_v3() -> Model:
    return _deepseek(_DeepSeek(256, 128, 3, 129280, 61, rotary=False, config=_DEEPSEEK_V3_CONFIG))


def _kimi_k2() -> Model:
    """Kimi-K2: 139,644 tensors, 1 TB. Source: its config.json and index on the Hub."""
    config = {
        **_DEEPSEEK_V3_CONFIG,
        "first_k_dense_replace": 1,
        "model_type": "kimi_k2",
        "n_group": 1,
        "n_routed_experts": 384,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0,
        "routed_scaling_factor": 2.827,
        "topk_group": 1,
        "vocab_size": 163840,
    }
    return _deepseek(_DeepSeek(384, 64, 1, 163840, None, rotary=True, config=config))


def _kimi_k3() -> Model:
    """Kimi-K3: 497,220 tensors, 1.56 TB. Its experts as published; the rest fills up the number."""
    layers, hidden, latent, width = 93, 7168, 3584, 3072

    def packed(name: str, out: int, into: int) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight_packed", "U8", (out, into // 2))
        yield Tensor(f"{name}.weight_scale", "U8", (out, into // 32))

    def layer_tensors(layer: int) -> Iterator[Tensor]:
        p = f"language_model.model.layers.{layer}"
        for n in range(28):
            yield Tensor(f"{p}.self_attn.part{n}.weight", "BF16", (hidden, 512))
        for expert in range(896) if layer else ():
            e = f"{p}.block_sparse_moe.experts.{expert}"
            yield from packed(f"{e}.w1", width, latent)
            yield from packed(f"{e}.w3", width, latent)
            yield from packed(f"{e}.w2", latent, width)

    def tensors() -> Iterator[Tensor]:
        for layer in range(layers):
            yield from layer_tensors(layer)
        for n in range(24):
            yield Tensor(f"vision_tower.part{n}.weight", "BF16", (hidden, 512))

    config: dict[str, object] = {
        "architectures": ["KimiK3ForConditionalGeneration"],
        "model_type": "kimi_k3",
        "text_config": {
            "hidden_size": hidden,
            "moe_intermediate_size": width,
            "num_experts": 896,
            "num_hidden_layers": layers,
        },
    }
    return Model(config, tensors, count_digits=6)


_DEEPSEEK_LAYERS = 61

PHANTOMS: dict[str, Callable[[], Model]] = {
    "deepseek-v3": _deepseek_v3,
    "kimi-k2": _kimi_k2,
    "kimi-k3": _kimi_k3,
    "qwen3-30b-a3b": lambda: qwen3_30b(QWEN3_30B_LAYERS),
}

_QWEN3_30B_CONFIG: dict[str, object] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

_DEEPSEEK_V3_CONFIG: dict[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
