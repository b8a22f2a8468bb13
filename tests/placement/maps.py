"""Random checkpoints' layers and placements for them; maps of four experts by row and by id."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import strategies as st

from moeconv.errors import BadPlacement
from moeconv.placement.base import RawMap
from moeconv.placement.model import MoeLayers, Placement, trivial
from moeconv.placement.resolve import resolve
from tests.badinput.checks import holds

# as DeepSeek-V3, in small: a dense layer, three MoE layers, one of MTP
SMALL = MoeLayers(experts=4, moe=(1, 2, 3), beyond=(4,), hidden=4)
DEEPSEEK = MoeLayers(256, tuple(range(3, 61)), (61,), 61)
PLAIN = MoeLayers(experts=4, moe=(1, 2), beyond=(), hidden=3)


A, B, C, D = (0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2), (2, 3, 0, 1)


def unfit(raw: RawMap, layers: MoeLayers, *facts: str) -> None:
    with pytest.raises(BadPlacement) as caught:
        resolve(raw, layers)
    holds(caught.value, BadPlacement, *facts)


def by_row(name: str, *rows: tuple[int, ...]) -> RawMap:
    return RawMap(name, "by row", tuple(enumerate(rows)), count=len(rows))


def by_id(name: str, *ids: int) -> RawMap:
    return RawMap(name, "by layer id", tuple((n, trivial(4, 4 + n)) for n in sorted(ids)))


def placed(layers: MoeLayers, *rows: tuple[int, ...]) -> Placement:
    """A placement whose rows are those of the first MoE layers."""
    return Placement(layers.experts, layers.all_moe[: len(rows)], rows)


@dataclass(frozen=True, slots=True)
class Case:
    """A placement that fits its layers and its ranks."""

    layers: MoeLayers
    placement: Placement
    ep_size: int


@st.composite
def rows(draw: st.DrawFn, experts: int, slots: int) -> tuple[int, ...]:
    """[P], every expert at least once."""
    more = draw(st.lists(st.integers(0, experts - 1), min_size=slots - experts, max_size=slots))
    return tuple(draw(st.permutations([*range(experts), *more[: slots - experts]])))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Dense layers anywhere, MTP layers behind the last, any number of redundant experts."""
    hidden = draw(st.integers(1, 7))
    moe = draw(st.sets(st.integers(0, hidden - 1), min_size=1))
    beyond = tuple(range(hidden, hidden + draw(st.integers(0, 2))))
    layers = MoeLayers(draw(st.integers(1, 6)), tuple(sorted(moe)), beyond, hidden)
    ep_size = draw(st.integers(1, 4))
    least = -(-layers.experts // ep_size)
    slots = ep_size * draw(st.integers(least, least + 2))
    covered = draw(st.sampled_from((layers.moe, layers.all_moe)))
    table = tuple(draw(rows(layers.experts, slots)) for _ in covered)
    return Case(layers, Placement(layers.experts, covered, table), ep_size)
