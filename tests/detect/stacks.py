"""Stacks of Mixtral's recipe, as the names and shapes in headers."""

from __future__ import annotations

from moeconv.checkpoint.header import StoredTensor
from moeconv.detect.match import MatchedStack, match_names
from moeconv.layout.recipe import Layout, Recipe
from moeconv.layout.shipped import shipped_recipe

STACK = "model.layers.0.block_sparse_moe.experts"
PROJECTIONS = {"w1": (4, 8), "w3": (4, 8), "w2": (8, 4)}  # gate, up [I, H]; down [H, I]


def recipe() -> Recipe:
    found = shipped_recipe("mixtral")
    assert found
    return found


def layout(name: str) -> Layout:
    found = recipe().layout(name)
    assert found
    return found


def stored(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> StoredTensor:
    return StoredTensor(name, dtype, shape, 0, 0, 64)


def experts(count: int, dtype: str = "BF16") -> list[StoredTensor]:
    """Per-expert weights of E experts with I = 4, H = 8."""
    return [
        stored(f"{STACK}.{expert}.{name}.weight", shape, dtype)
        for expert in range(count)
        for name, shape in PROJECTIONS.items()
    ]


def fused(gate_up: tuple[int, ...], down: tuple[int, ...]) -> list[StoredTensor]:
    return [stored(f"{STACK}.gate_up_proj", gate_up), stored(f"{STACK}.down_proj", down)]


def matched(tensors: list[StoredTensor]) -> MatchedStack:
    stacks, others = match_names(tensors, (recipe(),), ("model.safetensors",), owners={})
    assert not others
    (stack,) = stacks.values()
    return stack
