"""Damage to the files of a set: verify says each, never raises; nothing else takes the set."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moeconv
from moeconv.errors import (
    Damaged,
    IoFailed,
    MissingShard,
    MoeconvError,
    NotAnOutput,
    TruncatedFile,
    Unfinished,
    UnsafePath,
    UsageProblem,
)
from tests.badinput.builders import config, qwen, shard_bytes, values, write
from tests.badinput.checks import holds, untouched, within
from tests.manifest.broken import refused_everywhere, reported
from tests.manifest.samples import (
    DATA,
    FILES,
    INDEX_NAME,
    ORIGIN_NAME,
    PART_NAME,
    ROOT_NAME,
)

CONFIG = "config.json"


def _flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(raw)


# --- data files --------------------------------------------------------------------------------
def test_a_data_file_that_is_not_there(made: Path):
    (made / DATA).unlink()
    reported(made, MissingShard, DATA, "is missing")
    with pytest.raises(MoeconvError) as caught:
        moeconv.unfuse(made, made.with_name("out"))
    assert DATA in str(caught.value)


@pytest.mark.parametrize("lost", [1, 100, 4096])
def test_a_data_file_that_is_cut(made: Path, lost: int):
    size = (made / DATA).stat().st_size
    os.truncate(made / DATA, size - lost)
    reported(made, TruncatedFile, DATA, f"{size:,}", f"{size - lost:,}")


def test_a_data_file_that_is_longer(made: Path):
    size = (made / DATA).stat().st_size
    with (made / DATA).open("ab") as stream:
        stream.write(b"\0")
    reported(made, Damaged, DATA, f"{size + 1:,}")


@pytest.mark.parametrize("at", [0, 7, 8, 100, 4095], ids=str)
def test_a_header_that_is_not_the_one_that_was_written(made: Path, at: int):
    _flip(made / DATA, at)
    reported(made, Damaged, DATA, "header")


def test_data_that_is_not_what_was_written(made: Path):
    _flip(made / DATA, -1)
    assert moeconv.verify(made, level="structure").ok  # reads no data
    report = moeconv.verify(made)
    assert len(report.problems) == 1
    holds(report.problems[0], Damaged, DATA, "tensor `model", "its digest is", "the manifest has")


def test_an_expert_is_named_by_its_address(made: Path):
    raw = (made / DATA).read_bytes()
    # the matrix is found by the bytes that it had in the source
    name = "model.layers.1.mlp.experts.1.up_proj.weight"
    _flip(made / DATA, raw.index(values(name, ("BF16", (2, 4)))))
    report = moeconv.verify(made)
    assert [p.message for p in report.problems] == [
        "`model.layers.1.mlp.experts.1.up.weight` is damaged"
    ]


def test_every_damaged_matrix_is_reported(made: Path):
    start = 4096
    raw = bytearray((made / DATA).read_bytes())
    raw[start:] = bytes(b ^ 1 for b in raw[start:])
    (made / DATA).write_bytes(raw)
    # two experts of three projections in two layers, two routers, one embedding
    assert len(moeconv.verify(made).problems) == 2 * 3 * 2 + 2 + 1


def test_a_data_file_that_is_a_link_out(made: Path):
    outside = made.with_name("outside")
    shutil.move(made / DATA, outside)
    (made / DATA).symlink_to(outside)
    refused_everywhere(made, UnsafePath, DATA, str(outside))


# --- everything else ---------------------------------------------------------------------------
@pytest.mark.parametrize("name", [f for f in FILES if f != DATA])
def test_a_file_that_is_a_link_out(made: Path, name: str):
    outside = made.with_name("outside")
    shutil.move(made / name, outside)
    (made / name).symlink_to(outside)
    refused_everywhere(made, UnsafePath, name, str(outside))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_a_directory(made: Path, name: str):
    (made / name).unlink()
    (made / name).mkdir()
    with untouched(made):
        report = moeconv.verify(made)
    assert not report.ok
    assert name in str(report.problems[0])


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_a_pipe(made: Path, name: str):
    (made / name).unlink()
    os.mkfifo(made / name)
    with within(2), untouched(made):
        report = moeconv.verify(made)
    assert not report.ok
    assert name in str(report.problems[0])


@pytest.mark.parametrize("name", [f for f in FILES if f != ROOT_NAME])
def test_a_file_that_is_not_there(made: Path, name: str):
    (made / name).unlink()
    with untouched(made):
        report = moeconv.verify(made)
    holds(report.problems[0], type(report.problems[0]), name, "is missing")
    assert isinstance(report.problems[0], Damaged | MissingShard)


@pytest.mark.parametrize("name", [f for f in FILES if f != ROOT_NAME])
def test_a_file_that_is_empty(made: Path, name: str):
    (made / name).write_bytes(b"")
    with untouched(made):
        report = moeconv.verify(made)
    assert not report.ok
    assert name in str(report.problems[0])


def test_a_sidecar_of_other_bytes(made: Path):
    _flip(made / "tokenizer.json", 3)
    assert moeconv.verify(made, level="structure").ok  # of a sidecar it knows the size only
    report = moeconv.verify(made)
    assert len(report.problems) == 1
    holds(report.problems[0], Damaged, "`tokenizer.json`", "its digest is", "the manifest has")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"{", b"["),
        (b'"num_experts": 2', b'"num_experts": 1'),
        (b'"hidden_size": 4', b'"hidden_size": 5'),
        (b"qwen3_moe", b"qwen3_mof"),
        (b'"hidden_size"', b'"num_experts"'),
    ],
)
def test_a_config_of_other_bytes(made: Path, old: bytes, new: bytes):
    # whatever it says now, it is the bytes that are wrong
    raw = (made / CONFIG).read_bytes()
    assert old in raw
    (made / CONFIG).write_bytes(raw.replace(old, new, 1)[: len(raw)].ljust(len(raw)))
    report = moeconv.verify(made)
    holds(report.problems[0], Damaged, f"`{CONFIG}`", "its digest is")


def test_a_sidecar_of_another_size(made: Path):
    (made / "tokenizer.json").write_bytes(b"{}")
    reported(made, Damaged, "`tokenizer.json`", "2 bytes")


def test_a_stray_safetensors_file(made: Path):
    (made / "model-00002-of-00002.safetensors").write_bytes(shard_bytes(qwen()))
    reported(made, Damaged, "`model-00002-of-00002.safetensors`", "does not belong", "by pattern")


def test_a_stray_file_of_another_kind_is_fine(made: Path):
    (made / "notes.txt").write_text("mine")
    assert moeconv.verify(made).ok


def test_all_damage_is_reported_at_once(made: Path):
    _flip(made / PART_NAME, 5)
    _flip(made / INDEX_NAME, 5)
    _flip(made / ORIGIN_NAME, 5)
    (made / "tokenizer.json").unlink()
    said = "\n".join(map(str, moeconv.verify(made).problems))
    for name in (PART_NAME, INDEX_NAME, ORIGIN_NAME, "tokenizer.json"):
        assert f"`{name}`" in said


# --- no set ------------------------------------------------------------------------------------
@pytest.mark.parametrize("verb", [moeconv.fuse, moeconv.unfuse])
def test_an_unfinished_output_is_not_a_source(made: Path, verb: Callable[..., object]):
    (made / ROOT_NAME).unlink()
    out = made.with_name("out")
    with untouched(made, out), pytest.raises(Unfinished) as caught:
        verb(made, out)
    holds(caught.value, Unfinished, "`set`", ROOT_NAME, "written last")


@pytest.mark.parametrize("ask", [moeconv.fingerprint, lambda path: moeconv.diff(path, path)])
def test_an_unfinished_output_is_refused_by_every_command(
    made: Path, ask: Callable[[Path], object]
):
    (made / ROOT_NAME).unlink()
    with pytest.raises(Unfinished):
        ask(made)


def test_verify_of_an_unfinished_output_says_so(made: Path):
    # it was written by moeconv, just not to the end
    (made / ROOT_NAME).unlink()
    try:
        problems = moeconv.verify(made).problems
    except MoeconvError as problem:
        problems = (problem,)
    holds(problems[0], Unfinished, ROOT_NAME)


def test_verify_of_a_foreign_directory(tmp_path: Path):
    src = write(tmp_path / "src", qwen())
    with untouched(src), pytest.raises(NotAnOutput) as caught:
        moeconv.verify(src)
    holds(caught.value, NotAnOutput, str(src), "--level source")


def test_verify_of_nothing(tmp_path: Path):
    with pytest.raises(IoFailed):
        moeconv.verify(tmp_path / "nothing")


@pytest.mark.parametrize(
    "options", [{"level": "nonsense"}, {"level": "source"}, {"level": "digest", "source": "x"}]
)
def test_levels_that_do_not_go_together(made: Path, options: dict[str, Any]):
    with pytest.raises(UsageProblem) as caught:
        moeconv.verify(made, **options)
    holds(caught.value, UsageProblem, "structure, digest, source")


def test_verify_against_a_source_that_differs(made: Path, tmp_path: Path):
    tensors = qwen(2, 2, 4, layers=2)
    src = write(tmp_path / "src", tensors, config=config(experts=2, width=2, hidden=4))
    assert moeconv.verify(made, level="source", source=src).ok
    _flip(src / "model.safetensors", -1)
    report = moeconv.verify(made, level="source", source=src)
    holds(report.problems[0], Damaged, "model.safetensors", "first difference", "byte")
