"""`model.safetensors.index.json`: which file holds which tensor."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Final

from moeconv.core.json_value import Json
from moeconv.core.names import file_name_problem
from moeconv.core.strict_json import encodable, loads, may_escape
from moeconv.errors import BadIndex, MoeconvError, UnsafePath, quoted

INDEX_NAME: Final = "model.safetensors.index.json"
MAX_INDEX_BYTES: Final = 512 * 1024 * 1024
_MAX_REPORTED: Final = 20


@dataclass(frozen=True, slots=True)
class Index:
    """A parsed index. `total_size` is as stored; real files get it wrong or omit it."""

    name: str
    raw: bytes
    total_size: int | None
    weight_map: dict[str, str]  # tensor -> plain file name

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
        _unsafe(name, file, problem) for file in files if (problem := file_name_problem(file))
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
        cause="a checkpoint may only name files next to its index",
        fix="do not use this checkpoint unless you know who wrote it and why",
    )
