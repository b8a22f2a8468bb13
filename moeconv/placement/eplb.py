"""The result of DeepSeek's EPLB: `phy2log`, [L_moe, P], often saved with torch."""

from __future__ import annotations

from typing import Final

from moeconv.core.schema import Problems, Table
from moeconv.placement.foreign_map import (
    MOE_LAYERS_FIRST,
    MapFormat,
    RawMap,
    moe_layers,
    rows_by_number,
    rows_text,
)
from moeconv.placement.model import MoeLayers, Placement
from moeconv.placement.parse import parse_rows

EPLB: Final = "eplb"
KEY: Final = "phy2log"


def read(top: Table, problems: Problems) -> RawMap:
    """Parse `{"phy2log": [L_moe, P]}`; the other results of `rebalance_experts` may be there."""
    top.expects(("log2phy", "logcnt"))
    phy2log = parse_rows(top.raw(KEY), KEY, problems)
    top.finish()
    return rows_by_number(EPLB, phy2log)


def write(placement: Placement, layers: MoeLayers, _ep_size: int | None) -> str:
    """The JSON text of `{"phy2log": [L_moe, P]}`."""
    return f'{{"{KEY}": {rows_text(placement, moe_layers(placement, layers))}}}\n'


FORMAT: Final = MapFormat(EPLB, KEY, read, write, MOE_LAYERS_FIRST, in_torch_files=True)
