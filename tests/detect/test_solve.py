"""Sizes from shapes: what they determine, what stays open, and what contradicts."""

import pytest

from moeconv.checkpoint.header import StoredTensor
from moeconv.detect.interpretations import interpretations
from moeconv.detect.solve import SizeHints, solve
from moeconv.detect.stack import PackingAxis, Sizes
from tests.detect.stacks import STACK, experts, fused, layout, matched, stored

UNKNOWN = SizeHints(None, {})


def solved(
    tensors: list[StoredTensor],
    name: str,
    hints: SizeHints = UNKNOWN,
    block_sizes: dict[str, int] | None = None,
) -> Sizes | list[str]:
    """The first interpretation that fits, else the first one's reasons."""
    stack = matched(tensors)
    tried = [
        solve(stack, layout(name), interpretation, hints)
        for interpretation in interpretations(stack, layout(name), block_sizes or {})
    ]
    return next((found for found in tried if isinstance(found, Sizes)), tried[0])


def test_fused_shapes_determine_all_three_sizes():
    assert solved(fused((3, 8, 16), (3, 16, 4)), "fused") == Sizes(3, 4, 16)


def test_the_number_of_experts_comes_from_names_where_each_has_a_tensor():
    found = solved(experts(3), "per-expert", SizeHints(3, {}))
    assert found == Sizes(3, 4, 8)


def test_stated_sizes_never_override_shapes():
    stated = {"experts": 9, "width": 9, "hidden": 9}
    found = solved(fused((3, 8, 16), (3, 16, 4)), "fused", SizeHints(None, stated))
    assert found == Sizes(3, 4, 16)


@pytest.mark.parametrize(
    ("gate_up", "down", "reason"),
    [
        ((3, 7, 16), (3, 16, 4), "7 is not divisible by 2"),
        ((3, 8, 16), (3, 16, 5), "needs"),
        ((3, 8, 16), (2, 16, 4), "needs"),
        ((3, 8, 16), (3, 15, 4), "needs"),
        ((3, 8), (3, 16, 4), "has 3 dimensions"),
        ((0, 8, 16), (0, 16, 4), "there are no experts"),
    ],
)
def test_shapes_that_contradict_each_other_have_no_solution(
    gate_up: tuple[int, ...], down: tuple[int, ...], reason: str
) -> None:
    found = solved(fused(gate_up, down), "fused")
    assert isinstance(found, list)
    assert any(reason in text for text in found)


def test_two_values_a_byte_leave_each_size_to_the_projection_that_has_it_as_rows():
    packed = [
        stored(f"{STACK}.{expert}.{name}.weight", shape, "U8")
        for expert in range(2)
        for name, shape in {"w1": (4, 16), "w3": (4, 16), "w2": (32, 2)}.items()
    ]
    assert solved(packed, "per-expert", SizeHints(2, {})) == Sizes(2, 4, 32)
    # floating point is never packed
    plain = [stored(t.name, t.shape) for t in packed]
    assert isinstance(solved(plain, "per-expert", SizeHints(2, {})), list)


def test_block_scales_round_up_and_must_agree():
    def with_scales(*grid: int) -> list[StoredTensor]:
        scales = [
            stored(f"{STACK}.0.{name}.weight_scale_inv", grid, "F32") for name in ("w1", "w3")
        ]
        down = stored(f"{STACK}.0.w2.weight_scale_inv", grid[::-1], "F32")
        return [*experts(1, "F8_E4M3"), *scales, down]

    blocks = {"block.0": 3, "block.1": 3}
    hints = SizeHints(1, {})
    assert solved(with_scales(2, 3), "per-expert", hints, blocks) == Sizes(1, 4, 8)
    assert isinstance(solved(with_scales(2, 2), "per-expert", hints, blocks), list)


def test_a_packing_axis_reads_as_its_letter_and_component():
    assert str(PackingAxis("weight_blocks", is_down=True, letter="b")) == "b of weight_blocks"
