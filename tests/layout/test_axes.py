"""The axes notation: reading it, deriving companions, and where every element lies."""

from itertools import product
from math import prod

import numpy as np
import pytest

from moeconv.layout.axes import (
    Axes,
    AxesSyntax,
    Axis,
    Geometry,
    axis_size,
    derived,
    geometry,
    parse_axes,
    shared_by_pair,
)
from tests.reference import arranged

E, G, O, K, B = 3, 2, 4, 5, 6  # noqa: E741 - the letters of the notation
SIZES = {"E": E, "G": G, "O": O, "K": K, "b": B}


# The table of the notation's description: axes, shape, strides of expert and pair, and of the
# matrix's own axes in canonical order.
@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        # most families, per expert
        ("O K", Geometry((O, K), 0, 0, ((O, K), (K, 1)))),
        # transformers v5, sglang, grouped GEMM with trans_b
        ("E (G O) K", Geometry((E, G * O, K), G * O * K, O * K, ((O, K), (K, 1)))),
        ("E O K", Geometry((E, O, K), O * K, 0, ((O, K), (K, 1)))),
        # Qwen3-VL on the Hub, Llama 4
        ("E K (G O)", Geometry((E, K, G * O), K * G * O, O, ((O, 1), (K, G * O)))),
        ("E K O", Geometry((E, K, O), K * O, 0, ((O, 1), (K, O)))),
        # gpt-oss: interleaved
        ("E K (O G)", Geometry((E, K, O * G), K * O * G, 1, ((O, G), (K, O * G)))),
        ("E (O G)", Geometry((E, O * G), O * G, 1, ((O, G),))),
        ("E (O G) K b", Geometry((E, O * G, K, B), O * G * K * B, K * B,
                                 ((O, G * K * B), (K, B), (B, 1)))),
        # dbrx, megablocks
        ("(E O) K", Geometry((E * O, K), O * K, 0, ((O, K), (K, 1)))),
        ("(E K) O", Geometry((E * K, O), K * O, 0, ((O, 1), (K, O)))),
        # bias, GPTQ's qweight, a scale for each row, a scalar, a scalar with a dimension
        ("O", Geometry((O,), 0, 0, ((O, 1),))),
        ("K O", Geometry((K, O), 0, 0, ((O, 1), (K, O)))),
        ("O 1", Geometry((O, 1), 0, 0, ((O, 1),))),
        ("", Geometry((), 0, 0, ())),
        ("1", Geometry((1,), 0, 0, ())),
        ("E G", Geometry((E, G), G, 1, ())),
        ("E", Geometry((E,), 1, 0, ())),
    ],
)  # fmt: skip
def test_where_matrices_are(axes: str, expected: Geometry):
    assert geometry(parse_axes(axes), SIZES) == expected


@pytest.mark.parametrize(
    "axes",
    ["E (G O) K", "E K (G O)", "E K (O G)", "E (O G) K b", "(E O) K", "(E K) O", "(E G b O) 1 K"],
)
def test_every_element_is_where_numpy_puts_it(axes: str):
    letters = [c for c in "EGOKb" if c in axes]
    shape = [SIZES[c] for c in letters]
    values = np.arange(prod(shape), dtype=np.uint64).reshape(shape)
    stored = arranged(values, "".join(letters), axes)
    place = geometry(parse_axes(axes), SIZES)
    assert place.shape == stored.shape
    assert place.numel == stored.size
    flat, matrix = stored.ravel(), [c for c in letters if c not in "EG"]
    assert place.canonical_shape == tuple(SIZES[c] for c in matrix)
    for index in product(*map(range, shape)):
        at = dict(zip(letters, index, strict=True))
        offset = at["E"] * place.expert_stride + at.get("G", 0) * place.pair_stride
        offset += sum(at[c] * step for c, (_, step) in zip(matrix, place.matrix, strict=True))
        assert flat[offset] == values[index]


@pytest.mark.parametrize(
    ("axes", "contiguous"),
    [
        ("O K", True),
        ("E (G O) K", True),
        ("E O K", True),
        ("(E O) K", True),
        ("E G", True),
        ("", True),
        ("E (O G) K b", False),
        ("E K (G O)", False),
        ("E (O G)", False),
        ("K O", False),
    ],
)
def test_which_matrices_are_one_run(axes: str, *, contiguous: bool):
    assert geometry(parse_axes(axes), SIZES).contiguous is contiguous


def test_axes_of_size_one_do_not_break_a_run():
    assert geometry(parse_axes("E K (G O)"), SIZES | {"K": 1}).contiguous
    assert geometry(parse_axes("E K O"), SIZES | {"O": 1}).contiguous


@pytest.mark.parametrize(
    ("own", "line", "expected"),
    [
        # a component keeps its own order, E in front, O becomes (G O)
        ("O K", "E (G O) K", "E (G O) K"),
        ("K O", "E (G O) K", "E K (G O)"),
        ("O", "E (G O) K", "E (G O)"),
        ("O 1", "E (G O) K", "E (G O) 1"),
        ("O/128 K/128", "E (G O) K", "E (G O/128) K/128"),
        ("O/8 K", "E (G O) K", "E (G O/8) K"),
        # where it has no O, G becomes an axis of its own: stacked, never merged
        ("", "E (G O) K", "E G"),
        ("1", "E (G O) K", "E G 1"),
        ("K", "E (G O) K", "E G K"),
        ("s", "E (G O) K", "E G s"),
        # a grid of one block is a grid: G stands where its rows are
        ("1 1", "E (G O) K", "E G 1"),
        ("1 1", "E K (O G)", "E G 1"),
        ("1 1", "(E O) K", "E 1 1"),
        ("1 1", "O K", "1 1"),
        # without G, E alone
        ("O", "E O K", "E O"),
        ("", "E O K", "E"),
        ("O/128 K/128", "E O K", "E O/128 K/128"),
        # per expert nothing is added
        ("K O", "O K", "K O"),
        ("", "O K", ""),
        # turned and interleaved
        ("O", "E K (G O)", "E (G O)"),
        ("O", "E K (O G)", "E (O G)"),
        ("O K b", "E K (O G)", "E (O G) K b"),
        ("O/128 K/128", "E K (G O)", "E (G O/128) K/128"),
        # stacked, not concatenated
        ("O", "E G O K", "E G O"),
        # dbrx: E takes O with it, where the component has one
        ("O", "(E O) K", "(E O)"),
        ("O K/64", "(E O) K", "(E O) K/64"),
        ("", "(E O) K", "E"),
        ("K", "(E O) K", "E K"),
        ("O", "(E K) O", "E O"),
        ("O", "(E G O) K", "(E G O)"),
    ],
)
def test_companions_follow_the_weight(own: str, line: str, expected: str):
    assert str(derived(parse_axes(own), parse_axes(line))) == expected


@pytest.mark.parametrize(
    ("own", "line", "expected"),
    [
        ("", "E (G O) K", "E"),
        ("1", "E (G O) K", "E 1"),
        ("1 1", "E (G O) K", "E 1 1"),
        ("1 1", "E K (O G)", "E 1 1"),
        # one matrix has nothing to share
        ("", "E O K", "None"),
        ("1 1", "O K", "None"),
        # what may say something else of the two together: a shape, an order, rows
        ("s", "E (G O) K", "None"),
        ("K", "E (G O) K", "None"),
        ("O", "E (G O) K", "None"),
    ],
)
def test_one_number_for_gate_and_up(own: str, line: str, expected: str):
    assert str(shared_by_pair(parse_axes(own), parse_axes(line))) == expected


def test_axes_of_a_group_that_a_companion_lacks_are_dropped():
    assert str(derived(parse_axes("O"), parse_axes("E (O K)"))) == "E O"
    assert str(derived(parse_axes("K"), parse_axes("E (G O K)"))) == "E (G K)"


def test_blocks():
    named = parse_axes("E (G O/block.0) K/block.1")
    assert named.block_names == {"block.0", "block.1"}
    bound = named.bound({"block.0": 2, "block.1": 3})
    assert str(bound) == "E (G O/2) K/3"
    assert bound.block_names == frozenset()
    # the last block of K is not a full one: 5 in blocks of 3 are 2
    assert geometry(bound, SIZES).shape == (E, G * O // 2, 2)
    assert [axis_size(Axis("O", 128), {"O": n}) for n in (1, 128, 129, 1408)] == [1, 1, 2, 11]


def test_reading():
    assert parse_axes("E (G O/2) 1 K b") == Axes(
        (
            (Axis("E"),),
            (Axis("G"), Axis("O", 2)),
            (),
            (Axis("K"),),
            (Axis("b"),),
        )
    )
    assert parse_axes("O/1") == parse_axes("O") == parse_axes("(O)")
    assert parse_axes("  E(G O)K ") == parse_axes("E (G O) K")
    assert parse_axes("O 1 K").letters == {"O", "K"}


@pytest.mark.parametrize(
    "text", ["", "1", "O K", "E (G O) K", "E (G O/block.0) K/128", "E 1 (O G) b 1", "(E O K)"]
)
def test_writing_is_the_inverse_of_reading(text: str):
    assert str(parse_axes(text)) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("E (G O K", "unmatched parenthesis"),
        ("E G O) K", "unmatched parenthesis"),
        ("E ((G O) K)", "unmatched parenthesis"),
        ("E () K", "empty group"),
        ("O O", "names an axis twice"),
        ("E (G O) G", "names an axis twice"),
        ("O/2 O/4", "names an axis twice"),
        ("o X", "`X`"),
        ("OK", "`OK`"),
        ("2", "`2`"),
        ("(1 O)", "`1`"),
        ("O/", "`O/`"),
        ("O/0", "block below 1"),
        ("O/-1", "`O/-1`"),
        ("O/2/2", "`O/2/2`"),
        ("É", "`É`"),
        ("O/٢", "`O/٢`"),
    ],
)
def test_what_is_not_in_the_axes_notation(text: str, said: str):
    with pytest.raises(AxesSyntax) as problem:
        parse_axes(text)
    assert said in str(problem.value)
    assert f"`{text}`" in str(problem.value)
