"""Models and safetensors files as plain bytes, read with the stock libraries only."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn


class Bits(NamedTuple):
    """A tensor for comparison: NaNs, signs of zero and dtypes count."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def bits(tensor: torch.Tensor) -> Bits:
    """All bits of a tensor."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return Bits(str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())


def model_bits(model: nn.Module) -> dict[str, Bits]:
    """Every parameter and buffer, those that are never saved too."""
    return {n: bits(t) for n, t in chain(model.named_parameters(), model.named_buffers())}


def file_tensors(root: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory's safetensors files."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(root.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names: Iterable[str] = file.keys()
            for name in names:
                assert name not in found, f"{name} is in two files"
                found[name] = file.get_tensor(name)
    return found


def file_bits(root: Path) -> dict[str, Bits]:
    """Every tensor of a directory's safetensors files, as bits."""
    return {name: bits(tensor) for name, tensor in file_tensors(root).items()}


def loaded(model: nn.Module, root: Path) -> nn.Module:
    """What transformers loads from `root`; every name must find its place."""
    model_class: Any = type(model)
    twin, info = model_class.from_pretrained(root, output_loading_info=True)
    assert not any(info.values()), info
    result: nn.Module = twin.eval()
    return result
