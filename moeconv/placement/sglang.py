"""sglang's `--init-expert-location`: a row for each hidden layer, dense layers included."""

from __future__ import annotations

from typing import Final

from moeconv.core.schema import Problems, Table
from moeconv.errors import quoted
from moeconv.placement import base
from moeconv.placement.model import MoeLayers, Placement

SGLANG: Final = "sglang"
KEY: Final = "physical_to_logical_map"


def read(top: Table, problems: Problems) -> base.RawMap:
    """Parse `{"physical_to_logical_map": [L, P]}`."""
    for key in top.names():
        if key != KEY:
            # sglang passes the members on as arguments, so that any other is an error there
            top.problem(key, f"is not allowed together with {quoted(KEY)}: sglang refuses it")
    return base.rows_by_number(SGLANG, base.parse_rows(top.raw(KEY), KEY, problems))


def write(placement: Placement, layers: MoeLayers, _ep_size: int | None) -> str:
    """The JSON text, with the trivial row for dense layers."""
    last = layers.beyond[-1] + 1 if base.has_mtp_rows(placement, layers) else layers.hidden
    return f'{{"{KEY}": {base.rows_text(placement, range(last))}}}\n'


FORMAT: Final = base.MapFormat(SGLANG, KEY, read, write, base.ALL_LAYERS_FIRST, in_torch_files=True)
