"""Maps of other systems, from decoded documents: which format it is, and its rows as they stand.

Ids are only integers here; whether they fit a checkpoint is `placement.check`'s question.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from moeconv.core.json_value import Json
from moeconv.core.schema import Problems, Table
from moeconv.core.text import counted
from moeconv.errors import BadPlacementFile, quoted

SGLANG: Final = "sglang"
VLLM: Final = "vllm"
TRTLLM: Final = "trtllm"
ASCEND: Final = "ascend"
EPLB: Final = "eplb"
FORMATS: Final = (SGLANG, VLLM, TRTLLM, ASCEND, EPLB)

BY_ROW: Final = "by row"  # which layers these are follows from how many there are
BY_ID: Final = "by layer id"
ALIKE: Final = "one row for all layers"

SGLANG_KEY: Final = "physical_to_logical_map"
EPLB_KEY: Final = "phy2log"
LOAD_KEY: Final = "logical_count"
TRTLLM_KEY: Final = "initial_global_assignments"
ASCEND_KEY: Final = "layer_list"
MAX_ROWS: Final = 10_000  # of a map: one for each layer
MAX_SLOTS: Final = 1_048_576  # of a row
_LAYER_ID = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)


@dataclass(frozen=True, slots=True)
class RawMap:
    """A map before it meets a checkpoint: (index, row [P]) in order of index.

    indexed: BY_ROW, BY_ID or ALIKE; count: the rows of a map that goes by row; devices: the EP
    size that the document says; keyed: whether a key says the format, so that its rows can only
    be of the layers that this format counts.
    """

    format: str
    indexed: str
    rows: tuple[tuple[int, tuple[int, ...]], ...]
    count: int | None = None
    devices: int | None = None
    keyed: bool = True


def parse_map(doc: Json, *, where: str, bare: str = VLLM) -> RawMap:
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
            fix="make the map again; `moeconv placement convert` writes every format it reads",
        )
    return raw


def _parsed(doc: Json, bare: str, problems: Problems, where: str) -> RawMap:
    if isinstance(doc, list):
        return _listed(doc, bare, problems)
    if not isinstance(doc, dict):
        problems.add("", f"is neither an object nor a list of rows, but {_kind(doc)}")
        return RawMap(bare, BY_ROW, ())
    if LOAD_KEY in doc and SGLANG_KEY not in doc:
        raise BadPlacementFile(
            f"{quoted(where)} is a load record, not a placement",
            at=quoted(where),
            cause=f"{quoted(LOAD_KEY)} counts tokens for each expert; it places none",
            fix=f"give a map with {quoted(SGLANG_KEY)}; EPLB makes one from the counts",
        )
    top = Table(doc, "", problems)
    if SGLANG_KEY in doc:
        return _sglang(top, problems)
    if TRTLLM_KEY in doc:
        return _trtllm(top, problems)
    if ASCEND_KEY in doc:
        return _ascend(top, problems)
    if EPLB_KEY in doc:
        top.expects(("log2phy", "logcnt"))
        rows = _rows(top.raw(EPLB_KEY), EPLB_KEY, problems)
        top.finish()
        return _by_row(EPLB, rows)
    keys = (SGLANG_KEY, TRTLLM_KEY, ASCEND_KEY, EPLB_KEY)
    problems.add("", f"has none of the keys {', '.join(map(quoted, keys))}")
    return RawMap(bare, BY_ROW, ())


def _listed(doc: list[Json], bare: str, problems: Problems) -> RawMap:
    if doc and not any(isinstance(item, list) for item in doc):
        return RawMap(VLLM, ALIKE, ((0, _row(doc, "", problems)),))
    return replace(_by_row(bare, _rows(doc, "", problems)), keyed=False)


def _by_row(name: str, rows: tuple[tuple[int, ...], ...]) -> RawMap:
    return RawMap(name, BY_ROW, tuple(enumerate(rows)), count=len(rows))


def _sglang(top: Table, problems: Problems) -> RawMap:
    for key in top.names():
        if key != SGLANG_KEY:
            # sglang passes the members on as arguments, so that any other is an error there
            top.problem(key, f"must not stand beside {quoted(SGLANG_KEY)}: sglang refuses it")
    return _by_row(SGLANG, _rows(top.raw(SGLANG_KEY), SGLANG_KEY, problems))


def _trtllm(top: Table, problems: Problems) -> RawMap:
    given = top.raw(TRTLLM_KEY)
    members = given if isinstance(given, dict) else {}
    if not members:
        top.problem(TRTLLM_KEY, "must be an object of rows by layer id")
    if len(members) > MAX_ROWS:
        top.problem(TRTLLM_KEY, _too_many_rows(len(members)))
        members = {}
    rows = {}
    for key, value in members.items():
        row = _row(value, f"{TRTLLM_KEY}.{key}", problems)
        if _LAYER_ID.fullmatch(key):
            rows[int(key)] = row
        else:
            top.problem(f"{TRTLLM_KEY}.{key}", "is no layer id")
    slots = top.integer("num_slots", least=1) if top.has("num_slots") else None
    if top.has("layer_updates_per_iter"):
        top.integer("layer_updates_per_iter")
    top.finish()
    for layer, row in rows.items():
        if slots is not None and len(row) != slots:
            told = f"has {counted(len(row), 'slot')}, `num_slots` says {slots}"
            top.problem(f"{TRTLLM_KEY}.{layer}", told)
    return RawMap(TRTLLM, BY_ID, tuple(sorted(rows.items())))


def _ascend(top: Table, problems: Problems) -> RawMap:
    said = top.integer("moe_layer_count")
    rows: dict[int, tuple[int, ...]] = {}
    sizes: dict[int, str] = {}  # device counts, and where each stood first
    count = 0
    for table in top.tables(ASCEND_KEY, MAX_ROWS):
        count += 1
        layer = table.integer("layer_id")
        if layer in rows:
            table.problem("layer_id", f"{layer} stands twice")
        size, rows[layer] = _devices(table, problems)
        sizes.setdefault(size, table.place("device_count"))
        table.finish()
    top.finish()
    if said != count:
        top.problem("moe_layer_count", f"is {said}, the list has {counted(count, 'layer')}")
    if not count:
        top.problem(ASCEND_KEY, "has no layers")
    for size, place in list(sizes.items())[1:]:
        problems.add(place, f"is {size}, in other layers {next(iter(sizes))}")
    return RawMap(ASCEND, BY_ID, tuple(sorted(rows.items())), devices=next(iter(sizes), None))


def _devices(layer: Table, problems: Problems) -> tuple[int, tuple[int, ...]]:
    """The device count of a layer, and its slots: those of device 0, then 1, and so on."""
    said = layer.integer("device_count", least=1)
    count = 0
    held: dict[int, tuple[int, ...]] = {}
    for device in layer.tables("device_list", MAX_SLOTS):
        count += 1
        number = device.integer("device_id")
        place = device.place("device_expert")
        row = _row(device.raw("device_expert"), place, problems)
        if number in held:
            device.problem("device_id", f"{number} stands twice")
        elif held and len(row) != len(next(iter(held.values()))):
            told = f"has {counted(len(row), 'slot')}, the device before others"
            problems.add(place, told)
        held[number] = row
        device.finish()
    if count != said:
        layer.problem("device_count", f"is {said}, the list has {counted(count, 'device')}")
    elif sorted(held) != list(range(said)):
        layer.problem("device_list", f"must have the device ids 0 to {said - 1}")
    return said, tuple(expert for _, row in sorted(held.items()) for expert in row)


def _rows(value: Json, place: str, problems: Problems) -> tuple[tuple[int, ...], ...]:
    """[L][P], with at least one row."""
    if not isinstance(value, list):
        problems.add(place, f"must be a list of rows, not {_kind(value)}")
        return ()
    if not value:
        problems.add(place, "has no rows")
    if len(value) > MAX_ROWS:
        problems.add(place, _too_many_rows(len(value)))
        return ()
    return tuple(_row(row, f"{place}[{n}]", problems) for n, row in enumerate(value))


def _too_many_rows(count: int) -> str:
    return f"has {count:,} rows, more than {MAX_ROWS:,}: there is one for each layer"


def _row(value: Json, place: str, problems: Problems) -> tuple[int, ...]:
    if not isinstance(value, list):
        problems.add(place, f"must be a list of expert ids, not {_kind(value)}")
        return ()
    if len(value) > MAX_SLOTS:
        problems.add(place, f"has {len(value):,} slots, more than {MAX_SLOTS:,}")
        return ()
    odd = [n for n, item in enumerate(value) if type(item) is not int]
    if odd:
        more = f" (and {counted(len(odd) - 1, 'other')})" if len(odd) > 1 else ""
        told = f"must be an integer, not {_kind(value[odd[0]])}{more}"
        problems.add(f"{place}[{odd[0]}]", told)
        return ()
    row = tuple(_whole_numbers(value))
    if not row:
        problems.add(place, "has no slots")
    elif max(row) >= MAX_SLOTS:
        problems.add(place, f"holds expert {max(row)}; ids are below {MAX_SLOTS:,}")
        return ()
    return row


def _whole_numbers(items: Iterable[Json]) -> Iterable[int]:
    return (item for item in items if isinstance(item, int))


def _kind(value: Json) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    names |= {int: "an integer", float: "a float", type(None): "null"}
    return names[type(value)]
