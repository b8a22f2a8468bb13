"""The result of DeepSeek's EPLB: `phy2log`, [L_moe, P], often saved with torch."""

from __future__ import annotations

from typing import Final

from moeconv.core.schema import Problems, Table
from moeconv.placement import base
from moeconv.placement.model import MoeLayers, Placement

EPLB: Final = "eplb"
KEY: Final = "phy2log"


def read(top: Table, problems: Problems) -> base.RawMap:
    """Parse `{"phy2log": [L_moe, P]}`; the other results of `rebalance_experts` may be there."""
    top.expects(("log2phy", "logcnt"))
    phy2log = base.parse_rows(top.raw(KEY), KEY, problems)
    top.finish()
    return base.rows_by_number(EPLB, phy2log)


def write(placement: Placement, layers: MoeLayers, _ep_size: int | None) -> str:
    """The JSON text of `{"phy2log": [L_moe, P]}`."""
    return f'{{"{KEY}": {base.rows_text(placement, base.moe_layers(placement, layers))}}}\n'


FORMAT: Final = base.MapFormat(EPLB, KEY, read, write, base.MOE_LAYERS_FIRST, in_torch_files=True)
