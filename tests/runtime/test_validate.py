"""Sets that break section 9 of the format, one rule each; their headers agree with their parts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moeconv.runtime
from moeconv.errors import BadManifest
from tests.runtime.handmade import (
    STACK,
    Fused,
    Named,
    checkpoint,
    numbers,
    write_set,
    write_whole,
)

Edit = Callable[[list[Named]], list[Named]]


def without(text: str) -> Edit:
    return lambda named: [n for n in named if text not in n.name]


def again(text: str, **expert: object) -> Edit:
    """One more like it under another name."""

    def edit(named: list[Named]) -> list[Named]:
        (one,) = (n for n in named if text in n.name)
        return [*named, replace(one, name="again", expert=replace(one.expert, **expert))]

    return edit


def other(text: str, **expert: object) -> Edit:
    return lambda named: [
        replace(n, expert=replace(n.expert, **expert)) if text in n.name else n for n in named
    ]


def halves(named: list[Named]) -> list[Named]:
    (one,) = (n for n in named if "scale" in n.name)
    parts = [(0, 3), (3, 5)]
    return [n for n in named if n is not one] + [
        replace(
            one,
            name=f"{one.name}{a}",
            value=one.value[a:b].clone(),
            expert=replace(one.expert, experts=tuple(range(a, b))),
        )
        for a, b in parts
    ]


def smaller(text: str) -> Edit:
    """Fewer bytes than its slots take."""
    return lambda named: [
        replace(n, value=n.value[:-1].clone()) if text in n.name else n for n in named
    ]


@pytest.mark.parametrize(
    ("per_expert", "rank", "edit", "text"),
    [
        (False, 1, without("down_proj"), "no weight of down"),
        (False, 1, other("_proj", component="bias"), "no weight of down, gate, up"),
        (False, 1, without("_proj"), "no weight of down, up"),
        (False, 1, again("gate_up", projections=("gate", "up")), "slot 3 appears twice"),
        (True, 1, without(".1.gate"), "slot 4"),
        (True, 1, without(".2.gate"), "slot 5 is missing in gate weight"),
        (True, 1, without(".0.gate"), "slot 3"),
        (True, 1, other(".2.up", projections=("gate",)), "twice"),
        (True, None, without(".3.down.scale"), "expert 3"),
        (True, None, without(".4.down.scale"), "expert 4 is missing"),
        (True, None, other(".3.down.scale", experts=(0,)), "expert 0 appears twice"),
        (True, None, other(".3.down.scale", local=None), "it lacks `local`"),
        (False, None, again("scale"), "expert 0 appears twice"),
        (False, None, halves, "must hold all 5 experts"),
        (
            False,
            None,
            other("scale", component="weight"),
            "is both in the common files and in those of ranks",
        ),
        (False, 1, other("down_proj", matrix=(4, 8)), "is not [3, 8, 4]"),
        (False, 1, other("down_proj", axes="E K"), "is not [3, 8, 4]"),
        (False, 1, other("down_proj", axes="K E O"), ""),
        (False, 1, smaller("down_proj"), "is not [2, 8, 4]"),
    ],
)
def test_a_rank(tmp_path: Path, per_expert: bool, rank: int | None, edit: Edit, text: str):
    def only(named: list[Named], whose: int | None) -> list[Named]:
        return edit(named) if whose == rank else named

    out = write_set(tmp_path / "set", checkpoint(per_expert=per_expert), edit=only)
    with pytest.raises(BadManifest) as caught:
        moeconv.runtime.open(out, ep_rank=1, ep_size=2)
    assert text in str(caught.value)
    if rank == 1:  # that is no matter of another rank
        moeconv.runtime.open(out, ep_rank=0, ep_size=2)


def test_a_gate_beside_gate_and_up(tmp_path: Path):
    made = checkpoint()
    made.experts[f"{STACK}.gate"] = Fused(STACK, numbers(5, 4, 8), "E O K", ("gate",))
    with pytest.raises(BadManifest, match="slot 3 appears twice or not at all in gate weight"):
        moeconv.runtime.open(write_set(tmp_path / "set", made), ep_rank=1, ep_size=2)


def test_weights_of_shared_experts_are_not_common(tmp_path: Path):
    made = checkpoint()
    made.experts[f"{STACK}.more"] = Fused(
        STACK, numbers(5, 8, 4), "E O K", ("down",), "more", small=True
    )
    with pytest.raises(BadManifest, match="only small tensors"):
        moeconv.runtime.open(write_set(tmp_path / "set", made), ep_rank=1, ep_size=2)


def test_a_stack_that_is_not_shared(tmp_path: Path):
    made = checkpoint()
    made.unplaced["mtp.down"] = Fused("mtp", numbers(3, 4, 2), "E O K", ("down",))
    with pytest.raises(BadManifest, match="no weight of up"):
        moeconv.runtime.open(write_set(tmp_path / "set", made), ep_rank=1, ep_size=2)


def test_a_whole_output(tmp_path: Path):
    made = checkpoint()
    del made.experts[f"{STACK}.gate_up_proj"]
    with pytest.raises(BadManifest, match="no weight of up"):
        moeconv.runtime.open(write_whole(tmp_path / "set", made), ep_rank=0, ep_size=1)


def test_replicas_on_one_rank(tmp_path: Path):
    def edit(named: list[Named], rank: int | None) -> list[Named]:
        if rank != 0:
            return named
        return [replace(n, digest=b"x") if ".1.up" in n.name else n for n in named]

    made = checkpoint(row=(2, 2, 0, 1, 3, 4), per_expert=True)
    moeconv.runtime.open(write_set(tmp_path / "good", made), ep_rank=0, ep_size=2)
    out = write_set(tmp_path / "set", made, edit=edit)
    with pytest.raises(BadManifest, match=r"two slots of `.*\.2\.up\.\w+` differ"):
        moeconv.runtime.open(out, ep_rank=0, ep_size=2)


def test_replace_needs_the_same_tensor_on_the_other_rank(tmp_path: Path):
    def edit(named: list[Named], rank: int | None) -> list[Named]:
        return [
            replace(n, value=n.value.to(torch.int32)) if rank == 1 and "down" in n.name else n
            for n in named
        ]

    out = write_set(tmp_path / "set", checkpoint(), edit=edit)
    shard = moeconv.runtime.open(out, ep_rank=0, ep_size=2)
    with pytest.raises(BadManifest, match="no matching tensor"):
        shard.replace([(2, 0, 3, 1, 4, 0)])
