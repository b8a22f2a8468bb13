"""A tiny MoE with the parameter names of the hand-made sets."""

import torch
from torch import nn

from moeconv.runtime import Shard


class Experts(nn.Module):
    """Fused experts of one rank; a scale for each, as a persistent buffer."""

    def __init__(self, slots: int, width: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(slots, 2 * width, hidden, dtype=dtype))
        self.down_proj = nn.Parameter(torch.zeros(slots, hidden, width, dtype=dtype))
        self.register_buffer("down_proj_scale", torch.zeros(slots))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All slots on all tokens, summed."""
        gate, up = torch.einsum("th,soh->sto", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("sti,shi->th", torch.nn.functional.silu(gate) * up, self.down_proj)


class Layer(nn.Module):
    """One MoE layer; its router is a weight like any other."""

    def __init__(
        self, experts: int, slots: int, width: int, hidden: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.gate = nn.Linear(hidden, experts, bias=False, dtype=dtype)
        self.mlp.experts = Experts(slots, width, hidden, dtype)


class TinyMoe(nn.Module):
    """`model.embed`, `model.layers.N.mlp.gate`, `model.layers.N.mlp.experts`."""

    def __init__(
        self,
        slots: int,
        *,
        experts: int = 5,
        width: int = 4,
        hidden: int = 8,
        layers: int = 1,
        vocabulary: int = 7,
        dtype: torch.dtype = torch.float32,
        head: bool = False,
    ) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed = nn.Embedding(vocabulary, hidden, dtype=dtype)
        self.model.layers = nn.ModuleList(
            Layer(experts, slots, width, hidden, dtype) for _ in range(layers)
        )
        self.register_buffer("inv_freq", torch.full((4,), 0.5), persistent=False)
        if head:
            self.head = nn.Linear(hidden, vocabulary, bias=False, dtype=dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits, or hidden states without a head."""
        x = self.model.embed(ids)
        for layer in self.model.layers:
            x = x + layer.mlp.experts(x) * layer.mlp.gate(x).softmax(-1)[:, :1]
        return self.head(x) if hasattr(self, "head") else x


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, as plain tensors."""
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def on_meta(model: nn.Module) -> nn.Module:
    """Parameters on meta, ties kept, buffers real."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            new = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
            module._parameters[name] = moved.setdefault(id(p), new)
    return model


def like(shard: Shard) -> nn.Module:
    """A model with the tensors of a shard as parameters, all zeros."""
    root = nn.Module()
    for name, value in shard.load().items():
        *path, leaf = name.split(".")
        module = root
        for word in path:
            if word not in module._modules:
                module.add_module(word, nn.Module())
            module = module.get_submodule(word)
        module.register_parameter(leaf, nn.Parameter(torch.zeros_like(value), requires_grad=False))
    return root
