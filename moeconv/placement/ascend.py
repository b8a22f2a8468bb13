"""vllm-ascend's `layer_list`: for each MoE layer the experts of each device."""

from __future__ import annotations

import json
from typing import Final

from moeconv.core.schema import Problems, Table
from moeconv.core.text import counted
from moeconv.errors import BadPlacement
from moeconv.placement import base
from moeconv.placement.model import MoeLayers, Placement

ASCEND: Final = "ascend"
KEY: Final = "layer_list"


def read(top: Table, problems: Problems) -> base.RawMap:
    """Parse the list of layers, each with a list of devices."""
    stated = top.integer("moe_layer_count")
    rows: dict[int, tuple[int, ...]] = {}
    sizes: dict[int, str] = {}  # device counts, and where each was first
    count = 0
    for table in top.tables(KEY, base.MAX_ROWS):
        count += 1
        layer = table.integer("layer_id")
        if layer in rows:
            table.problem("layer_id", f"{layer} appears twice")
        size, rows[layer] = _devices(table, problems)
        sizes.setdefault(size, table.place("device_count"))
        table.finish()
    top.finish()
    if stated != count:
        top.problem("moe_layer_count", f"is {stated}, but the list has {counted(count, 'layer')}")
    if not count:
        top.problem(KEY, "has no layers")
    for size, place in list(sizes.items())[1:]:
        problems.add(place, f"is {size}, but {next(iter(sizes))} in other layers")
    return base.RawMap(
        ASCEND, base.BY_ID, tuple(sorted(rows.items())), devices=next(iter(sizes), None)
    )


def _devices(layer: Table, problems: Problems) -> tuple[int, tuple[int, ...]]:
    """The device count of a layer, and physical_to_logical, [P]: device 0's slots, then 1's."""
    stated = layer.integer("device_count", least=1)
    count = 0
    by_device: dict[int, tuple[int, ...]] = {}
    for device in layer.tables("device_list", base.MAX_SLOTS):
        count += 1
        number = device.integer("device_id")
        place = device.place("device_expert")
        row = base.parse_row(device.raw("device_expert"), place, problems)
        if number in by_device:
            device.problem("device_id", f"{number} appears twice")
        elif by_device and len(row) != (others := len(next(iter(by_device.values())))):
            problems.add(
                place, f"has {counted(len(row), 'slot')}, but the first device has {others}"
            )
        by_device[number] = row
        device.finish()
    if count != stated:
        layer.problem("device_count", f"is {stated}, but the list has {counted(count, 'device')}")
    elif sorted(by_device) != list(range(stated)):
        layer.problem("device_list", f"must have the device ids 0 to {stated - 1}")
    return stated, tuple(expert for _, row in sorted(by_device.items()) for expert in row)


def write(placement: Placement, layers: MoeLayers, ep_size: int | None) -> str:
    """The JSON text. Raises BadPlacement without an EP size."""
    if ep_size is None:
        raise BadPlacement(
            "a map for ascend needs the number of devices",
            cause="it lists the experts of each device",
            fix="pass `--ep N`",
        )
    per_device = placement.slots // ep_size
    lines = []
    ids = base.moe_layers(placement, layers)
    for number, layer in enumerate(ids):
        row = base.row_of(placement, layer)
        devices = [
            {"device_id": d, "device_expert": row[d * per_device : (d + 1) * per_device]}
            for d in range(ep_size)
        ]
        entry = {"layer_id": number, "device_count": ep_size, "device_list": devices}
        lines.append(f"  {json.dumps(entry)}")
    listed = ",\n".join(lines)
    return f'{{"moe_layer_count": {len(ids)}, "layer_list": [\n{listed}\n]}}\n'


# vllm-ascend's own tool numbers the MoE layers, so that it has no rows of dense layers
FORMAT: Final = base.MapFormat(ASCEND, KEY, read, write, ids_count_moe=True)
