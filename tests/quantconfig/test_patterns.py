"""Patterns match what `re` and `fnmatch` match; what may take long is refused."""

import fnmatch
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.quantconfig.match_rules import Budget, MatchRules, Names, UnsupportedPattern

NAMES = st.text("ab.1_", max_size=8)
ATOMS = st.sampled_from([
    *("a", "b", ".", r"\.", r"\d", r"\w", r"\D", r"\W", r"\s", r"\S", "[ab]", "[^ab]", "[a-b1]"),
    *(r"\x61", "a1", "1", r"\.a", r"\+"),
    *(r"[\d_.-]", "[-a]", "^", "$", "_", "a", r"\_", "[^.]", "(?=a)", "(?!a.)", "(?<=a)", r"\b"),
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


def matched(rules: MatchRules, text: str, stack: str, suffixes: set[str]) -> set[str] | None:
    """The suffixes that a text matches; None where it is unsupported."""
    try:
        matcher = rules.matcher(text, Budget())
    except UnsupportedPattern:
        return None
    assert matcher is not None
    return set(matcher.suffixes(Names(stack, frozenset(suffixes))))


@settings(max_examples=500, deadline=None)
@given(REGULAR, NAMES, st.sets(NAMES, max_size=8))
def test_regular_expressions(text: str, stack: str, suffixes: set[str]):
    found = matched(MatchRules("ignore", ""), f"re:{text}", stack, suffixes)
    assert found is None or found == {s for s in suffixes if re.match(text, stack + s)}
    found = matched(MatchRules("dynamic", ""), f"-:{text}", stack, suffixes)
    assert found is None or found == {s for s in suffixes if re.match(text, stack + s)}


@settings(max_examples=200, deadline=None)
@given(st.text("ab.1_*?[]!-", max_size=8), NAMES, st.sets(NAMES, max_size=8))
def test_globs(text: str, stack: str, suffixes: set[str]):
    found = matched(MatchRules("exclude", ""), f"{text}*", stack, suffixes)
    assert found == {s for s in suffixes if fnmatch.fnmatchcase(stack + s, f"{text}*")}


@pytest.mark.parametrize(
    "text",
    [
        *(r".*layers\.\d+\..*experts\.\d+\..*(gate|up|down)_proj.*", r"^(?!.*self_attn).*\d+$"),
        *("(?P<n>a)", r"(a)\1", r"\bexperts", r"\Aa", r"a\Z", "a++", "(?:ab)+c", "(a+)?b"),
        *(r".*\w+y", ".*a.*b.*y"),
        f"model\\.layers\\.({'|'.join(map(str, range(61)))})\\.mlp\\.experts\\.\\d+\\..*_proj",
    ],
)
def test_what_is_supported(text: str):
    assert matched(MatchRules("ignore", ""), f"re:{text}", "a", {"b"}) is not None


# nested repeats, repeated alternatives, and more ways than anybody's pattern has
SLOW = (
    *("(x+x+)+y", "(x|x)*y", ".*(x?){30}x{30}y", "(.*.*.*.*)*y", "(x|xx|xxx)+$y", "(x*)*y"),
    *(
        "x?" * 30 + "x" * 30,
        "(x|x)" * 30 + "y",
        ".*.*.*.*.*y",
        ".*.*.*y",
        r"\w+(.*)(.*?)y",
        "((a|b)c)*",
        "(?:[(]+x)+",
        r"(\)+)+",
    ),
    *(
        "(?:[(]+x)+",
        r"(\)+)+",
        "(?#(a)(x+)+",
        "(?x)(x+ #)\n)+y",
        "(a|b)*a(a|b){400}$",
        "(?=(x+)+y)",
    ),
)
INVALID = ("(", ")", "a)", "[", "[a", "[z-a]", "a{3,2}", "\\", "*a", "a**", "(?i)a", "a" * 1001)


@pytest.mark.parametrize("text", [*SLOW, *INVALID])
def test_what_is_invalid_or_may_take_too_long(text: str):
    assert matched(MatchRules("ignore", ""), f"re:{text}", "x" * 60, {"x"}) is None


def test_a_long_glob():
    assert matched(MatchRules("exclude", ""), "*" * 1001, "a", {"b"}) is None


def test_a_hundred_patterns_on_the_names_of_a_large_model():
    """Sixty layers of 384 experts with three projections."""
    suffixes = frozenset(f".{e}.{p}_proj" for e in range(384) for p in ("gate", "up", "down"))
    names = [Names(f"model.layers.{n}.mlp.experts", suffixes) for n in range(60)]
    rules, budget = MatchRules("exclude_modules", "modelopt"), Budget()
    started = time.process_time()
    for number in range(100):
        for text in (rf"re:.*layers\.{number}\..*\.\d+\.up_proj", f"model.layers.{number}.s*"):
            matcher = rules.matcher(text, budget)
            assert matcher is not None
            found = sum(len(matcher.suffixes(some)) for some in names)
            assert found == (384 if text.startswith("re:") and number < 60 else 0)
    assert time.process_time() - started < 30


def test_a_document_has_one_budget():
    budget, rules = Budget(100), MatchRules("ignore", "")
    names = Names("a", frozenset(map(str, range(30))))
    for text in ("re:.*1", "re:a2", "re:.*3"):
        matcher = rules.matcher(text, budget)
        assert matcher is not None
        assert matcher.suffixes(names)
    matcher = rules.matcher("re:b", budget)  # which is seen without trying any
    assert matcher is not None
    assert not matcher.suffixes(names)
    matcher = rules.matcher("re:.*4", budget)
    assert matcher is not None
    with pytest.raises(UnsupportedPattern):
        matcher.suffixes(names)
