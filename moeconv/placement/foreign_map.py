"""A map as another system writes it, and the base of a format: name, key, layer order, parser."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from moeconv.core.schema import Problems, Table
from moeconv.placement.model import MoeLayers, Placement, trivial

BY_ROW: Final = "by row"  # the number of rows tells which layers they are of
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
    that this format counts.
    """

    format: str
    indexed: str
    rows: tuple[tuple[int, tuple[int, ...]], ...]
    count: int | None = None
    devices: int | None = None
    keyed: bool = True


@dataclass(frozen=True, slots=True)
class MapFormat:
    """A format of placement maps.

    key: the member that identifies a document of this format; None where rows stand alone.
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


def rows_by_number(name: str, rows: tuple[tuple[int, ...], ...], *, keyed: bool = True) -> RawMap:
    """The map of physical_to_logical rows, [L, P], without layer ids."""
    return RawMap(name, BY_ROW, tuple(enumerate(rows)), count=len(rows), keyed=keyed)


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
