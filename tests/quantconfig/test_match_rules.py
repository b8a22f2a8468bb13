"""Each place's texts match what its reader takes them for."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.quantconfig.match_rules import (
    Budget,
    MatchRules,
    Names,
    UnsupportedPattern,
    is_pattern,
)

PIECES = st.text("ab.1", max_size=5)
SUFFIXES = st.sets(st.one_of(st.just(""), PIECES.map(".{}".format)), max_size=6)


@settings(max_examples=400, deadline=None)
@given(st.text("ab.1", min_size=1, max_size=6), PIECES, SUFFIXES)
def test_parts_of_names(text: str, stack: str, suffixes: set[str]):
    rules = MatchRules("quantization_config.modules_to_not_convert", "awq")
    found = rules.matcher(text, Budget())
    assert found is not None
    wanted = {suffix for suffix in suffixes if text in stack + suffix}
    assert found.suffixes(Names(stack, frozenset(suffixes))) == wanted


@settings(max_examples=400, deadline=None)
@given(st.text("ab.1+", min_size=1, max_size=6), PIECES, SUFFIXES)
def test_modules_with_what_is_in_them_and_ends_of_names(text: str, stack: str, suffixes: set[str]):
    """The rule of transformers' `should_convert_module`; a dot in a name is a dot."""
    try:
        regex = re.compile(rf"(?:{text})(?:(?<=\.)|(?=\.|$))")
        found = MatchRules("llm_int8_skip_modules", "").matcher(text, Budget())
    except (re.error, UnsupportedPattern):
        return
    assert found is not None
    plain = not is_pattern(text) and not text.endswith(".")

    def matches(name: str) -> bool:
        if plain:
            return f"{name}.".startswith(f"{text}.") or name.endswith(text)
        return regex.match(name) is not None or name.endswith(text)

    wanted = {suffix for suffix in suffixes if matches(stack + suffix)}
    assert found.suffixes(Names(stack, frozenset(suffixes))) == wanted


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
    assert MatchRules(f"quantization_config.{place}", method).matcher(text, Budget()) is None


def test_matching_takes_of_the_budget():
    suffixes = frozenset(f".{n}.up" for n in range(100))
    for method in ("awq", "fp8"):
        budget = Budget(150)
        found = MatchRules("modules_to_not_convert", method).matcher("up", budget)
        assert found is not None
        assert found.suffixes(Names("model", suffixes))
        with pytest.raises(UnsupportedPattern):
            found.suffixes(Names("other", suffixes))
