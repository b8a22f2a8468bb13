"""Which layers a map's rows are of, and which a map of single layers speaks of."""

from __future__ import annotations

import pytest

from moeconv.placement.ascend import ASCEND
from moeconv.placement.base import ALIKE
from moeconv.placement.eplb import EPLB
from moeconv.placement.formats import parse_map
from moeconv.placement.model import MoeLayers, check
from moeconv.placement.resolve import resolve
from moeconv.placement.sglang import SGLANG
from moeconv.placement.trtllm import TRTLLM
from moeconv.placement.vllm import VLLM
from tests.placement.maps import (
    DEEPSEEK,
    SMALL,
    A,
    B,
    C,
    by_id,
    by_row,
    placed,
    unfit,
)


def read(name: str, count: int, layers: MoeLayers = DEEPSEEK) -> tuple[dict[int, int], str]:
    """The row number that each layer got (rows carry theirs in their length), and the sentence."""
    found, assumed = resolve(by_row(name, *((0,) * n for n in range(count))), layers)
    return dict(zip(found.layers, map(len, found.physical_to_logical), strict=True)), assumed


@pytest.mark.parametrize("name", [SGLANG, VLLM, EPLB])
def test_the_number_of_rows_decides_the_layers(name: str):
    ids, assumed = read(name, 61)
    assert ids == {n: n for n in range(3, 61)}
    assert assumed == (
        "61 rows: one for each hidden layer; "
        "rows 3-60 are the MoE layers, the dense ones were ignored"
    )
    ids, assumed = read(name, 58)
    assert ids == {n: n - 3 for n in range(3, 61)}
    assert assumed == "58 rows: one for each MoE layer, which are layers 3-60"
    ids, assumed = read(name, 59)
    assert ids == {n: n - 3 for n in range(3, 62)}
    assert assumed == "59 rows: one for each MoE layer and MTP layer, which are layers 3-61"
    ids, assumed = read(name, 62)
    assert ids == {n: n for n in range(3, 62)}
    assert assumed.startswith("62 rows: one for each hidden layer and MTP layer; rows 3-61 are")


def test_each_system_reads_its_own_way_where_two_fit():
    # 4 hidden layers, or 3 MoE layers and one of MTP
    ids, assumed = read(SGLANG, 4, SMALL)
    assert ids == {1: 1, 2: 2, 3: 3}
    assert "one for each MoE layer and MTP layer would fit too" in assumed
    ids, assumed = read(VLLM, 4, SMALL)
    assert ids == {1: 0, 2: 1, 3: 2, 4: 3}
    assert "one for each hidden layer would fit too" in assumed


def test_rows_that_fit_no_count_name_all_counts():
    for name in (SGLANG, VLLM, EPLB):
        told = ("60 rows", "61 for each hidden layer", "58 for each MoE layer",
                "59 for each MoE layer and MTP layer", "62 for each hidden", "3-61")  # fmt: skip
        unfit(by_row(name, *[A] * 60), DEEPSEEK, *told)


def test_dense_rows_are_not_looked_at():
    found, _ = resolve(by_row(SGLANG, (99, -1), A, B, C), SMALL)
    check(found, SMALL, ep_size=2)


def test_one_row_for_all_layers():
    raw = parse_map([3, 2, 1, 0], where="map")
    assert raw.indexed == ALIKE
    found, assumed = resolve(raw, SMALL)
    assert found == placed(SMALL, B, B, B)
    assert assumed == "one row: all 3 MoE layers alike"


def test_a_number_of_layers_that_is_not_stated_is_reported():
    layers = MoeLayers(4, (1, 2, 3), (), 4, stated=False)
    for raw in (by_row(VLLM, A, B, C), by_id(TRTLLM, 1, 2, 3), parse_map([0, 1, 2, 3], where="m")):
        assert (
            "config.json does not say the number of layers, taken to be 4"
            in resolve(raw, layers)[1]
        )


@pytest.mark.parametrize("name", [TRTLLM, ASCEND])
@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ((1, 2, 3), {1: 1, 2: 2, 3: 3}),  # absolute
        ((1, 2, 3, 4), {1: 1, 2: 2, 3: 3, 4: 4}),  # absolute, with MTP
        ((0, 1, 2), {1: 0, 2: 1, 3: 2}),  # counted off
    ],
)
def test_ids_are_absolute_or_counted(name: str, given: tuple[int, ...], layers: dict[int, int]):
    found, _ = resolve(by_id(name, *given), SMALL)
    lengths = map(len, found.physical_to_logical)
    assert dict(zip(found.layers, (n - 4 for n in lengths), strict=True)) == layers


def test_ids_with_dense_layers_are_absolute_except_where_layers_are_counted():
    found, assumed = resolve(by_id(TRTLLM, 0, 1, 2, 3), SMALL)
    assert found.layers == (1, 2, 3)
    assert "those of layer 0 without experts were ignored" in assumed
    found, assumed = resolve(by_id(ASCEND, 0, 1, 2, 3), SMALL)
    assert found.layers == (1, 2, 3, 4)
    assert "ids count each MoE layer and MTP layer" in assumed


def test_ids_of_no_layers_are_named_with_the_missing():
    told = ("has no layers 7, 9", "lacks layers 1, 3", "MoE layers: 1-4")
    unfit(by_id(TRTLLM, 2, 7, 9), SMALL, *told)
