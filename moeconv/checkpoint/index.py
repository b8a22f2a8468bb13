"""`model.safetensors.index.json`: which file holds which tensor."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Final

from moeconv.core.names import relative_path_problem
from moeconv.core.strict_json import Json, encodable, loads, may_escape
from moeconv.errors import (
    BadIndex,
    MoeconvError,
    TensorNotInFile,
    TensorNotInIndex,
    UnsafePath,
    quoted,
)

INDEX_NAME: Final = "model.safetensors.index.json"
MAX_INDEX_BYTES: Final = 512 * 1024 * 1024
_MAX_REPORTED: Final = 20


@dataclass(frozen=True, slots=True)
class Index:
    """A parsed index. `total_size` is as stored; real files get it wrong or omit it."""

    name: str
    raw: bytes
    total_size: int | None
    weight_map: dict[str, str]  # tensor -> file, relative to the index

    @property
    def files(self) -> tuple[str, ...]:
        """The files it names, in first-seen order."""
        return tuple(dict.fromkeys(self.weight_map.values()))


def parse_index(raw: bytes, *, name: str) -> Index:
    """Parse and check an index; the first unsafe file names are reported together.

    Raises BadIndex, UnsafePath, BadJson, DuplicateKey.
    """
    doc = loads(raw, where=quoted(name), shallow=True)
    weight_map = doc.get("weight_map") if isinstance(doc, dict) else None
    if not isinstance(doc, dict) or not isinstance(weight_map, dict):
        raise _bad(name, "it needs a `weight_map` object")
    escaped = may_escape(raw)
    checked: dict[str, str] = {}
    files: dict[str, str] = {}  # one string object for each file, however many tensors it has
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or (escaped and not encodable(tensor + file)):
            raise _bad(name, f"the entry of {quoted(tensor)} is not a string")
        checked[tensor] = files.setdefault(file, file)
    unsafe = (
        _unsafe(name, file, problem) for file in files if (problem := relative_path_problem(file))
    )
    if problems := list(islice(unsafe, _MAX_REPORTED)):
        raise problems[0].with_also(tuple(problems[1:]))
    if not checked:
        raise _bad(name, "its `weight_map` names no tensor")
    return Index(name, raw, _total_size(doc.get("metadata")), checked)


def _total_size(metadata: Json) -> int | None:
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(total, float) and total.is_integer():
        return int(total)
    return total if type(total) is int else None


def _bad(name: str, cause: str) -> BadIndex:
    return BadIndex(
        f"{quoted(name)} is not an index of safetensors files",
        at=quoted(name),
        cause=cause,
    )


def _unsafe(name: str, file: str, problem: str) -> MoeconvError:
    return UnsafePath(
        f"the index names a file {quoted(file)}, which {problem}",
        at=f"{quoted(name)}, `weight_map`",
        cause="a checkpoint may only name files beside its index, or in folders below it",
        fix="use a copy of the checkpoint from a source that you trust",
    )


def check_index(index: Index, stored: dict[str, str]) -> None:
    """Compare the index with the files that hold the tensors, by the tensors' names.

    Raises TensorNotInFile, TensorNotInIndex; the first problems are reported together.
    """
    if stored == index.weight_map:
        return
    names = index.weight_map
    elsewhere = [t for t, file in names.items() if stored.get(t) != file]
    unnamed = [t for t in stored if t not in names]
    count = len(elsewhere) + len(unnamed)
    problems: list[MoeconvError] = [
        *(_not_in_file(index, t, names[t], stored.get(t)) for t in elsewhere[:_MAX_REPORTED]),
        *(_not_in_index(index, t, stored[t]) for t in unnamed[:_MAX_REPORTED]),
    ]
    if count > 1:
        problems[0].cause = f"{problems[0].cause}; {count:,} entries in total disagree"
    if problems:
        raise problems[0].with_also(tuple(problems[1:_MAX_REPORTED]))


def _not_in_file(index: Index, tensor: str, file: str, where: str | None) -> MoeconvError:
    return TensorNotInFile(
        f"{quoted(tensor)} is not in {quoted(file)}",
        at=f"{quoted(index.name)}, `weight_map`",
        cause=f"it is in {quoted(where)}" if where else "no file of the checkpoint holds it",
    )


def _not_in_index(index: Index, tensor: str, file: str) -> MoeconvError:
    return TensorNotInIndex(
        f"{quoted(tensor)} is not in the index",
        at=f"{quoted(file)}, tensor {quoted(tensor)}",
        cause=f"{quoted(index.name)} does not name it: some programs load it, others do not",
        fix="pass `--only-index` to leave out what the index does not name",
    )
