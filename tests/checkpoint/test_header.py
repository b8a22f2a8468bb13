"""Safetensors headers that break a rule, each refused with the file, the tensor and the numbers."""

import json
from pathlib import Path

import pytest

import moeconv
from moeconv.checkpoint.header import MAX_HEADER_BYTES, parse_header
from moeconv.errors import (
    BadHeader,
    BadJson,
    DuplicateKey,
    HeaderTooLong,
    HoleBetweenTensors,
    LfsPointer,
    MoeconvError,
    OverlappingTensors,
    TrailingBytes,
    TruncatedFile,
)
from tests.badinput.builders import (
    SHARD,
    Tensors,
    entries,
    framed,
    qwen,
    shard_bytes,
    values,
    write,
)
from tests.badinput.checks import refused

A, B = "model.a.weight", "model.b.weight"
TWO: Tensors = {A: ("BF16", (4, 4)), B: ("F32", (2,))}  # 32 bytes and 8
DATA = b"".join(values(*item) for item in TWO.items())


def _src(src: Path, raw: bytes) -> Path:
    write(src, qwen())
    (src / SHARD).write_bytes(raw)
    return src


def _entry(**changes: object) -> bytes:
    """A file whose first entry has these members changed."""
    doc = entries(TWO)
    doc[A] |= changes
    return framed(doc) + DATA


# --- lengths -----------------------------------------------------------------------------------
@pytest.mark.parametrize("size", range(8))
def test_a_file_shorter_than_a_length(src: Path, out: Path, size: int):
    _src(src, b"\x01\0\0\0\0\0\0\0"[:size])
    refused(TruncatedFile, SHARD, f"{size} bytes", "takes 8", src=src, out=out)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_header_of_next_to_nothing(src: Path, out: Path, length: int):
    _src(src, length.to_bytes(8, "little") + b"[]"[:length])
    refused(BadHeader, SHARD, "start with `{`", src=src, out=out)


def test_a_header_that_ends_beyond_the_file(src: Path, out: Path):
    whole = shard_bytes(qwen())
    _src(src, whole[:100])
    length = int.from_bytes(whole[:8], "little")
    refused(HeaderTooLong, SHARD, f"{length:,}", "100 bytes", src=src, out=out)


def test_a_header_that_ends_one_byte_beyond_the_file(src: Path, out: Path):
    text = json.dumps({"__metadata__": {"a": "b"}}).encode()
    _src(src, (len(text) + 1).to_bytes(8, "little") + text)
    refused(HeaderTooLong, SHARD, f"{len(text) + 1}", src=src, out=out)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1])
def test_a_header_of_exabytes(src: Path, out: Path, length: int):
    _src(src, length.to_bytes(8, "little") + b"{}")
    refused(HeaderTooLong, SHARD, f"{length:,}", "10 bytes", src=src, out=out)


def test_a_header_of_more_than_100_megabytes(src: Path, out: Path):
    # the file is large enough, but sparse: nothing of it may be read
    _src(src, (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{")
    with (src / SHARD).open("r+b") as stream:
        stream.truncate(MAX_HEADER_BYTES + 1000)
    refused(HeaderTooLong, SHARD, "100,000,001", "100,000,000", src=src, out=out)


# --- data --------------------------------------------------------------------------------------
def test_a_truncated_file(src: Path, out: Path):
    raw = framed(entries(TWO)) + DATA
    _src(src, raw[:-3])
    refused(TruncatedFile, SHARD, f"`{B}`", f"{len(raw) - 3:,}", f"{len(raw):,}", src=src, out=out)


def test_a_file_without_its_data(src: Path, out: Path):
    _src(src, framed(entries(TWO)))
    refused(TruncatedFile, SHARD, f"`{A}`", src=src, out=out)


def test_trailing_bytes(src: Path, out: Path):
    _src(src, framed(entries(TWO)) + DATA + b"\0" * 13)
    refused(TrailingBytes, SHARD, "13 bytes", src=src, out=out)


def test_data_without_any_tensor(src: Path, out: Path):
    _src(src, framed({}) + b"1234")
    refused(TrailingBytes, SHARD, "4 bytes", src=src, out=out)


def test_two_tensors_that_overlap(src: Path, out: Path):
    doc = entries(TWO)
    doc[B]["data_offsets"] = [28, 36]
    raw = framed(doc)
    _src(src, raw + DATA)
    facts = (SHARD, f"`{B}`", f"{len(raw) + 28:,}", f"{len(raw) + 32:,}")
    refused(OverlappingTensors, *facts, src=src, out=out)


def test_two_tensors_on_the_same_bytes(src: Path, out: Path):
    doc = entries({A: ("F32", (2,)), B: ("F32", (2,))})
    doc[B]["data_offsets"] = [0, 8]
    _src(src, framed(doc) + b"12345678")
    refused(OverlappingTensors, SHARD, B, src=src, out=out)


def test_a_gap_between_two_tensors(src: Path, out: Path):
    doc = entries(TWO)
    doc[B]["data_offsets"] = [36, 44]
    raw = framed(doc)
    _src(src, raw + DATA + b"\0" * 4)
    facts = (SHARD, f"`{B}`", f"{len(raw) + 36:,}", f"{len(raw) + 32:,}")
    refused(HoleBetweenTensors, *facts, src=src, out=out)


def test_a_gap_before_the_first_tensor(src: Path, out: Path):
    doc = entries({A: ("F32", (2,))})
    doc[A]["data_offsets"] = [4, 12]
    _src(src, framed(doc) + b"\0" * 12)
    refused(HoleBetweenTensors, SHARD, f"`{A}`", src=src, out=out)


def test_tensors_without_bytes_may_be_anywhere_in_the_order(src: Path, out: Path):
    tensors: Tensors = {**qwen(), "model.empty": ("F32", (0, 4)), "model.one": ("F32", ())}
    write(src, tensors)
    moeconv.fuse(src, out)
    assert moeconv.verify(out, level="source", source=src).ok


# --- entries -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"dtype": "BF17"}, "`BF17`"),
        ({"dtype": "bf16"}, "`bf16`"),
        ({"dtype": None}, "dtype"),
        ({"dtype": ["BF16"]}, "dtype"),
        ({"shape": [4, 3]}, "BF16 [4, 3] takes 24 bytes, its offsets span 32"),
        ({"shape": []}, "BF16 [] takes 2 bytes"),
        ({"shape": [2**40, 2**40]}, "overflows 63 bits"),
        ({"shape": [2**62, 2]}, "overflows 63 bits"),
        ({"shape": [-4, -4]}, "`shape`"),
        ({"shape": [4.0, 4.0]}, "`shape`"),
        ({"shape": [True, 16]}, "`shape`"),
        ({"shape": ["4", "4"]}, "`shape`"),
        ({"shape": [[16]]}, "`shape`"),
        ({"shape": 16}, "`shape`"),
        ({"shape": [1] * 33}, "at most 32"),
        ({"data_offsets": [0, 31]}, "its offsets span 31"),
        ({"data_offsets": [32, 0]}, "its offsets span -32"),
        ({"data_offsets": [-32, 0]}, "`data_offsets`"),
        ({"data_offsets": [0.0, 32.0]}, "`data_offsets`"),
        ({"data_offsets": [False, 32]}, "`data_offsets`"),
        ({"data_offsets": [0, 32, 32]}, "`data_offsets`"),
        ({"data_offsets": [0]}, "`data_offsets`"),
        ({"data_offsets": None}, "`data_offsets`"),
        ({"comment": "hello"}, "nothing else"),
    ],
)
def test_an_entry_that_breaks_a_rule(src: Path, out: Path, changes: dict[str, object], fact: str):
    _src(src, _entry(**changes))
    refused(BadHeader, SHARD, f"`{A}`", fact, src=src, out=out)


@pytest.mark.parametrize("member", ["dtype", "shape", "data_offsets"])
def test_an_entry_that_lacks_a_member(src: Path, out: Path, member: str):
    doc = entries(TWO)
    del doc[A][member]
    _src(src, framed(doc) + DATA)
    refused(BadHeader, SHARD, f"`{A}`", member, src=src, out=out)


@pytest.mark.parametrize("entry", [None, [], "BF16", 5, {}])
def test_an_invalid_entry(src: Path, out: Path, entry: object):
    _src(src, framed({A: entry}))
    refused(BadHeader, SHARD, f"`{A}`", src=src, out=out)


def test_four_bit_values_that_do_not_fill_a_byte(src: Path, out: Path):
    _src(src, _entry(dtype="F4", shape=[63]))
    refused(BadHeader, SHARD, f"`{A}`", "F4 [63]", "whole number of bytes", src=src, out=out)


def test_sizes_beyond_what_the_manifest_can_hold(src: Path, out: Path):
    # an empty tensor may be as wide as it likes, but the output must stay readable
    tensors: Tensors = {**qwen(), "model.wide": ("F32", (0, 2**60))}
    write(src, tensors)
    try:
        moeconv.fuse(src, out)
    except MoeconvError:
        return
    assert moeconv.verify(out).ok


def test_a_name_longer_than_the_manifest_can_hold(src: Path, out: Path):
    tensors: Tensors = {**qwen(), "model." + "x" * 5000: ("F32", (2,))}
    write(src, tensors)
    try:
        moeconv.fuse(src, out)
    except MoeconvError:
        return
    assert moeconv.verify(out).ok


def test_a_name_with_a_number_of_five_thousand_digits(src: Path, out: Path):
    # Python itself refuses to turn so many digits into an integer
    tensors: Tensors = {**qwen(), "model.norm." + "9" * 5000: ("F32", (2,))}
    write(src, tensors)
    try:
        moeconv.fuse(src, out)
    except MoeconvError:
        return
    assert moeconv.verify(out).ok


def test_a_lone_surrogate_in_a_name(src: Path, out: Path):
    _src(src, framed('{"a\\ud800": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'))
    refused(BadHeader, SHARD, r"`a\ud800`", "lone surrogate", src=src, out=out)


# --- JSON --------------------------------------------------------------------------------------
def test_one_tensor_twice_in_a_header(src: Path, out: Path):
    entry = '"model.a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    _src(src, framed("{" + entry + "," + entry + "}") + b"12345678")
    refused(DuplicateKey, SHARD, "`model.a`", "header", src=src, out=out)


def test_one_member_twice_in_an_entry(src: Path, out: Path):
    entry = '"model.a": {"dtype":"F32","shape":[2],"dtype":"F32","data_offsets":[0,8]}'
    _src(src, framed("{" + entry + "}") + b"12345678")
    refused(DuplicateKey, SHARD, "`dtype`", src=src, out=out)


def test_one_key_twice_in_the_metadata(src: Path, out: Path):
    _src(src, framed('{"__metadata__": {"format": "pt", "format": "tf"}}'))
    refused(DuplicateKey, SHARD, "`format`", src=src, out=out)


def test_metadata_twice(src: Path, out: Path):
    _src(src, framed('{"__metadata__": {}, "__metadata__": {}}'))
    refused(DuplicateKey, SHARD, "`__metadata__`", src=src, out=out)


@pytest.mark.parametrize("value", [[], "pt", None, {"format": 1}, {"format": None}, {"a": {}}])
def test_metadata_that_is_not_a_map_of_texts(src: Path, out: Path, value: object):
    _src(src, framed({"__metadata__": value}))
    refused(BadHeader, SHARD, "`__metadata__`", src=src, out=out)


@pytest.mark.parametrize("first", [b" {}", b"\n{}", b"\xef\xbb\xbf{}", b"[]", b"null", b"\0{}"])
def test_a_header_that_does_not_start_with_a_brace(src: Path, out: Path, first: bytes):
    _src(src, framed(first))
    refused(BadHeader, SHARD, "start with `{`", src=src, out=out)


@pytest.mark.parametrize(
    "text",
    [
        b"{}\0\0\0\0",
        b"{",
        b"{}{}",
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 99999999999999999999}',
        b'{"a": "\xff"}',
        b'{"a": "\x1b"}',
        "{}".encode("utf-16"),
        b'{"a":' + b"[" * 200_000,
    ],
    ids=["nul-padding", "cut", "two", "quotes", "nan", "infinity", "2^64", "latin-1", "control",
         "utf-16", "nesting"],
)  # fmt: skip
def test_a_header_that_is_not_json(src: Path, out: Path, text: bytes):
    _src(src, framed(text))
    kind = BadHeader if text[:1] != b"{" else BadJson
    refused(kind, SHARD, src=src, out=out)


def test_a_header_in_which_a_number_overflows_a_float(src: Path, out: Path):
    text = json.dumps(entries(TWO)).replace("[4, 4]", "[1e999]")
    _src(src, framed(text) + DATA)
    refused(BadJson, SHARD, "1e999", src=src, out=out)


def test_spaces_after_a_header_are_fine(src: Path, out: Path):
    write(src, qwen())
    tensors = qwen()
    text = json.dumps(entries(tensors)) + " " * 99
    data = b"".join(values(*item) for item in tensors.items())
    (src / SHARD).write_bytes(framed(text) + data)
    moeconv.fuse(src, out)
    assert moeconv.verify(out, level="source", source=src).ok


def test_the_length_must_be_that_of_the_bytes_at_hand():
    # the origin of a set stores headers, too: there, nobody else holds N against the bytes
    raw = framed("{}  ")
    with pytest.raises(MoeconvError):
        parse_header(b"\x02" + raw[1:], file_size=len(raw), file=0, where="x.safetensors")


# --- names and pointers ------------------------------------------------------------------------
def test_a_name_that_would_act_on_a_terminal_is_escaped(src: Path, out: Path):
    doc = {"\x1b[2J": {"dtype": "F33", "shape": [0], "data_offsets": [0, 0]}}
    _src(src, framed(doc))
    refused(BadHeader, r"`\x1b[2J`", src=src, out=out)


@pytest.mark.parametrize("hidden", [16, 20], ids=["ambiguous", "contradiction"])
def test_names_in_messages_about_shapes_are_escaped(src: Path, out: Path, hidden: int):
    stack = "\x1b[2J.layers.0.mlp.experts"
    tensors: Tensors = {
        f"{stack}.gate_up_proj": ("BF16", (4, 16, 16)),
        f"{stack}.down_proj": ("BF16", (4, hidden, 8)),
    }
    write(src, tensors, config={"model_type": "qwen3_vl_moe", "hidden_size": hidden})
    with pytest.raises(MoeconvError) as caught:
        moeconv.fuse(src, out)
    raw = [line for line in str(caught.value).splitlines() if not line.isprintable()]
    assert not raw, f"written raw: {raw}"


def test_a_git_lfs_pointer(src: Path, out: Path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n"
    _src(src, pointer.encode())
    refused(LfsPointer, SHARD, "git lfs pull", src=src, out=out)


def test_a_file_that_is_something_else_altogether(src: Path, out: Path):
    _src(src, b"PK\x03\x04" + bytes(1000))
    refused(HeaderTooLong, SHARD, "not a safetensors file", src=src, out=out)
