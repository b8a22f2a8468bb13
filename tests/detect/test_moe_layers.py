"""Which layers of a checkpoint a map can speak of: from its stacks and its config.json."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeconv.api.open import open_source
from moeconv.detect.moe_layers import layers_of
from moeconv.errors import ConfigMismatch, NoExperts
from moeconv.placement.model import MoeLayers
from tests.badinput import builders
from tests.badinput.checks import holds

TENSORS = builders.qwen(layers=5)


def found(
    root: Path, tensors: builders.Tensors, **config: object
) -> tuple[MoeLayers, tuple[str, ...]]:
    said = builders.config(**config)  # type: ignore[arg-type]
    opened = open_source(builders.write(root / "src", tensors, config=said))
    return layers_of(opened.detection.checked().stacks, opened.checkpoint.config)


def stack(layer: int, prefix: str = "model") -> str:
    return f"{prefix}.layers.{layer}.mlp.experts"


def renamed(tensors: builders.Tensors, prefix: str) -> builders.Tensors:
    return {n.replace("model.", f"{prefix}.", 1): s for n, s in tensors.items() if "layers" in n}


def test_dense_layers_and_those_beyond(tmp_path: Path):
    sparse = builders.without(TENSORS, "layers.0.") | builders.dense(0)
    layers, names = found(tmp_path, sparse, num_hidden_layers=4)
    assert layers == MoeLayers(builders.E, (1, 2, 3), (4,), 4)
    assert names == tuple(stack(n) for n in (1, 2, 3, 4))


def test_layers_are_in_order_of_numbers(tmp_path: Path):
    layers, names = found(tmp_path, builders.qwen(layers=11), num_hidden_layers=11)
    assert layers.moe == tuple(range(11))
    assert names[9:] == (stack(9), stack(10))


def test_a_number_of_layers_that_is_not_stated(tmp_path: Path):
    layers, _ = found(tmp_path, TENSORS)
    assert layers == MoeLayers(builders.E, (0, 1, 2, 3, 4), (), 5, stated=False)


def test_the_number_of_layers_is_in_the_section_of_the_stacks(tmp_path: Path):
    layers, _ = found(tmp_path, TENSORS, num_hidden_layers=99, text_config={"num_hidden_layers": 3})
    assert (layers.moe, layers.beyond) == ((0, 1, 2), (3, 4))


def test_the_main_kind_is_the_most_numerous(tmp_path: Path):
    mtp = renamed(builders.qwen(layers=2), "mtp")
    layers, names = found(tmp_path, {**mtp, **TENSORS}, num_hidden_layers=5)
    assert layers.moe == (0, 1, 2, 3, 4)
    assert names == tuple(stack(n) for n in range(5))


def test_of_two_kinds_of_one_number_the_larger_is_the_main_one(tmp_path: Path):
    small = renamed(builders.qwen(layers=5, dtype="F8_E4M3"), "talker")
    _, names = found(tmp_path, {**small, **TENSORS}, num_hidden_layers=5)
    assert names[0] == stack(0)


def test_no_experts(tmp_path: Path):
    dense = builders.without(TENSORS, "experts", "gate.")
    with pytest.raises(NoExperts) as caught:
        found(tmp_path, dense, num_hidden_layers=5)
    holds(caught.value, NoExperts)


def test_a_config_of_fewer_layers_than_any_with_experts(tmp_path: Path):
    sparse = builders.without(TENSORS, "layers.0.", "layers.1.") | builders.dense(0, 1)
    with pytest.raises(ConfigMismatch) as caught:
        found(tmp_path, sparse, num_hidden_layers=2)
    holds(caught.value, ConfigMismatch, "it states 2", "2-4")
