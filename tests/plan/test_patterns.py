"""Patterns mean what Python's own mean, and none of them takes long."""

import fnmatch
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.quantconfig.automaton import Budget, Mode, Rests, Unsupported
from moeconv.quantconfig.patterns import glob, regular

NAMES = st.text("ab.1_", max_size=8)
ATOMS = st.sampled_from([
    *("a", "b", ".", r"\.", r"\d", r"\w", r"\D", r"\W", r"\s", r"\S", "[ab]", "[^ab]", "[a-b1]"),
    *(r"[\d_.-]", "[-a]", "^", "$", "_", "a", r"\_", "[^.]"),
])  # fmt: skip
COUNTS = st.sampled_from(["*", "+", "?", "{2}", "{1,}", "{,2}", "{1,3}", "*?", "+?", "??"])


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    grouped = st.tuples(st.sampled_from(["(", "(?:"]), inner).map(lambda t: f"{t[0]}{t[1]})")
    repeated = st.tuples(grouped, COUNTS).map("".join)
    return st.one_of(
        st.lists(inner, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map("|".join),
        grouped,
        repeated,
    )


SINGLE = st.tuples(ATOMS.filter(lambda a: a not in "^$"), COUNTS).map("".join)
REGULAR = st.recursive(st.one_of(ATOMS, SINGLE), larger, max_leaves=8)


@settings(max_examples=500, deadline=None)
@given(REGULAR, st.lists(NAMES, max_size=8))
def test_regular_expressions(text: str, names: list[str]):
    found = regular(text, "prefix", Budget())
    for name in names:
        assert found.matches(name) == (re.match(text, name) is not None), name


@settings(max_examples=300, deadline=None)
@given(REGULAR, st.lists(NAMES, max_size=8))
def test_modules_with_what_is_in_them(text: str, names: list[str]):
    """The rule of transformers' `should_convert_module`, but for its suffixes."""
    found = regular(text, "modules", Budget())
    for name in names:
        theirs = re.match(rf"(?:{text})(?:(?<=\.)|(?=\.|$))", name)
        assert found.matches(name) == (theirs is not None), name


@settings(max_examples=200, deadline=None)
@given(st.text("ab.1_*?[]!-", max_size=8), st.lists(NAMES, max_size=8))
def test_globs(text: str, names: list[str]):
    found = glob(text, Budget())
    for name in names:
        assert found.matches(name) == fnmatch.fnmatchcase(name, text), name


@settings(max_examples=200, deadline=None)
@given(REGULAR, st.sampled_from(["prefix", "whole", "modules"]), NAMES, st.sets(NAMES, max_size=8))
def test_many_names_with_one_beginning(text: str, mode: Mode, head: str, rests: set[str]):
    found = regular(text, mode, Budget())
    wanted = {rest for rest in rests if regular(text, mode, Budget()).matches(head + rest)}
    alike = Rests(frozenset(rests))
    for _ in range(2):  # the second time it is remembered
        assert found.among(head, alike) == wanted


@pytest.mark.parametrize(
    "text",
    [
        *("(?=a)", "(?!a)", "(?<=a)b", "(?i)a", "(?P<n>a)", r"(a)\1", r"\bexperts", r"\Aa", r"a\Z"),
        *("a++", "a*+", "a**", "a{2}{3}", "*a", "(", ")", "a)", "[", "[]a]", "[a", "[z-a]", "[[a]"),
        *("a{3,2}", "a{b", r"[\d-x]", "\\", "(" * 30 + ")" * 30, "a" * 1001, "(a{99}){99}"),
    ],
)
def test_what_is_not_regular_or_too_large(text: str):
    with pytest.raises(Unsupported):
        regular(text, "prefix", Budget())


SLOW = ["(x+x+)+y", "(x|x)*y", ".*(x?){30}x{30}y", "(.*.*.*.*)*y", "(x|xx|xxx)+$y", "(x*)*y"]


@pytest.mark.parametrize("text", SLOW)
def test_what_python_does_not_finish(text: str):
    started = time.process_time()
    assert not regular(text, "prefix", Budget()).matches("x" * 10_000)
    assert regular(text, "prefix", Budget()).matches("x" * 10_000 + "y") == ("$" not in text)
    assert time.process_time() - started < 5


def test_a_document_has_one_budget():
    budget = Budget(30_000)
    for _ in range(10):
        regular("a.*b", "prefix", budget)
    with pytest.raises(Unsupported):
        regular("a.*b", "prefix", budget).matches("a" * 30_000)
    with pytest.raises(Unsupported):
        glob("*", budget)


def test_an_automaton_that_grows_without_end_runs_out():
    """Its states double with each character: what stood 400 places before counts."""
    found = regular("(a|b)*a(a|b){400}$", "prefix", Budget(2_000_000))
    name = "".join("ab"[n * n % 7 % 2] for n in range(20_000))
    with pytest.raises(Unsupported):
        found.matches(name)
