"""The checkpoint of `moeconv demo`: a small Qwen3-MoE with the real names and rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

LAYERS: Final = 2
EXPERTS: Final = 16
HIDDEN: Final = 128
WIDTH: Final = 64
HEADS: Final = 4
HEAD: Final = 32
VOCABULARY: Final = 512
_SHARD_TENSORS: Final = 40

_CONFIG: Final[dict[str, object]] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": HIDDEN,
    "moe_intermediate_size": WIDTH,
    "intermediate_size": 4 * HIDDEN,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD,
    "vocab_size": VOCABULARY,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj"):
            shapes[f"{at}.self_attn.{name}.weight"] = (HEADS * HEAD, HIDDEN)
        shapes[f"{at}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD)
        for name in ("q_norm", "k_norm"):
            shapes[f"{at}.self_attn.{name}.weight"] = (HEAD,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}.{name}.weight"] = (HIDDEN,)
        shapes[f"{at}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name in ("gate_proj", "up_proj"):
                shapes[f"{at}.mlp.experts.{expert}.{name}.weight"] = (WIDTH, HIDDEN)
            shapes[f"{at}.mlp.experts.{expert}.down_proj.weight"] = (HIDDEN, WIDTH)
    return shapes


def make_checkpoint(folder: Path) -> None:
    """Write a sharded checkpoint with seeded random values into a new folder."""
    # the stock writer, so that the demo does not rest on our own code
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    tensors: dict[str, NDArray[np.float16]] = {
        name: random.standard_normal(shape, dtype=np.float32).astype(np.float16) * np.float16(0.02)
        for name, shape in _shapes().items()
    }
    names = list(tensors)
    shards = [names[i : i + _SHARD_TENSORS] for i in range(0, len(names), _SHARD_TENSORS)]
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: tensors[n] for n in shard}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(_CONFIG, indent=2) + "\n")
