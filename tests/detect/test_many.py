"""Checkpoints with very much that is wrong: what is kept is bounded, what is done is linear."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import pytest

import moeconv.detect.detect
from moeconv.checkpoint.config import Config
from moeconv.checkpoint.header import StoredTensor
from moeconv.detect.detect import MAX_PROBLEMS, Detection, detect
from moeconv.errors import TooManyStacks
from moeconv.layout.shipped import recipes_for
from tests.badinput.checks import holds

RECIPES = recipes_for(model_type="qwen3_moe", architectures=())
CONFIG = Config({"model_type": "qwen3_moe"}, present=True)


def stored(name: str, *shape: int) -> StoredTensor:
    return StoredTensor(name, "BF16", shape, 0, 0, 64)


def stack(name: str, *projections: str) -> list[StoredTensor]:
    """One expert."""
    shapes = {"gate": (4, 8), "up": (4, 8), "down": (8, 4)}
    return [
        stored(f"{name}.mlp.experts.0.{p}_proj.weight", *shapes[p])
        for p in projections or tuple(shapes)
    ]


def broken(count: int) -> list[StoredTensor]:
    return [t for n in range(count) for t in stack(f"model.layers.{n}", "gate", "down")]


def models(count: int) -> list[StoredTensor]:
    """Models side by side, each with a router of its own in two layers, and experts in one."""
    return [
        t
        for n in range(count)
        for t in (
            *stack(f"m{n}.layers.0"),
            *(stored(f"m{n}.layers.{layer}.mlp.gate.weight", 1, 8) for layer in range(2)),
        )
    ]


def found(tensors: list[StoredTensor]) -> Detection:
    return detect(tuple(tensors), CONFIG, RECIPES, files=("model.safetensors",))


def calls(tensors: list[StoredTensor]) -> int:
    """How many functions were called for them: no clock, so no other process."""
    count = 0

    def counting(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    before = sys.getprofile()
    sys.setprofile(counting)
    try:
        found(tensors)
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("make", [broken, models])
def test_the_first_problems_are_kept_and_all_are_counted(
    make: Callable[[int], list[StoredTensor]],
) -> None:
    few, many = found(make(MAX_PROBLEMS)), found(make(3 * MAX_PROBLEMS))
    assert len(few.problems) == len(many.problems) == MAX_PROBLEMS
    assert "in all" not in str(few.problems[0])
    assert "300 problems in all; the first 100 are listed" in str(many.problems[0])


@pytest.mark.parametrize("make", [broken, models])
def test_four_times_as_much_is_four_times_the_work(
    make: Callable[[int], list[StoredTensor]],
) -> None:
    found(make(10))  # imports and memos
    assert calls(make(160)) < 6 * calls(make(40))


def test_ids_far_apart_are_not_listed_one_by_one() -> None:
    names = (f"model.layers.0.mlp.experts.{n}.gate_proj.weight" for n in (0, 9_999_999_999))
    problem = found([stored(name, 4, 8) for name in names]).problems[0]
    assert "9,999,999,998" not in str(problem).partition("missing")[0]
    assert "and 9,999,999,992 more" in str(problem)


def one_expert_each(count: int) -> list[StoredTensor]:
    """Fused stacks of one expert: as many stacks as a header can name."""
    shapes = {"gate_up_proj": (1, 8, 8), "down_proj": (1, 8, 4)}
    return [
        stored(f"model.layers.{n}.mlp.experts.{name}", *shape)
        for n in range(count)
        for name, shape in shapes.items()
    ]


def test_a_stack_costs_little() -> None:
    found(one_expert_each(10))
    a_stack = (calls(one_expert_each(80)) - calls(one_expert_each(40))) / 40
    assert a_stack < 5000  # 8,700 when each looked up config.json anew


def test_more_stacks_than_an_output_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not found(one_expert_each(4)).problems
    monkeypatch.setattr(moeconv.detect.detect, "MAX_STACKS", 3)
    (problem,) = found(one_expert_each(4)).problems
    holds(problem, TooManyStacks, "4 expert stacks", "`model.safetensors`")
