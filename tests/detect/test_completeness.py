"""Each way in which a stack can be incomplete, as its own error."""

import pytest

from moeconv.checkpoint.header import StoredTensor
from moeconv.detect.completeness import bare_dtype, completeness
from moeconv.errors import (
    ExpertDtype,
    ExpertGap,
    ExpertOutOfRange,
    ExpertShape,
    MissingExpert,
    MissingScale,
    MoeconvError,
    ScaleWithoutWeight,
)
from tests.detect.stacks import STACK, experts, fused, layout, matched, stored


def kinds(
    tensors: list[StoredTensor],
    name: str = "per-expert",
    *,
    stated: int | None = None,
    quantised: bool = False,
) -> list[type[MoeconvError]]:
    found = completeness(matched(tensors), layout(name), experts=stated, quantised=quantised)
    return [type(problem) for problem in found]


def cause(tensors: list[StoredTensor]) -> str:
    """The cause of the first problem."""
    stack = matched(tensors)
    problem, *_ = completeness(stack, layout("per-expert"), experts=None, quantised=False)
    return str(problem.cause)


def without(tensors: list[StoredTensor], name: str) -> list[StoredTensor]:
    return [t for t in tensors if name not in t.name]


def scales(count: int) -> list[StoredTensor]:
    return [
        stored(f"{STACK}.{e}.{name}.weight_scale", (1,), "F32")
        for e in range(count)
        for name in ("w1", "w3", "w2")
    ]


@pytest.mark.parametrize("stated", [None, 4])
def test_a_complete_stack_has_no_problems(stated: int | None) -> None:
    assert kinds(experts(4), stated=stated) == []
    assert kinds(fused((4, 8, 8), (4, 8, 4)), "fused", stated=stated) == []
    assert kinds([*experts(4, "F8_E4M3"), *scales(4)], quantised=True) == []


def test_an_id_that_is_missing_is_a_gap():
    assert kinds(without(experts(4), ".1.w")) == [ExpertGap]


def test_a_single_absurd_id_lists_a_few_missing_ones_only():
    tensors = [*experts(1), stored(f"{STACK}.2000000000.w1.weight", (4, 8))]
    assert kinds(tensors)[0] is ExpertGap
    assert "and 1,999,999,9" in cause(tensors)


def test_an_id_at_or_above_the_stated_number_is_out_of_range_and_nothing_else():
    assert kinds(experts(4), stated=3) == [ExpertOutOfRange]


def test_a_weight_that_one_expert_lacks():
    assert kinds(without(experts(4), ".2.w3")) == [MissingExpert]


def test_a_projection_that_no_expert_has():
    assert kinds(without(experts(4), ".w3.")) == [MissingExpert]
    assert "no expert has it" in cause(without(experts(4), ".w3."))


def test_a_fused_stack_without_down():
    assert kinds(fused((4, 8, 8), (4, 8, 4))[:1], "fused") == [MissingExpert]


def test_one_expert_of_another_shape_or_dtype():
    odd = experts(4)
    odd[3] = stored(odd[3].name, (5, 8))
    assert kinds(odd) == [ExpertShape]
    odd[3] = stored(odd[3].name, (4, 8), "F16")
    assert ExpertDtype in kinds(odd)


def test_gate_and_up_of_different_dtypes():
    tensors = [stored(t.name, t.shape, "F16" if ".w1." in t.name else "BF16") for t in experts(2)]
    assert kinds(tensors) == [ExpertDtype]


def test_down_may_have_a_dtype_of_its_own():
    tensors = [stored(t.name, t.shape, "F16" if ".w2." in t.name else "BF16") for t in experts(2)]
    assert kinds(tensors) == []


def test_a_scale_that_one_expert_lacks_and_one_without_a_weight():
    quantised = experts(4, "F8_E4M3")
    assert kinds([*quantised, *without(scales(4), ".2.w1")]) == [MissingScale]
    assert kinds([*without(quantised, ".2.w1"), *scales(4)]) == [ScaleWithoutWeight]


def test_scales_for_one_of_gate_and_up_only():
    assert kinds([*experts(2, "F8_E4M3"), *without(scales(2), ".w3.")])[:1] == [MissingScale]


def test_quantised_weights_without_any_scales_are_refused_only_where_config_states_them():
    bare = experts(2, "F8_E4M3")
    assert kinds(bare, quantised=True) == [MissingScale]
    assert kinds(bare, quantised=False) == []
    assert bare_dtype(matched(bare)) == "F8_E4M3"
    assert bare_dtype(matched([*bare, *scales(2)])) is None
    assert bare_dtype(matched(experts(2))) is None
