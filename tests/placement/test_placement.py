"""Rows, ranks and redundancy: what fits, and how each misfit is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeconv.core.text import listed, spans
from moeconv.errors import BadPlacement
from moeconv.placement.model import (
    MoeLayers,
    Placement,
    by_stack,
    check,
    kind_and_layer,
    round_robin,
    row_problems,
    slots_for,
    trivial,
)
from tests.badinput.checks import holds
from tests.placement.maps import PLAIN, SMALL, Case, cases, placed


def problems(row: tuple[int, ...], experts: int = 4, ep_size: int | None = 2, **more: bool):
    return list(row_problems(row, experts=experts, ep_size=ep_size, where="layer 3", **more))


def misfit(*facts: str, **given: object) -> str:
    """The text of the refusal by `check`, which says all `facts`."""
    with pytest.raises(BadPlacement) as caught:
        check(**given)  # type: ignore[arg-type]
    return str(holds(caught.value, BadPlacement, *facts))


# --- the two ways without a map ----------------------------------------------------------------
def test_trivial_starts_anew_after_the_last_expert():
    assert trivial(4, 6) == (0, 1, 2, 3, 0, 1)


def test_round_robin_deals_experts_out_like_cards():
    assert round_robin(8, 8, 4) == (0, 4, 1, 5, 2, 6, 3, 7)


def test_round_robin_keeps_a_copy_off_the_rank_of_the_first():
    # the ninth card goes to rank 0, which has expert 0 already: it gets expert 1
    assert round_robin(8, 12, 4) == (0, 4, 1, 1, 5, 2, 2, 6, 3, 3, 7, 4)


def test_round_robin_where_experts_do_not_divide_by_ranks():
    assert round_robin(6, 8, 4) == (0, 4, 1, 5, 2, 0, 3, 1)


@given(st.integers(1, 40), st.integers(2, 8), st.data())
def test_round_robin_fits_up_to_one_copy_of_each(experts: int, ep_size: int, data: st.DataObject):
    least = -(-experts // ep_size)
    most = max(least, 2 * experts // ep_size)
    slots = ep_size * data.draw(st.integers(least, most))
    row = round_robin(experts, slots, ep_size)
    for rank in range(ep_size):
        held = row[rank * slots // ep_size : (rank + 1) * slots // ep_size]
        own = tuple(range(rank, experts, ep_size))
        assert held[: len(own)] == own
        # one expert alone has nowhere else to go
        if experts > 1 and slots <= 2 * experts:
            assert not set(held[len(own) :]) & set(own)
    assert set(row) == set(range(experts))


def test_round_robin_refuses_slots_that_do_not_divide():
    with pytest.raises(BadPlacement) as caught:
        round_robin(8, 9, 4)
    holds(caught.value, BadPlacement, "9 slots", "0 redundant (8 slots) or 4 redundant (12 slots)")


# --- redundancy --------------------------------------------------------------------------------
def test_slots_are_experts_and_copies():
    assert slots_for(256, 32, 8) == 288


def test_slots_that_do_not_divide_name_both_neighbours():
    with pytest.raises(BadPlacement) as caught:
        slots_for(256, 2, 8)
    holds(caught.value, BadPlacement, "0 redundant (256 slots) or 8 redundant (264 slots)")


def test_slots_that_do_not_divide_name_no_neighbour_below_the_experts():
    with pytest.raises(BadPlacement) as caught:
        slots_for(60, 0, 8)
    text = str(holds(caught.value, BadPlacement, "4 redundant (64 slots)"))
    assert "56 slots" not in text


@pytest.mark.parametrize(("redundant", "ep_size"), [(-1, 2), (0, 0), (0, -2)])
def test_invalid_numbers_are_refused(redundant: int, ep_size: int):
    with pytest.raises(BadPlacement) as caught:
        slots_for(8, redundant, ep_size)
    holds(caught.value, BadPlacement)


# --- one row -----------------------------------------------------------------------------------
def test_a_good_row_has_no_problems():
    assert problems((3, 0, 1, 2)) == []
    assert problems((3, 0, 1, 2, 3, 0)) == []


def test_an_id_outside_the_experts():
    assert problems((0, 1, 2, 3, 4, 1)) == [
        "layer 3: slot 4 holds expert 4, but ids run from 0 to 3"
    ]
    assert problems((0, 1, 2, 3, -1, 9)) == [
        "layer 3: slots 4, 5 hold experts -1, 9, but ids run from 0 to 3"
    ]


def test_an_expert_in_no_slot():
    assert problems((0, 1, 2, 0)) == ["layer 3: expert 3 is in no slot"]
    assert problems((0, 1, 1, 0)) == ["layer 3: experts 2, 3 are in no slot"]


def test_slots_that_do_not_divide_by_ranks():
    assert problems((0, 1, 2, 3, 0)) == [
        "layer 3: 5 slots cannot be split evenly among ep 2; "
        "the nearest that can: 0 redundant (4 slots) or 2 redundant (6 slots)"
    ]
    assert problems((0, 1, 2, 3, 0), ep_size=None) == []


def test_an_expert_twice_on_one_rank():
    assert problems((0, 1, 0, 2, 3, 1)) == ["layer 3: expert 0 is twice on rank 0 (slots 0, 2)"]
    assert problems((0, 1, 2, 3, 3, 3)) == [
        "layer 3: expert 3 is 3 times on rank 1 (slots 3, 4, 5)"
    ]
    assert problems((0, 1, 0, 2, 3, 1), allow_duplicates=True) == []


def test_all_problems_of_a_row_at_once():
    assert len(problems((0, 0, 7, 1))) == 3


# --- a whole placement -------------------------------------------------------------------------
@given(cases())
def test_what_fits_passes(case: Case):
    check(case.placement, case.layers, ep_size=case.ep_size, allow_duplicates=True)
    check(case.placement, case.layers, ep_size=None)


def test_layers_beyond_may_be_left_out_or_in():
    row = (0, 1, 2, 3)
    check(placed(SMALL, row, row, row), SMALL, ep_size=2)
    check(placed(SMALL, row, row, row, row), SMALL, ep_size=2)


def test_layers_that_do_not_exist_or_are_missing():
    found = Placement(4, (0, 1, 2), ((0, 1, 2, 3),) * 3)
    facts = ("no experts in layer 0", "layer 3 of the checkpoint has no row")
    misfit(*facts, placement=found, layers=SMALL, ep_size=2)


def test_another_number_of_experts():
    found = Placement(5, (1, 2), ((0, 1, 2, 3),) * 2)
    misfit("it is for 5 experts, the checkpoint has 4", placement=found, layers=PLAIN, ep_size=2)


def test_rows_of_unequal_length():
    found = Placement(4, (1, 2, 3), ((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3, 0, 1)))
    misfit("layer 3 has 6 slots, others 4", placement=found, layers=SMALL, ep_size=2)


def test_rows_and_layers_that_do_not_pair():
    found = Placement(4, (1, 2), ((0, 1, 2, 3),))
    misfit("1 row for 2 layers", placement=found, layers=PLAIN, ep_size=2)
    found = Placement(4, (2, 1), ((0, 1, 2, 3),) * 2)
    misfit("not in ascending order", placement=found, layers=PLAIN, ep_size=2)


def test_all_problems_of_all_rows_at_once():
    found = placed(PLAIN, (0, 1, 2, 9), (0, 0, 1, 2))
    text = misfit("4 problems", placement=found, layers=PLAIN, ep_size=2)
    for fact in ("layer 1: slot 3", "layer 1: expert 3 is in", "layer 2: expert 3", "on rank 0"):
        assert fact in text


def test_slots_that_do_not_divide_are_reported_once_for_all_layers():
    found = placed(SMALL, *((0, 1, 2, 3, 0),) * 3)
    text = misfit("1 problem", "5 slots", placement=found, layers=SMALL, ep_size=2)
    assert text.count("cannot be split evenly") == 1


def test_a_flood_of_problems_is_cut():
    layers = MoeLayers(4, tuple(range(50)), (), 50)
    text = misfit("50 problems", "and 30 more", placement=placed(layers, *((0, 1, 2, 2),) * 50),
                  layers=layers, ep_size=None)  # fmt: skip
    assert len(text.splitlines()) == 23


def test_a_row_by_layer():
    found = placed(SMALL, (0, 1, 2, 3), (3, 2, 1, 0), (0, 1, 2, 3))
    assert found.row(2) == (3, 2, 1, 0)
    assert found.row(0) is None
    assert (found.slots, Placement(4, (), ()).slots) == (4, 0)


# --- by the names of stacks --------------------------------------------------------------------
NAMES = (
    "model.layers.1.mlp.experts",
    "model.layers.2.mlp.experts",
    "model.layers.10.mlp.experts",
    "mtp.layers.0.mlp.experts",
)
A, B, C, D = (0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1)


def not_by_stack(given: object, *facts: str, names: tuple[str, ...] = NAMES) -> None:
    with pytest.raises(BadPlacement) as caught:
        by_stack(names, given)  # type: ignore[arg-type]
    holds(caught.value, BadPlacement, *facts)


def test_the_layer_is_the_last_number_but_one():
    assert kind_and_layer("a.3.b.12.mlp.experts") == (("a.3.b.", "mlp.experts"), 12)
    assert kind_and_layer("7.experts") == (("", "experts"), 7)
    assert kind_and_layer("model.experts") is None


def test_a_mapping_goes_by_name():
    assert by_stack(NAMES, {NAMES[3]: [0, 1, 2], NAMES[0]: B}) == {NAMES[3]: A, NAMES[0]: B}
    not_by_stack({"model.layers.4.mlp.experts": A}, "model.layers.4.mlp.experts", "is not a stack")


def test_a_placement_goes_by_layer_of_the_most_numerous_kind():
    assert by_stack(NAMES, Placement(3, (1, 2, 10), (A, B, C))) == {
        NAMES[0]: A, NAMES[1]: B, NAMES[2]: C,
    }  # fmt: skip
    assert by_stack(NAMES, Placement(3, (10,), (C,))) == {NAMES[2]: C}
    not_by_stack(Placement(3, (0, 1), (A, B)), "rows for 2 layers", "no stack in layer 0")


def test_rows_are_one_for_each_stack():
    assert by_stack(NAMES, [A, B, C, D]) == dict(zip(NAMES, (A, B, C, D), strict=True))


def test_rows_are_one_for_each_of_the_most_numerous_kind_in_order_of_layers():
    mixed = (NAMES[3], NAMES[2], NAMES[0], NAMES[1])
    assert by_stack(mixed, [A, B, C]) == {NAMES[0]: A, NAMES[1]: B, NAMES[2]: C}


def test_rows_of_another_number_are_refused_with_the_counts():
    not_by_stack([A, B], "2 rows", "4 stacks, 3 of the most numerous kind")
    not_by_stack([], "0 rows")


def test_two_kinds_of_one_number_are_refused():
    names = ("a.layers.0.experts", "a.layers.1.experts", "b.layers.0.experts", "b.layers.1.experts")
    not_by_stack([A, B], "2 kinds of 2 stacks", names=names)
    assert len(by_stack(names, [A, B, C, D])) == 4


@pytest.mark.parametrize("table", [torch.tensor, np.array])
def test_tensors_and_arrays_are_rows(table: type):
    assert by_stack(NAMES, table([A, B, C, D])) == by_stack(NAMES, [A, B, C, D])
    assert by_stack(NAMES, [table(row) for row in (A, B, C, D)])[NAMES[1]] == B
    assert by_stack(NAMES, {NAMES[0]: table(A)}) == {NAMES[0]: A}


def test_numbers_of_numpy_are_numbers():
    assert by_stack(NAMES, {NAMES[0]: [np.int32(1), np.int64(0)]}) == {NAMES[0]: (1, 0)}


@pytest.mark.parametrize(
    "bad", [[0, 1, 2, 3], ["012"] * 4, [[0.0, 1.0]] * 4, [[True]] * 4, "rows", 7, None,
            torch.ones(4, 3), torch.tensor(3)],
)  # fmt: skip
def test_what_is_not_a_row_of_ids_is_refused(bad: object):
    not_by_stack(bad)


# --- ids in a sentence -------------------------------------------------------------------------
def test_ids_are_shortened():
    assert listed(range(3)) == "0, 1, 2"
    assert listed(range(1010)) == "0, 1, 2, 3, 4, 5 and 1,004 more"
    assert spans((1, 3, 4, 5, 8)) == "1, 3-5, 8"
    assert spans(range(0, 20, 2)) == "0, 2, 4, 6, 8, 10 and 4 more"


def test_a_far_expert_costs_no_more_than_a_near_one():
    """Of a million experts of which a row has two, the first few missing ones are enough."""
    assert problems((0, 999_999), experts=10**9, ep_size=None) == [
        "layer 3: experts 1, 2, 3, 4, 5, 6 and 999,999,992 more are in no slot"
    ]


def test_many_misfits_are_counted():
    layers = MoeLayers(4, tuple(range(3000)), (), 3000)
    rows = tuple((0, 1, 2, 9) for _ in layers.moe)
    placement = Placement(4, layers.moe, rows)
    misfit("6,000 problems", "and 5,980 more", placement=placement, layers=layers, ep_size=2)
