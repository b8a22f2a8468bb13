"""Axes to try for components that a name leaves open, and the order in which they are tried."""

from moeconv.detect.interpretations import (
    Interpretation,
    axes_of,
    interpretations,
    named_block_sizes,
    recorded_first,
    transposed_variants,
)
from tests.detect.stacks import STACK, experts, fused, layout, matched, stored

BLOCKS = {"block.0": 3, "block.1": 3}
SCALE = "weight_scale_inv"


def test_interpretations_have_the_rank_of_the_tensors():
    stack = matched(fused((3, 8, 16), (3, 16, 4)))
    options = interpretations(stack, layout("fused"), {})
    assert options
    for option in options:
        assert {len(axes.dims) for axes in axes_of(option).values()} == {3}
        assert option.keys() == stack.tensors.keys()


def test_only_the_components_asked_for_are_interpreted():
    stack = matched([*experts(1, "F8_E4M3"), stored(f"{STACK}.0.w1.{SCALE}", (2, 3), "F32")])
    (option, *_) = interpretations(stack, layout("per-expert"), BLOCKS, only=frozenset({SCALE}))
    assert {name for _, name in option} == {SCALE}


def test_block_sizes_are_bound_to_their_numbers():
    stack = matched([*experts(1, "F8_E4M3"), stored(f"{STACK}.0.w1.{SCALE}", (2, 3), "F32")])
    assert named_block_sizes(stack, layout("per-expert")) >= set(BLOCKS)
    (option, *_) = interpretations(stack, layout("per-expert"), BLOCKS)
    assert not any(axes.block_names for axes in axes_of(option).values())


def test_floating_point_weights_are_never_read_as_packed():
    def packed(dtype: str) -> bool:
        options = interpretations(matched(experts(1, dtype)), layout("per-expert"), {})
        return any(axes.in_blocks for option in options for axes in axes_of(option).values())

    assert packed("U8")
    assert not packed("BF16")


def test_an_interpretation_is_not_a_variant_of_itself():
    options = interpretations(matched(fused((3, 8, 16), (3, 16, 4))), layout("fused"), {})
    assert options[0] not in list(transposed_variants(options, options[0]))


def test_recorded_ranks_come_first():
    per_expert = layout("per-expert")
    stack = matched(
        [
            *experts(1, "F8_E4M3"),
            *(stored(f"{STACK}.0.{w}.weight_scale", (1,), "F32") for w in ("w1", "w3", "w2")),
        ]
    )
    options = interpretations(stack, per_expert, BLOCKS)

    def rank(option: Interpretation) -> int:
        return max(
            len(a.letters - {"E", "G"})
            for (_, n), a in axes_of(option).items()
            if n == "weight_scale"
        )

    assert {rank(option) for option in options} == {0, 1}
    for wanted in (0, 1):
        recorded = {
            (STACK, projection, "weight_scale"): wanted for projection in ("gate", "up", "down")
        }
        (first, *_) = recorded_first(options, per_expert, STACK, recorded)
        assert rank(first) == wanted
