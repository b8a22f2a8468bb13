"""A checkpoint whose quantization_config names experts, as the tests of lists have it."""

import json
from pathlib import Path

from tests.helpers import Spec, write_checkpoint

STACK = "model.layers.{}.mlp.experts"


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def modules(layer: int, *projections: str) -> list[str]:
    return [f"{STACK.format(layer)}.{e}.{p}" for e in range(3) for p in projections or PROJECTIONS]


def checkpoint(root: Path, quantization: dict[str, object]) -> Path:
    """Two layers of three experts; config.json as no program of ours would write it."""
    tensors: dict[str, Spec] = {
        f"{STACK.format(layer)}.{e}.{p}.weight": ("BF16", (2, 2), bytes([layer * 9 + e] * 8))
        for layer in (0, 1)
        for e in range(3)
        for p in PROJECTIONS
    }
    write_checkpoint(root, tensors, {})
    text = json.dumps(quantization, indent=3)
    (root / "config.json").write_text(
        '{ "model_type":"qwen3_moe",\n\t"rms_norm_eps": 1e-06, "limit": Infinity,\n'
        f'"quantization_config" : {text} , "x": [ "a" ]}}'
    )
    return root


def config_of(root: Path) -> dict[str, list[str]]:
    """The lists of its quantization_config."""
    config = json.loads((root / "config.json").read_bytes())
    found: dict[str, list[str]] = config["quantization_config"]
    return found


def lists(place: str, *texts: str) -> dict[str, object]:
    """A quantization_config with a list, or with an object that has these keys."""
    keys = place in {"dynamic", "quantized_layers"}
    return {place: {t: {"bits": 4} for t in texts} if keys else list(texts)}
