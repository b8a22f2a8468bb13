"""Each place's texts mean what its reader takes them for."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.quantconfig.automaton import Budget, Rests, Unsupported
from moeconv.quantconfig.match_rules import Place, is_pattern

PIECES = st.text("ab.1", max_size=5)
NAMES = st.sets(st.one_of(st.just(""), PIECES.map(".{}".format)), max_size=6)


@settings(max_examples=400, deadline=None)
@given(st.text("ab.1", min_size=1, max_size=6), PIECES, NAMES)
def test_parts_of_names(text: str, head: str, rests: set[str]):
    place = Place("quantization_config.modules_to_not_convert", "awq")
    found = place.reading(text, Budget())
    assert found is not None
    alike = Rests(frozenset(rests))
    for _ in range(2):  # the second time it is remembered
        wanted = {rest for rest in rests if text in head + rest}
        assert found.among(head, alike) == wanted


@settings(max_examples=400, deadline=None)
@given(st.text("ab.1+", min_size=1, max_size=6), PIECES, NAMES)
def test_modules_with_what_is_in_them_and_ends_of_names(text: str, head: str, rests: set[str]):
    """The rule of transformers' `should_convert_module`; a dot in a name is a dot."""
    try:
        regex = re.compile(rf"(?:{text})(?:(?<=\.)|(?=\.|$))")
        found = Place("llm_int8_skip_modules", "").reading(text, Budget())
    except (re.error, Unsupported):
        return
    assert found is not None
    plain = not is_pattern(text) and not text.endswith(".")

    def meant(name: str) -> bool:
        if plain:
            return f"{name}.".startswith(f"{text}.") or name.endswith(text)
        return regex.match(name) is not None or name.endswith(text)

    wanted = {rest for rest in rests if meant(head + rest)}
    assert found.among(head, Rests(frozenset(rests))) == wanted


@pytest.mark.parametrize(
    ("place", "method", "text"),
    [
        ("ignore", "compressed-tensors", "*.experts.*"),
        ("ignore", "modelopt", "model.experts"),
        ("targets", "", "*.experts.*"),
        ("ignored_layers", "fp8", "experts.0"),
        ("unheard_of", "", ".*experts"),
    ],
)
def test_names_alone(place: str, method: str, text: str):
    assert Place(f"quantization_config.{place}", method).reading(text, Budget()) is None


def test_reading_takes_of_the_budget():
    rests = Rests(frozenset(f".{n}.up" for n in range(100)))
    for method in ("awq", "fp8"):
        budget = Budget(150)
        found = Place("modules_to_not_convert", method).reading("up", budget)
        assert found is not None
        assert found.among("model", rests)
        budget.left = 0
        with pytest.raises(Unsupported):
            found.among("other", rests)
