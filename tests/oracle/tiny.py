"""Tiny Mixture-of-Experts models, built by transformers from the configs in tests/data/families."""

import json
import math
import re
import zlib
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

FAMILIES = Path(__file__).resolve().parents[1] / "data" / "families"
MODEL_TYPES: tuple[str, ...] = tuple(sorted(path.stem for path in FAMILIES.glob("*.json")))

# Types that cannot be a case here, with the reason.
IMPOSSIBLE: dict[str, str] = {
    "cosmos3_omni": "has no routed experts: its language model is dense",
    "vitpose_backbone": "has no routed experts: the caller says which head an image is for",
    "doge": "has no routed experts: its MoE is an embedding, picked by product keys",
}
# Types whose tiny models also run: logits are compared, too.
SPEAKING = frozenset(
    [
        "axk1", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_ocr2", "deepseek_v2",
        "deepseek_v3", "deepseek_v32", "dots1", "dots3_note_text", "ernie4_5_moe",
        "flex_olmo", "flint", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa",
        "gpt_oss", "granitemoe", "hunyuan_v1_moe", "kimi_k25", "kolibri1", "mellum",
        "mimo_v2_flash", "mixtral", "nemotron_h", "olmoe", "qwen2_moe", "qwen3_5_moe",
        "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe",
        "qwen3_omni_moe_thinker", "qwen3_vl_moe", "qwen4_exp", "qwen4_exp_text",
    ]
)  # fmt: skip

# The low ids are padding, start and end in some configs.
_FIRST_PLAIN_ID = 10


def tiny_model(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """Build the tiny model of a family, in eval mode, every saved float tensor random.

    BF16, and F32 where the family insists on it (routers, mostly): the dtypes that
    `from_pretrained` gives, so that a saved and reloaded model has the same bits and logits.
    A tensor's values depend on its name and `seed` alone.
    """
    of = family(model_type)
    config = transformers.CONFIG_MAPPING[model_type].from_dict(_runnable(of["config"]))
    model_class: type[PreTrainedModel] = getattr(transformers, of["class"])
    model: PreTrainedModel = model_class._from_config(config, dtype=torch.bfloat16)
    keep_in_float32(model)
    randomize(model, seed)
    return model.eval()


def inputs(model: nn.Module, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids [2, 12]: text only, also for a multimodal model."""
    config: Any = _speaker(model).config
    vocabulary: int = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(_FIRST_PLAIN_ID, vocabulary, (2, 12), generator=generator)
    return {"input_ids": ids}


def logits(model: nn.Module, *, seed: int = 0) -> torch.Tensor:
    """Logits [2, 12, vocabulary] of `model` for `inputs(model)`."""
    with torch.inference_mode():
        output: torch.Tensor = _speaker(model)(**inputs(model, seed=seed), use_cache=False).logits
    return output


def _speaker(model: nn.Module) -> nn.Module:
    """The part with a forward: the whole of Qwen3-Omni has none, its thinker has."""
    thinker = getattr(model, "thinker", None)
    return thinker if isinstance(thinker, nn.Module) else model


def family(model_type: str) -> dict[str, Any]:
    """The tiny config and the class of a model type."""
    if model_type not in MODEL_TYPES:
        raise LookupError(f"no tiny model for {model_type!r}; there are {', '.join(MODEL_TYPES)}")
    path = FAMILIES / f"{model_type}.json"
    found: dict[str, Any] = json.loads(path.read_bytes(), object_hook=_decode)
    return found


def _decode(item: dict[str, object]) -> object:
    """JSON has no infinity: the configs write {"__float__": "Infinity"}."""
    return float(str(item["__float__"])) if item.keys() == {"__float__"} else item


def _runnable(config: dict[str, Any]) -> dict[str, Any]:
    """Mend what lets a model build but not run, or run but not be saved as it is published."""
    text = config.get("text_config", config)
    if "kv_lora_rank" in text:
        # latent attention expands keys to all heads: a second repetition would not fit
        text["num_key_value_heads"] = text["num_attention_heads"]
    if "num_experts_per_tok" in text and text["num_experts_per_tok"] is None:
        text["num_experts_per_tok"] = 2
    if config["model_type"] == "glm4v_moe":
        # the default is made for the real head size
        text["rope_parameters"]["mrope_section"] = [1, 1, 0]
    if config["model_type"] == "longcat_flash":
        # transformers would save gate and up of experts that pass their input on, but no down
        config["zero_expert_num"] = 0
    return config


def keep_in_float32(model: nn.Module) -> None:
    """Upcast what `from_pretrained` upcasts; building a model from its config does not."""
    patterns: set[str] = getattr(model, "_keep_in_fp32_modules_strict", None) or set()
    strict = [re.compile(pattern.replace("*", ".*")) for pattern in sorted(patterns)]
    saved = model.state_dict().keys()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in saved and any(pattern.search(name) for pattern in strict):
            tensor.data = tensor.data.float()


def randomize(model: nn.Module, seed: int) -> None:
    """Overwrite all float parameters and saved float buffers in place."""
    seen: set[int] = set()
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.is_floating_point() or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        tensor.copy_(_values(name, tensor.shape, seed))


def _values(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Values that keep activations near 1: matrices by fan-in, scales around 1, small biases."""
    # torch's generator takes 32 bits of a seed and drops the rest
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    if len(shape) > 1:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    if name.endswith("bias"):
        return torch.randn(shape, generator=generator) / 10
    return torch.rand(shape, generator=generator) + 0.5
