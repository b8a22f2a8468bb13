"""Maps on a disk: every ending, and everything that a file can do wrong."""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeconv.errors import (
    BadJson,
    BadPlacementFile,
    DuplicateKey,
    IoFailed,
    Malformed,
    MoeconvError,
    TorchNeeded,
    UsageProblem,
)
from moeconv.placement.files import read_map
from tests.badinput.checks import holds, within

ROWS = ((0, 1, 2), (2, 1, 0))
RAW = tuple(enumerate(ROWS))


def refused(which: str | Path, kind: type[MoeconvError], *facts: str) -> None:
    with pytest.raises(MoeconvError) as caught:
        read_map(which)
    holds(caught.value, kind, *facts)


def file(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# --- what can be read --------------------------------------------------------------------------
def test_inline_json():
    raw = read_map(' {"physical_to_logical_map": [[0, 1, 2], [2, 1, 0]]}')
    assert (raw.format, raw.rows) == ("sglang", RAW)
    assert read_map("[[0,1,2],[2,1,0]]").format == "vllm"


def test_json(tmp_path: Path):
    path = file(tmp_path, "map.json", '{"physical_to_logical_map": [[0, 1, 2], [2, 1, 0]]}')
    assert read_map(path) == read_map(str(path))
    assert read_map(path).rows == RAW


@pytest.mark.parametrize("ending", ["yaml", "yml"])
def test_yaml(tmp_path: Path, ending: str):
    text = "initial_global_assignments:\n  3: [0, 1, 2]\n  11: [2, 1, 0]\nnum_slots: 3\n"
    raw = read_map(file(tmp_path, f"map.{ending}", text))
    assert (raw.format, raw.rows) == ("trtllm", ((3, ROWS[0]), (11, ROWS[1])))


@pytest.mark.parametrize("ending", ["pt", "pth"])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_torch(tmp_path: Path, ending: str, kind: torch.dtype):
    path = tmp_path / f"map.{ending}"
    torch.save({"physical_to_logical_map": torch.tensor(ROWS, dtype=kind)}, path)
    assert (read_map(path).format, read_map(path).rows) == ("sglang", RAW)
    torch.save({"phy2log": torch.tensor(ROWS), "logcnt": torch.ones(2, 3)}, path)
    assert (read_map(path).format, read_map(path).rows) == ("eplb", RAW)
    torch.save(torch.tensor(ROWS, dtype=kind), path)
    assert (read_map(path).format, read_map(path).rows) == ("eplb", RAW)
    torch.save({"physical_to_logical_map": [list(row) for row in ROWS]}, path)
    assert read_map(path).rows == RAW


def test_numpy(tmp_path: Path):
    np.save(tmp_path / "map.npy", np.array(ROWS, dtype=np.int32))
    assert (read_map(tmp_path / "map.npy").format, read_map(tmp_path / "map.npy").rows) == (
        "eplb",
        RAW,
    )
    np.save(tmp_path / "map.npy", np.array(ROWS[0]))
    assert read_map(tmp_path / "map.npy").rows == ((0, ROWS[0]),)
    assert read_map(tmp_path / "map.npy").format == "vllm"


# --- what is refused ---------------------------------------------------------------------------
def test_an_unknown_ending(tmp_path: Path):
    refused(file(tmp_path, "map.txt", "[]"), UsageProblem, "map.txt", ".json, .yaml")


def test_a_file_that_is_not_there(tmp_path: Path):
    refused(tmp_path / "map.json", IoFailed, "map.json")


def test_a_file_that_is_too_large(tmp_path: Path):
    path = tmp_path / "map.json"
    path.touch()
    os.truncate(path, 300 * 1024 * 1024)
    refused(path, Malformed, "too large")


def test_invalid_json_or_a_duplicate_key(tmp_path: Path):
    refused("[[0,1", BadJson, "inline JSON")
    refused("[[NaN]]", BadJson)
    refused('{"phy2log": [[0]], "phy2log": [[1]]}', DuplicateKey, "phy2log")
    refused(file(tmp_path, "map.json", b"[\xff]"), BadJson, "map.json")


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("a: 1\na: 2\n", "`a` appears twice"),
        ("initial_global_assignments: {3: [0], 3: [1]}\n", "`3` appears twice"),
        ("initial_global_assignments: {3: [0], '3': [1]}\n", "`3` appears twice"),
        ("? [1]\n: 2\n", "YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "python/object/apply"),
        ("a: 2001-01-01\n", "a date is not allowed"),
        ("1.5: 2\n", "a float is not allowed"),
        ("a: !!int ''\n", "YAML"),
        ("a: !!timestamp x\n", "YAML"),
        ("a: [1\n", "YAML"),
        ("a: &a [*a]\n", "YAML"),
        ("<<: {a: 1}\n", "YAML"),
        ("\x00", "YAML"),
    ],
)
def test_yaml_that_is_not_a_map(tmp_path: Path, text: str, fact: str):
    refused(file(tmp_path, "map.yaml", text), BadPlacementFile, "map.yaml", fact)


def test_yaml_that_grows_by_aliases(tmp_path: Path):
    lines = ["a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path = file(tmp_path, "map.yaml", "\n".join(lines))
    with within(30):
        refused(path, BadPlacementFile, "aliases")


def test_yaml_that_is_too_deep(tmp_path: Path):
    refused(file(tmp_path, "map.yaml", "[" * 5000), BadPlacementFile)


def test_a_pickle_is_never_run(tmp_path: Path):
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "trapped",))

    refused(file(tmp_path, "map.pt", pickle.dumps(Trap())), BadPlacementFile, "torch")
    torch.save({"phy2log": Trap()}, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", BadPlacementFile, "torch")
    np.save(tmp_path / "map.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    refused(tmp_path / "map.npy", BadPlacementFile, "NumPy")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("value", "fact"),
    [
        (torch.ones(2, 3), "torch.float32"),
        (torch.ones(2, 3, dtype=torch.bool), "torch.bool"),
        (torch.zeros(1, dtype=torch.int64).expand(10**6, 10**6), "more values"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), "must be an integer, not a list"),
        ({"logical_count": torch.ones(2, 2, 3)}, "load record"),
        ({"phy2log": {1: 2}}, "must be a list of rows"),
        ({3: 4}, "none of the keys"),
        ("text", "a string"),
    ],
)
def test_torch_files_that_hold_no_map(tmp_path: Path, value: object, fact: str):
    torch.save(value, tmp_path / "map.pt")
    refused(tmp_path / "map.pt", BadPlacementFile, "map.pt", fact)


def test_torch_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = file(tmp_path, "map.pt", b"")
    refused(path, TorchNeeded, "map.pt", "pip install 'moeconv[torch]'")


def test_arrays_that_are_not_maps(tmp_path: Path):
    np.save(tmp_path / "map.npy", np.ones((2, 3)))
    refused(tmp_path / "map.npy", BadPlacementFile, "one array of integers")
    np.save(tmp_path / "map.npy", np.ones((2, 2, 2), dtype=int))
    refused(tmp_path / "map.npy", BadPlacementFile, "3 dimensions")
    with (tmp_path / "map.npy").open("wb") as stream:
        np.savez(stream, a=np.ones(3, dtype=int))
    refused(tmp_path / "map.npy", BadPlacementFile, "one array of integers")


@given(
    st.sampled_from([".json", ".yaml", ".pt", ".npy"]),
    st.binary(max_size=80) | st.text(max_size=80).map(str.encode),
)
def test_any_bytes_are_a_map_or_refused_in_our_words(ending: str, data: bytes):
    with tempfile.TemporaryDirectory() as folder:
        path = file(Path(folder), f"map{ending}", data)
        refusal = caught(path)
    assert refusal is None or all(line.isprintable() for line in str(refusal).splitlines())


@given(st.recursive(st.integers() | st.none() | st.text(), st.lists, max_leaves=8))
def test_any_inline_json_is_a_map_or_refused_in_our_words(doc: object):
    refusal = caught(json.dumps([doc]))
    assert refusal is None or refusal.fix


def caught(which: str | Path) -> MoeconvError | None:
    """How a map is refused, if it is; any other exception fails the test."""
    try:
        read_map(which)
    except MoeconvError as problem:
        return problem
    return None


# --- a few bytes that would be gigabytes -------------------------------------------------------
def header(shape: tuple[int, ...], kind: str = "<i8") -> bytes:
    """The header of a `.npy` file, and nothing behind it."""
    text = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (-(11 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("shape", "fact"),
    [
        ((10**12, 0), "rows of 0 slots"),
        ((0,), "rows of 0 slots"),
        ((0, 4), "a map has 1 to 10,000 rows"),
        ((10_001, 1), "a map has 1 to 10,000 rows"),
        ((1, 1_048_577), "1 to 1,048,576"),
        ((-1, 4), "a map has 1 to 10,000 rows"),
        ((9_000, 1_000_000), "does not match the data"),
        ((2, 3), "does not match the data"),
    ],
)
def test_the_shape_of_an_array_is_looked_at_first(
    tmp_path: Path, shape: tuple[int, ...], fact: str
):
    refused(file(tmp_path, "map.npy", header(shape)), BadPlacementFile, "map.npy", fact)


@pytest.mark.parametrize(
    "value",
    [
        torch.empty((10**9, 0), dtype=torch.int64),
        torch.empty((0, 4), dtype=torch.int64),
        torch.empty((20_000, 1), dtype=torch.int64),
        torch.empty((3, 0, 10**6), dtype=torch.int32),
    ],
)
def test_the_shape_of_a_tensor_is_looked_at_first(tmp_path: Path, value: torch.Tensor):
    for doc in (value, {"phy2log": value}):
        torch.save(doc, tmp_path / "map.pt")
        refused(tmp_path / "map.pt", BadPlacementFile, "map.pt", "rows")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_buffer_in_a_pickle_is_not_made(tmp_path: Path, *, zipped: bool):
    class Buffer:
        def __reduce__(self) -> tuple[object, ...]:
            return (bytearray, (10**11,))

    torch.save({"phy2log": Buffer()}, tmp_path / "map.pt", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "map.pt", BadPlacementFile, "a bytearray is not allowed")


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("[[0], [], [0]]", "[1]: has no slots"),
        ('{"phy2log": [[0, 1048576]]}', "phy2log[0]: has expert 1048576"),
        (f"[{','.join(['[0]'] * 10_001)}]{' ' * 100_000}", "10,001 rows"),
        (f"[{','.join(['0'] * 1_048_577)}]", "1,048,577 slots"),
    ],
)
def test_rows_are_bounded(text: str, fact: str):
    refused(text, BadPlacementFile, fact)


def test_yaml_is_read_as_its_values(tmp_path: Path):
    text = "layer_updates_per_iter: 0\ninitial_global_assignments: {1: &a [0, 1], 2: *a}\n"
    assert read_map(file(tmp_path, "map.yaml", text)).rows == ((1, (0, 1)), (2, (0, 1)))


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("a: *b\n", "refers to nothing before it"),
        ("a: 1\n---\nb: 2\n", "more than one document"),
        ("[" * 200 + "]" * 200, "nested more than 100 deep"),
        ("{" + "a: {" * 200 + "}" * 201, "nested more than 100 deep"),
        ("a: !!set {}\n", "tag:yaml.org,2002:set"),
        ("true: 1\n", "neither a string nor an id"),
        ("a: 0x10\n", "plain decimal"),
        ("# " + "x" * (4 * 1024 * 1024), "YAML may have at most"),
    ],
)
def test_yaml_that_is_more_than_values(tmp_path: Path, text: str, fact: str):
    refused(file(tmp_path, "map.yaml", text), BadPlacementFile, fact)
