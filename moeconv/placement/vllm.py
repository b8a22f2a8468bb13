"""vLLM's map, and that of any tool without a format of its own: rows for the MoE layers alone."""

from __future__ import annotations

from typing import Final

from moeconv.core.schema import Problems
from moeconv.core.strict_json import Json
from moeconv.placement import base
from moeconv.placement.model import MoeLayers, Placement

VLLM: Final = "vllm"


def read_rows(doc: list[Json], name: str, problems: Problems) -> base.RawMap:
    """Parse rows without any key: physical_to_logical, [L, P], or [P] for all layers alike.

    name: the format that the file is of, where its form says so.
    """
    if doc and not any(isinstance(item, list) for item in doc):
        return base.RawMap(VLLM, base.ALIKE, ((0, base.parse_row(doc, "", problems)),))
    return base.rows_by_number(name, base.parse_rows(doc, "", problems), keyed=False)


def write(placement: Placement, layers: MoeLayers, _ep_size: int | None) -> str:
    """The JSON text: physical_to_logical, [L_moe, P]."""
    return f"{base.rows_text(placement, base.moe_layers(placement, layers))}\n"


# no key marks a document of it: `formats.parse_map` gives what is a list to `read_rows`
FORMAT: Final = base.MapFormat(VLLM, None, None, write, base.MOE_LAYERS_FIRST)
