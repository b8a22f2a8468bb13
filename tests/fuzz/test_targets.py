"""The parsers under plain mutations: our own errors only, and costs that follow the input."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.mutations import flipped
from tests.fuzz.costs import check_costs
from tests.fuzz.targets import TARGETS, tried


@pytest.mark.parametrize("name", TARGETS)
def test_the_documents_to_start_from_are_taken(name: str):
    for seed in TARGETS[name].seeds:
        assert tried(TARGETS[name], seed)


@pytest.mark.parametrize("name", TARGETS)
@given(st.data())
@settings(max_examples=100, database=None, suppress_health_check=list(HealthCheck))
def test_a_value_or_our_own_error_and_no_more_memory_or_work_than_the_input_warrants(
    name: str, data: st.DataObject
):
    target = TARGETS[name]
    seed = data.draw(st.sampled_from(target.seeds))
    raw = data.draw(st.one_of(flipped(seed), st.binary(max_size=200)))
    tried(target, seed)  # imports and memos are not the document's
    check_costs(target, raw)
