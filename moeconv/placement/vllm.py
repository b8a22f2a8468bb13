"""vLLM's map, and that of any tool without a format of its own: rows for the MoE layers alone."""

from __future__ import annotations

from typing import Final

from moeconv.placement import base
from moeconv.placement.model import MoeLayers, Placement

VLLM: Final = "vllm"


def write(placement: Placement, layers: MoeLayers, _ep_size: int | None) -> str:
    """The JSON text: physical_to_logical, [L_moe, P]."""
    return f"{base.rows_text(placement, base.moe_layers(placement, layers))}\n"


# rows without a key are read by `formats.parse_map`
FORMAT: Final = base.MapFormat(VLLM, None, None, write, base.MOE_LAYERS_FIRST)
