"""TensorRT-LLM's `MoeLoadBalancerConfig`: rows by absolute layer id, in YAML.

It may be a member of the engine's own file of options, and have no rows but a number of slots:
then every layer starts with the default row (`get_layer_initial_global_assignments`).
"""

from __future__ import annotations

import json
import re
from typing import Final

from moeconv.core.schema import Problems, Table
from moeconv.core.text import counted
from moeconv.placement import base
from moeconv.placement.model import MoeLayers, Placement

TRTLLM: Final = "trtllm"
KEY: Final = "initial_global_assignments"
SLOTS: Final = "num_slots"
_LAYER_ID: Final = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)


def read(top: Table, problems: Problems) -> base.RawMap:
    """Parse `{layer id: physical_to_logical [P]}` and the number of slots."""
    slots = top.integer(SLOTS, least=1) if top.has(SLOTS) else None
    if top.has("layer_updates_per_iter"):
        top.integer("layer_updates_per_iter")
    if slots is not None and not top.has(KEY):
        top.given(KEY)
        top.finish()
        if slots > base.MAX_SLOTS:
            top.problem(SLOTS, f"must be at most {base.MAX_SLOTS:,}")
        return base.RawMap(
            TRTLLM, base.ALIKE, (), default=lambda experts, ep: _default(experts, slots, ep)
        )
    given = top.raw(KEY)
    members = given if isinstance(given, dict) else {}
    if not members:
        top.problem(KEY, "must be an object of rows by layer id")
    if len(members) > base.MAX_ROWS:
        top.problem(KEY, base.too_many_rows(len(members)))
        members = {}
    rows = {}
    for key, value in members.items():
        row = base.parse_row(value, f"{KEY}.{key}", problems)
        if _LAYER_ID.fullmatch(key):
            rows[int(key)] = row
        else:
            top.problem(f"{KEY}.{key}", "is not a layer id")
    top.finish()
    for layer, row in rows.items():
        if slots is not None and len(row) != slots:
            text = f"has {counted(len(row), 'slot')}, but `num_slots` is {slots}"
            top.problem(f"{KEY}.{layer}", text)
    return base.RawMap(TRTLLM, base.BY_ID, tuple(sorted(rows.items())))


def _default(experts: int, slots: int, ep_size: int) -> tuple[int, ...]:
    """Rank r holds the experts from E * r // EP on, and begins again after the last one: [P]."""
    per_rank = slots // ep_size
    return tuple(
        (rank * experts // ep_size + slot) % experts
        for rank in range(ep_size)
        for slot in range(per_rank)
    )


def write(placement: Placement, _layers: MoeLayers, _ep_size: int | None) -> str:
    """The YAML text, of the layers that the placement has."""
    rows = zip(placement.layers, placement.physical_to_logical, strict=True)
    lines = [f"{KEY}:", *(f"  {layer}: {json.dumps(row)}" for layer, row in rows)]
    # no updates: the map stays as it is
    return "\n".join([*lines, f"num_slots: {placement.slots}", "layer_updates_per_iter: 0", ""])


FORMAT: Final = base.MapFormat(
    TRTLLM,
    KEY,
    read,
    write,
    other_keys=(SLOTS,),
    within=("moe_config.load_balancer", "moe_load_balancer"),
)
