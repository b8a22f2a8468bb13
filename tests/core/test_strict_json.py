"""JSON that is read faster where it is shallow means, and refuses, what it means else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeconv.core.strict_json import Json, loads
from moeconv.errors import BadJson, DuplicateKey, MoeconvError

KEYS = st.sampled_from(["a", "b", ":", 'a":', "é", "a.b"])
LEAVES = st.none() | st.booleans() | st.integers(-9, 9) | KEYS


def spelled(pairs: list[tuple[str, str]], colon: str) -> str:
    """An object with its pairs as they come, twice the same key too."""
    return "{" + ",".join(f"{json.dumps(key)}{colon}{value}" for key, value in pairs) + "}"


def objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Objects whose keys may stand twice, with and without spaces before colons."""
    pairs = st.lists(st.tuples(KEYS, values), max_size=4)
    return st.builds(spelled, pairs, st.sampled_from([":", " :", ": "]))


DOCUMENTS = st.recursive(
    LEAVES.map(json.dumps),
    lambda inner: objects(inner) | st.lists(inner, max_size=3).map(lambda x: f"[{','.join(x)}]"),
    max_leaves=12,
)


def outcome(text: str, *, shallow: bool) -> Json | tuple[str, ...]:
    """The document, or what is said against it."""
    try:
        return loads(text.encode(), where="here", shallow=shallow)
    except MoeconvError as problem:
        return (type(problem).__name__, str(problem))


@given(DOCUMENTS, st.sampled_from(["", " ", " x", ",", "}", ":"]), st.integers(0, 8))
def test_shallow_or_not_is_one(text: str, more: str, cut: int) -> None:
    """Of what is broken, too: the same is said of it."""
    whole = text + more
    for broken in (whole, whole[: len(whole) - cut]):
        assert outcome(broken, shallow=True) == outcome(broken, shallow=False)


@pytest.mark.parametrize(
    "end", [',"u":NaN}', ',"u":99999999999999999999}', ',"u":1e999}', ',"u":' + "[" * 1500, " x"]
)
def test_a_duplicate_key_is_reported_before_what_follows(end: str) -> None:
    with pytest.raises(DuplicateKey):
        loads(b'{"t":{"a":1,"a":1}' + end.encode(), where="here", shallow=True)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1,"a":1}',
        '{"a":{"b":1,"b":1}}',
        '{"a":{"b":1},"a":{"b":1}}',
        '{"a":{"b":{"c":1,"c":2}}}',
        '{"a":[{"c":1,"c":2}]}',
        '{"a" :1,"a" :1}',
        # as many members as there are `":`, but one is a text's
        '{"a" :{"b":1},"a" :{":":1}}',
    ],
)
def test_a_duplicate_key_is_found(text: str) -> None:
    with pytest.raises(DuplicateKey):
        loads(text.encode(), where="here", shallow=True)


def test_text_with_colons_is_not_a_duplicate() -> None:
    doc: Json = {"a:b": {":": ":::"}, "c": {}}
    assert loads(json.dumps(doc).encode(), where="here", shallow=True) == doc


@pytest.mark.parametrize("unit", ["[]", "{}", "[0]", '{"a":[]}'])
def test_more_lists_and_objects_than_any_document_has_are_refused_unparsed(unit: str) -> None:
    text = f"[{','.join([unit] * 5000)}]"
    with pytest.raises(BadJson) as caught:
        loads(text.encode(), where="map.json")
    assert "too many lists and objects" in str(caught.value)
    assert caught.value.at == "map.json"


def test_a_header_of_the_smallest_tensors_is_within() -> None:
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = "{" + ",".join(f'"{n}":{entry}' for n in range(20_000)) + "}"
    doc = loads(text.encode(), where="x", shallow=True)
    assert isinstance(doc, dict)
    assert len(doc) == 20_000
