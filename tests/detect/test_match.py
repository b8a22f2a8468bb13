"""Names to stacks: what is an expert's, whose it is, and what only begins like one."""

from dataclasses import replace

from moeconv.checkpoint.config import Config
from moeconv.detect.match import SHARED, in_ranges, match_names
from moeconv.layout.recipe import Ids
from tests.detect.stacks import STACK, experts, fused, matched, recipe, stored

FILES = ("model.safetensors",)


def test_each_expert_is_under_its_id():
    stack = matched(experts(3))
    assert stack.name == STACK
    assert {tuple(by_expert) for by_expert in stack.tensors.values()} == {(0, 1, 2)}
    assert stack.components == {"weight"}
    assert len(stack.templates) == len(stack.samples()) == 3
    assert len(stack.all_tensors) == 9


def test_a_fused_tensor_holds_all_experts():
    stack = matched(fused((2, 8, 8), (2, 8, 4)))
    assert {tuple(by_expert) for by_expert in stack.tensors.values()} == {(SHARED,)}


def test_ids_are_decimal_numbers_without_leading_zeros():
    odd = stored(f"{STACK}.07.w1.weight", (4, 8))
    stack = matched([*experts(1), odd])
    assert stack.unknown == [odd]


def test_what_only_begins_like_an_expert_is_unknown_and_not_another_tensor():
    odd = stored(f"{STACK}.0.w1.codebook", (4, 8))
    stack = matched([*experts(1), odd])
    assert stack.unknown == [odd]
    assert odd in stack.all_tensors


def test_tensors_of_no_stack_are_the_others_in_their_order():
    tensors = [stored("lm_head.weight", (8, 8)), *experts(1), stored("norm.weight", (8,))]
    stacks, others = match_names(tensors, (recipe(),), FILES, owners={})
    assert list(stacks) == [STACK]
    assert [t.name for t in others] == ["lm_head.weight", "norm.weight"]


def test_a_name_that_two_recipes_know_is_the_owners():
    twin = replace(recipe(), name="twin")
    for owners, winner in (({}, "mixtral"), ({STACK: "twin"}, "twin"), ({STACK: "no"}, "mixtral")):
        stacks, _ = match_names(experts(1), (recipe(), twin), FILES, owners=owners)
        assert stacks[STACK].recipe.name == winner


def test_a_range_of_ids_counts_from_its_first_one():
    ranged = replace(recipe(), ids=Ids(first=("text_experts",), stop=()))
    (taking,) = in_ranges((ranged,), Config({"text_experts": 2}, present=True))
    assert taking.taken == (2, None)
    stacks, others = match_names(experts(4), (taking,), FILES, owners={})
    assert {tuple(by_expert) for by_expert in stacks[STACK].tensors.values()} == {(0, 1)}
    assert len(others) == 6  # experts 0 and 1 belong to another stack


def test_a_range_that_config_does_not_state_is_not_taken():
    ranged = replace(recipe(), ids=Ids(first=("text_experts",), stop=()))
    for doc in ({}, {"text_experts": 0}, {"text_experts": True}, {"text_experts": "2"}):
        assert in_ranges((ranged,), Config(doc, present=True))[0].taken is None


def test_where_names_the_file_and_the_tensor():
    stack = matched(experts(1))
    assert stack.where(stack.sample()) == f"`model.safetensors`, tensor `{STACK}.0.w1.weight`"
    assert stack.tensor_of(0) is stack.sample()
