"""The table of other systems' map formats: parsing a document of any of them, and writing one.

A new format is one module with a `FORMAT`, and one line in the table.
"""

from __future__ import annotations

from typing import Final

from moeconv.core.schema import Problems, Table
from moeconv.core.strict_json import Json
from moeconv.core.text import counted
from moeconv.errors import BadPlacement, BadPlacementFile, quoted
from moeconv.placement import ascend, base, eplb, sglang, trtllm, vllm
from moeconv.placement.model import MoeLayers, Placement, check

FORMATS: Final[dict[str, base.MapFormat]] = {
    f.name: f for f in (sglang.FORMAT, vllm.FORMAT, trtllm.FORMAT, ascend.FORMAT, eplb.FORMAT)
}
_LOAD_KEY: Final = "logical_count"


def parse_map(doc: Json, *, where: str, bare: str = vllm.VLLM) -> base.RawMap:
    """The map in a decoded document. `bare`: the format of rows without any key.

    Raises BadPlacementFile with all problems of the document.
    """
    problems = Problems()
    raw = _parsed(doc, bare, problems, where)
    if problems.count:
        raise BadPlacementFile(
            f"{quoted(where)} is not a placement map: {counted(problems.count, 'problem')}",
            at=quoted(where),
            cause="\n         ".join(problems.shown()),
            fix="regenerate the map; `moeconv placement convert` writes every format it reads",
        )
    return raw


def _parsed(doc: Json, bare: str, problems: Problems, where: str) -> base.RawMap:
    if isinstance(doc, list):
        return vllm.read_rows(doc, bare, problems)
    if not isinstance(doc, dict):
        problems.add("", f"is neither an object nor a list of rows, but {base.kind_of(doc)}")
        return base.RawMap(bare, base.BY_ROW, ())
    if _LOAD_KEY in doc and sglang.KEY not in doc:
        raise BadPlacementFile(
            f"{quoted(where)} is a load record, not a placement",
            at=quoted(where),
            cause=f"{quoted(_LOAD_KEY)} counts the tokens of each expert; it assigns no slots",
            fix=f"pass a map with {quoted(sglang.KEY)}; EPLB computes one from the counts",
        )
    for format_ in FORMATS.values():
        if format_.read is not None and (found := format_.document_in(doc)) is not None:
            return format_.read(Table(found, "", problems), problems)
    keys = [quoted(f.key) for f in FORMATS.values() if f.key is not None]
    problems.add("", f"has none of the keys {', '.join(keys)}")
    return base.RawMap(bare, base.BY_ROW, ())


def write_map(name: str, placement: Placement, layers: MoeLayers, *, ep_size: int | None) -> bytes:
    """The bytes of a map in the named format; only ascend needs `ep_size`.

    Layers that a format counts and the placement leaves out get the trivial row.
    Raises BadPlacement where the placement does not fit the layers, or the format is unknown.
    """
    check(placement, layers, ep_size=ep_size, allow_duplicates=True)
    if name not in FORMATS:
        raise BadPlacement(
            f"{quoted(name)} is not a format of placement maps",
            cause=f"the formats are {', '.join(FORMATS)}",
            fix=f"use {quoted(next(iter(FORMATS)))}, for example",
        )
    return FORMATS[name].write(placement, layers, ep_size).encode()
