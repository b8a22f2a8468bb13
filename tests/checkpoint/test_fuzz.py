"""Parsers meet damaged bytes: a value or a MoeconvError comes out, never anything else."""

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from moeconv.checkpoint.config import Config
from moeconv.checkpoint.header import StoredTensor, header_length, parse_header
from moeconv.checkpoint.index import parse_index
from moeconv.checkpoint.origin import Origin, OriginFile, origin_bytes, parse_origin
from moeconv.core.digest import digest
from moeconv.core.strict_json import error_json
from moeconv.detect.detect import detect
from moeconv.errors import MoeconvError
from moeconv.layout.recipe_toml import parse_recipe
from moeconv.manifest.part_reader import parse_part
from moeconv.manifest.reader import parse_root
from tests.badinput.builders import entries, framed, index_doc, nbytes, qwen, two_files
from tests.badinput.test_recipes import GOOD
from tests.checkpoint.mutations import broken, flipped
from tests.manifest.samples import PART, ROOT, ROOT_BODY, dump

MANY = settings(max_examples=300, database=None)
TENSORS = qwen(1, 4, 8)
HEADER = dump({"__metadata__": {"format": "pt"}, **entries(TENSORS)})
DATA_BYTES = sum(map(nbytes, TENSORS.values()))
INDEX = dump(index_doc(two_files(TENSORS)))
STORED = tuple(
    StoredTensor(name, dtype, shape, 0, 0, nbytes((dtype, shape)))
    for name, (dtype, shape) in TENSORS.items()
)


def _said(problem: MoeconvError) -> None:
    """Whatever is wrong can be said, printably, and as JSON."""
    raw = [line for line in str(problem).splitlines() if not line.isprintable()]
    assert not raw, f"written raw: {raw}"
    dump(error_json(problem))


def _origin() -> bytes:
    raw = framed(HEADER)
    size = len(raw) + DATA_BYTES
    header = parse_header(raw, file_size=size, file=0, where="model.safetensors")
    index = parse_index(INDEX, name="model.safetensors.index.json")
    return origin_bytes(Origin((OriginFile("model.safetensors", size, header),), index))


ORIGIN = _origin()


@MANY
@given(broken(HEADER))
def test_headers(text: bytes):
    raw = framed(text)
    try:
        length = header_length(raw, file_size=len(raw) + DATA_BYTES, where="x")
        header = parse_header(raw[: 8 + length], file_size=len(raw) + DATA_BYTES, file=0, where="x")
    except MoeconvError as problem:
        _said(problem)
        return
    # whatever is accepted covers the data exactly
    assert sum(t.nbytes for t in header.tensors) == DATA_BYTES


@MANY
@given(flipped(framed(HEADER)))
def test_whole_heads_of_files(raw: bytes):
    try:
        length = header_length(raw, file_size=len(raw) + DATA_BYTES, where="x")
        parse_header(raw[: 8 + length], file_size=len(raw) + DATA_BYTES, file=0, where="x")
    except MoeconvError as problem:
        _said(problem)


@MANY
@given(broken(INDEX))
def test_indexes(raw: bytes):
    try:
        index = parse_index(raw, name="i")
    except MoeconvError as problem:
        _said(problem)
        return
    assert all("/" not in file and file not in ("", "..") for file in index.files)


@MANY
@given(broken(ROOT_BODY))
def test_roots(body: bytes):
    try:
        parse_root(body + b"\n" + digest(body).encode() + b"\n")
    except MoeconvError as problem:
        _said(problem)


@MANY
@given(flipped(ROOT))
def test_roots_whose_digest_is_wrong(raw: bytes):
    try:
        parse_root(raw)
    except MoeconvError as problem:
        _said(problem)
        return
    assert raw == ROOT


@MANY
@given(broken(PART))
def test_parts(raw: bytes):
    try:
        parse_part(raw, parse_root(ROOT), where="p")
    except MoeconvError as problem:
        _said(problem)


@MANY
@given(flipped(ORIGIN))
def test_origins(raw: bytes):
    try:
        parse_origin(raw)
    except MoeconvError as problem:
        _said(problem)


@MANY
@given(broken(ORIGIN.partition(b"\n")[0]))
def test_heads_of_origins(head: bytes):
    try:
        origin = parse_origin(head + b"\n" + ORIGIN.partition(b"\n")[2])
    except MoeconvError as problem:
        _said(problem)
        return
    # what is accepted comes out as it went in
    assert parse_origin(origin_bytes(origin)) == origin


@MANY
@given(flipped(GOOD.encode()), st.booleans())
def test_recipes(raw: bytes, use: bool):
    text = raw.decode("utf-8", "replace")
    try:
        recipe = parse_recipe(text, where="mine.toml")
    except MoeconvError as problem:
        _said(problem)
        return
    if use:
        # a recipe that is accepted can be used, for better or worse
        with contextlib.suppress(MoeconvError):
            detect(STORED, Config(), (recipe,), files=("x",)).checked()


@st.composite
def _recipes(draw: st.DrawFn) -> str:
    """The good recipe with words of its own language exchanged, doubled or left out."""
    words = GOOD.replace('"', ' " ').replace("{", " { ").replace("}", " } ").split(" ")
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(words) - 1))
        act = draw(st.sampled_from(["swap", "double", "cut"]))
        if act == "swap":
            words[at] = words[draw(st.integers(0, len(words) - 1))]
        elif act == "double":
            words.insert(at, words[at])
        else:
            words[at] = ""
    text = " ".join(words)
    for mark in ('"', "{", "}"):
        text = text.replace(f" {mark} ", mark)
    return text


@MANY
@given(_recipes())
def test_recipes_in_their_own_words(text: str):
    try:
        recipe = parse_recipe(text, where="mine.toml")
    except MoeconvError as problem:
        _said(problem)
        return
    with contextlib.suppress(MoeconvError):
        detect(STORED, Config(), (recipe,), files=("x",)).checked()
