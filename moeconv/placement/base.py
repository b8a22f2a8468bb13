"""A map as another system writes it, and what all formats share: their base, rows read and written.

Whether ids fit a checkpoint is checked by `placement.model.check`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from moeconv.core.schema import Problems, Table
from moeconv.core.strict_json import Json
from moeconv.core.text import counted
from moeconv.placement.model import MoeLayers, Placement, trivial

MAX_ROWS: Final = 10_000  # of a map: one for each layer
MAX_SLOTS: Final = 1_048_576  # of a row

BY_ROW: Final = "by row"  # the number of rows decides which layers they are for
BY_ID: Final = "by layer id"
ALIKE: Final = "one row for all layers"

LAYER: Final = "hidden layer"  # row n is layer n
LAYER_AND_MTP: Final = "hidden layer and MTP layer"
MOE: Final = "MoE layer"  # row n is the n-th layer that has experts
MOE_AND_MTP: Final = "MoE layer and MTP layer"
ABSOLUTE: Final = (LAYER, LAYER_AND_MTP)
ALL_LAYERS_FIRST: Final = (LAYER, LAYER_AND_MTP, MOE, MOE_AND_MTP)
MOE_LAYERS_FIRST: Final = (MOE, MOE_AND_MTP, LAYER, LAYER_AND_MTP)


@dataclass(frozen=True, slots=True)
class RawMap:
    """A parsed map that has not been matched with a checkpoint yet.

    rows: (index, physical_to_logical [P]), in order of index. indexed: BY_ROW, BY_ID or ALIKE.
    count: the number of rows of a map that goes by row. devices: the EP size that the document
    states. keyed: whether a key identifies the format, so that its rows can only be of the layers
    that this format counts. default: the system's own row for E experts and EP ranks, of documents
    without rows.
    """

    format: str
    indexed: str
    rows: tuple[tuple[int, tuple[int, ...]], ...]
    count: int | None = None
    devices: int | None = None
    keyed: bool = True
    default: Callable[[int, int], tuple[int, ...]] | None = None


@dataclass(frozen=True, slots=True)
class MapFormat:
    """A format of placement maps.

    key: the member that identifies a document of this format; None where rows stand alone.
    other_keys: members that do so where that one is absent. within: dotted paths at which the
    system's own files of options have such a document.
    read: parses such a document, and adds what is wrong with it to the problems. write: the text
    of a placement, whose last argument is the EP size. layer_order: what its rows count, the most
    likely first; empty where rows have layer ids. ids_count_moe: whether the system itself numbers
    the MoE layers only. in_torch_files: whether the system saves it with `torch.save`, too.
    """

    name: str
    key: str | None
    read: Callable[[Table, Problems], RawMap] | None
    write: Callable[[Placement, MoeLayers, int | None], str]
    layer_order: tuple[str, ...] = ()
    ids_count_moe: bool = False
    in_torch_files: bool = False
    other_keys: tuple[str, ...] = ()
    within: tuple[str, ...] = ()

    def document_in(self, doc: dict[str, Json]) -> dict[str, Json] | None:
        """The document of this format that another one is, or has within; None if it has none."""
        for path in ("", *self.within):
            found: Json = doc
            for member in path.split(".") if path else ():
                found = found.get(member) if isinstance(found, dict) else None
            if isinstance(found, dict) and not {self.key, *self.other_keys}.isdisjoint(found):
                return found
        return None


def rows_by_number(name: str, rows: tuple[tuple[int, ...], ...], *, keyed: bool = True) -> RawMap:
    """The map of physical_to_logical rows, [L, P], without layer ids."""
    return RawMap(name, BY_ROW, tuple(enumerate(rows)), count=len(rows), keyed=keyed)


# --- reading -----------------------------------------------------------------------------------
def parse_rows(value: Json, place: str, problems: Problems) -> tuple[tuple[int, ...], ...]:
    """physical_to_logical, [L, P]; an empty list of rows is a problem."""
    if not isinstance(value, list):
        problems.add(place, f"must be a list of rows, not {kind_of(value)}")
        return ()
    if not value:
        problems.add(place, "has no rows")
    if len(value) > MAX_ROWS:
        problems.add(place, too_many_rows(len(value)))
        return ()
    return tuple(parse_row(row, f"{place}[{n}]", problems) for n, row in enumerate(value))


def too_many_rows(count: int) -> str:
    """The problem of a map with more than MAX_ROWS rows."""
    return f"has {count:,} rows, more than {MAX_ROWS:,}: there is one for each layer"


def parse_row(value: Json, place: str, problems: Problems) -> tuple[int, ...]:
    """The expert in each slot of a layer, [P]; an empty row is a problem."""
    if not isinstance(value, list):
        problems.add(place, f"must be a list of expert ids, not {kind_of(value)}")
        return ()
    if len(value) > MAX_SLOTS:
        problems.add(place, f"has {len(value):,} slots, more than {MAX_SLOTS:,}")
        return ()
    odd = [n for n, item in enumerate(value) if type(item) is not int]
    if odd:
        more = f" (and {counted(len(odd) - 1, 'other')})" if len(odd) > 1 else ""
        text = f"must be an integer, not {kind_of(value[odd[0]])}{more}"
        problems.add(f"{place}[{odd[0]}]", text)
        return ()
    row = tuple(item for item in value if isinstance(item, int))
    if not row:
        problems.add(place, "has no slots")
    elif max(row) >= MAX_SLOTS:
        problems.add(place, f"has expert {max(row)}; ids are below {MAX_SLOTS:,}")
        return ()
    return row


def kind_of(value: Json) -> str:
    """The type of a value, in words for a message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    names |= {int: "an integer", float: "a float", type(None): "null"}
    return names[type(value)]


# --- writing -----------------------------------------------------------------------------------
def has_mtp_rows(placement: Placement, layers: MoeLayers) -> bool:
    """Whether the placement has a row for any of the MTP layers."""
    return not set(placement.layers).isdisjoint(layers.beyond)


def moe_layers(placement: Placement, layers: MoeLayers) -> tuple[int, ...]:
    """The MoE layers that a map must have, those of MTP only where the placement has them."""
    return layers.all_moe if has_mtp_rows(placement, layers) else layers.moe


def row_of(placement: Placement, layer: int) -> tuple[int, ...]:
    """physical_to_logical of a layer, [P]; the trivial one where the placement has none."""
    return placement.row(layer) or trivial(placement.experts, placement.slots)


def rows_text(placement: Placement, layers: Sequence[int]) -> str:
    """physical_to_logical of these layers, [L, P], as a JSON list with one row a line."""
    rows = ",\n".join(f"  {json.dumps(row_of(placement, n))}" for n in layers)
    return f"[\n{rows}\n]"
