"""Tiny checkpoints made by hand, byte by byte, so that a test can break exactly one thing.

A checkpoint is a dict of file name -> tensors; a tensor is (dtype, shape). E, I and H are 4, 8
and 24 unless a test needs others. Values depend on the tensor's name alone.
"""

import hashlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Final, TypeAlias

INDEX: Final = "model.safetensors.index.json"
SHARD: Final = "model.safetensors"
STACK: Final = "model.layers.0.mlp.experts"
E, I, H = 4, 8, 24  # noqa: E741 - the letters of the design

Spec: TypeAlias = tuple[str, tuple[int, ...]]
Tensors: TypeAlias = dict[str, Spec]
Json: TypeAlias = Mapping[str, object]

_BYTES: Final = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "F16": 2, "I64": 8, "U8": 1}


def nbytes(spec: Spec) -> int:
    """The bytes of a tensor."""
    return _BYTES[spec[0]] * prod(spec[1])


def values(name: str, spec: Spec) -> bytes:
    """Bytes that no other tensor has."""
    return hashlib.shake_128(name.encode("utf-8", "surrogatepass")).digest(nbytes(spec))


# --- models ------------------------------------------------------------------------------------
def qwen(
    experts: int = E,
    width: int = I,
    hidden: int = H,
    *,
    layers: int = 1,
    dtype: str = "BF16",
    block: int | None = None,
) -> Tensors:
    """A per-expert checkpoint of the large class; with `block`, each weight has a scale."""
    out: Tensors = {"model.embed_tokens.weight": ("BF16", (32, hidden))}
    for layer in range(layers):
        out[f"model.layers.{layer}.mlp.gate.weight"] = ("F32", (experts, hidden))
        for expert in range(experts):
            for name, rows, columns in (
                ("gate_proj", width, hidden),
                ("up_proj", width, hidden),
                ("down_proj", hidden, width),
            ):
                stem = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
                out[f"{stem}.weight"] = (dtype, (rows, columns))
                if block is not None:
                    scale = (-(-rows // block), -(-columns // block))
                    out[f"{stem}.weight_scale_inv"] = ("F32", scale)
    return out


def dense(*layers: int) -> Tensors:
    """What shows that these layers are there, without experts."""
    return {f"model.layers.{n}.input_layernorm.weight": ("BF16", (H,)) for n in layers}


def fused(gate_up: tuple[int, ...] = (E, 2 * I, H), down: tuple[int, ...] = (E, H, I)) -> Tensors:
    """A fused checkpoint with these two shapes."""
    return {
        "model.embed_tokens.weight": ("BF16", (32, H)),
        f"{STACK}.gate_up_proj": ("BF16", gate_up),
        f"{STACK}.down_proj": ("BF16", down),
    }


def config(
    model_type: str = "qwen3_moe", experts: int = E, width: int = I, hidden: int = H, **more: object
) -> dict[str, object]:
    """A config.json of the large class."""
    return {
        "model_type": model_type,
        "num_experts": experts,
        "moe_intermediate_size": width,
        "hidden_size": hidden,
        **more,
    }


def fp8_config(block: int, **more: Any) -> dict[str, object]:
    """A config.json that says the size of the scales' blocks."""
    return config(**more, quantization_config={"weight_block_size": [block, block]})


# --- bytes -------------------------------------------------------------------------------------
def entries(tensors: Tensors) -> dict[str, dict[str, object]]:
    """What a header says of tensors that lie one after the other."""
    out: dict[str, dict[str, object]] = {}
    at = 0
    for name, spec in tensors.items():
        end = at + nbytes(spec)
        out[name] = {"dtype": spec[0], "shape": list(spec[1]), "data_offsets": [at, end]}
        at = end
    return out


def framed(text: bytes | str | Json) -> bytes:
    """The length and the JSON of a header; a text is taken as it is, right or wrong."""
    if not isinstance(text, bytes | str):
        text = json.dumps(text)
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw


def shard_bytes(tensors: Tensors) -> bytes:
    """A whole safetensors file."""
    return framed(entries(tensors)) + b"".join(values(*item) for item in tensors.items())


def index_doc(files: Mapping[str, Tensors]) -> dict[str, object]:
    """A true index of these files."""
    total = sum(nbytes(spec) for tensors in files.values() for spec in tensors.values())
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def two_files(tensors: Tensors) -> dict[str, Tensors]:
    """The tensors in two shards, cut in the middle."""
    names = list(tensors)
    half = len(names) // 2
    return {
        "model-00001-of-00002.safetensors": {n: tensors[n] for n in names[:half]},
        "model-00002-of-00002.safetensors": {n: tensors[n] for n in names[half:]},
    }


def write(
    root: Path,
    files: Mapping[str, Tensors] | Mapping[str, Spec],
    *,
    config: Json | None = None,
    index: Json | bytes | bool = True,
) -> Path:
    """Write a checkpoint with sidecars. Plain tensors are one file, which needs no index.

    config: by default that of `qwen()`; {} leaves the file out.
    """
    one_file = any(isinstance(spec, tuple) for spec in files.values())
    shards: Mapping[str, Tensors] = {SHARD: files} if one_file else files  # type: ignore[dict-item, assignment]
    root.mkdir(parents=True)
    for name, tensors in shards.items():
        (root / name).parent.mkdir(exist_ok=True)  # names may have a folder
        (root / name).write_bytes(shard_bytes(tensors))
    if index is True and not one_file:
        index = index_doc(shards)
    if not isinstance(index, bool):
        raw = index if isinstance(index, bytes) else json.dumps(index).encode()
        (root / INDEX).write_bytes(raw)
    said = _DEFAULT_CONFIG if config is None else config
    if said:
        (root / "config.json").write_text(json.dumps(said))
    (root / "tokenizer.json").write_text('{"version": "1.0"}')
    return root


_DEFAULT_CONFIG = config()


# --- one thing wrong ---------------------------------------------------------------------------
def without(tensors: Tensors, *parts: str, but: str = "\0") -> Tensors:
    """The tensors whose names hold none of these texts, and those that hold `but`."""
    return {n: s for n, s in tensors.items() if but in n or not any(p in n for p in parts)}


def changed(tensors: Tensors, **specs: object) -> Tensors:
    """Every tensor whose name holds `part`, with the dtype or shape given."""
    part, dtype, shape = (specs.get(key) for key in ("part", "dtype", "shape"))
    return {
        n: ((dtype or spec[0], shape or spec[1]) if str(part) in n else spec)  # type: ignore[misc]
        for n, spec in tensors.items()
    }


def added(
    tensors: Tensors, name: str, dtype: str = "BF16", shape: tuple[int, ...] = (4,)
) -> Tensors:
    """The tensors and one more."""
    return {**tensors, name: (dtype, shape)}
