"""vLLM's map, and that of any tool without a format of its own: rows for the MoE layers alone."""

from __future__ import annotations

from typing import Final

from moeconv.placement.foreign_map import MOE_LAYERS_FIRST, MapFormat, moe_layers, rows_text
from moeconv.placement.model import MoeLayers, Placement

VLLM: Final = "vllm"


def write(placement: Placement, layers: MoeLayers, _ep_size: int | None) -> str:
    """The JSON text: physical_to_logical, [L_moe, P]."""
    return f"{rows_text(placement, moe_layers(placement, layers))}\n"


# rows without a key are read by `formats.parse_map`
FORMAT: Final = MapFormat(VLLM, None, None, write, MOE_LAYERS_FIRST)
