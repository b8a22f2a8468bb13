"""Between maps of other systems and ours: which layers their rows are of, and their files' bytes.

sglang counts all layers, TensorRT-LLM has absolute ids, vLLM, vllm-ascend and EPLB count the MoE
layers. The checkpoint's own stacks decide, and what was assumed is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Final

from moeconv.core.text import counted, layer_names, spans
from moeconv.errors import BadPlacement, UsageProblem, quoted
from moeconv.placement.model import Layers, Placement, check, trivial
from moeconv.placement.parse import (
    ALIKE,
    ASCEND,
    BY_ROW,
    EPLB,
    EPLB_KEY,
    FORMATS,
    SGLANG,
    SGLANG_KEY,
    TRTLLM,
    TRTLLM_KEY,
    VLLM,
    RawMap,
)

MOE_ROWS: Final = "moe"  # what `--map-layers` may say: row n is of the n-th MoE layer
ALL_ROWS: Final = "all"  # row n is of layer n
_LAYER: Final = "hidden layer"  # row n is layer n
_LAYER_AND_MTP: Final = "hidden layer and MTP layer"
_MOE: Final = "MoE layer"  # row n is the n-th layer that has experts
_MOE_AND_MTP: Final = "MoE layer and MTP layer"
_ABSOLUTE: Final = (_LAYER, _LAYER_AND_MTP)
_ORDER: Final = {
    SGLANG: (_LAYER, _LAYER_AND_MTP, _MOE, _MOE_AND_MTP),
    VLLM: (_MOE, _MOE_AND_MTP, _LAYER, _LAYER_AND_MTP),
    EPLB: (_MOE, _MOE_AND_MTP, _LAYER, _LAYER_AND_MTP),
}


# --- reading -----------------------------------------------------------------------------------
def resolve(raw: RawMap, layers: Layers, *, map_layers: str | None = None) -> tuple[Placement, str]:
    """The placement of a map for a checkpoint, and one sentence that says what was assumed.

    map_layers: which layers the user says that its rows are of, MOE_ROWS or ALL_ROWS.
    Raises BadPlacement where its rows are of no such layers, or may be of either; UsageProblem.
    """
    if map_layers not in {None, MOE_ROWS, ALL_ROWS}:
        raise UsageProblem(
            f"{quoted(str(map_layers))} is not a way to count layers",
            cause=f"`{MOE_ROWS}`: row n is of the n-th MoE layer; `{ALL_ROWS}`: it is of layer n",
            fix=f"give `--map-layers {MOE_ROWS}` or `--map-layers {ALL_ROWS}`",
        )
    if raw.indexed == ALIKE:
        row = raw.rows[0][1]
        told = f"one row: all {counted(len(layers.moe), 'MoE layer')} alike"
        return _placement(dict.fromkeys(layers.moe, row), layers), told + _doubt(layers)
    rows = dict(raw.rows)
    if raw.indexed == BY_ROW:
        ids, told = _by_row(raw, layers, map_layers)
    else:
        ids, told = _by_id(raw, layers)
    if map_layers and ids != _counted(map_layers, ids, layers):
        raise BadPlacement(
            f"the map's rows are not counted as `--map-layers {map_layers}` says",
            cause=f"in the format {raw.format} there is no other reading than: {told}",
            fix=f"drop `--map-layers {map_layers}`, or make the map for this checkpoint",
        )
    named = {layer: rows[index] for layer, index in ids.items()}
    return _placement(named, layers), told + _doubt(layers)


def _placement(rows: dict[int, tuple[int, ...]], layers: Layers) -> Placement:
    ids = tuple(sorted(rows))
    return Placement(layers.experts, ids, tuple(rows[n] for n in ids))


def _doubt(layers: Layers) -> str:
    if layers.stated:
        return ""
    told = f"taken to be {layers.hidden}, from the tensors"
    return f"; config.json does not say the number of layers, {told}"


def _counts(layers: Layers) -> dict[str, int]:
    """How many rows each reading of a map would have."""
    counts = {_LAYER: layers.hidden, _MOE: len(layers.moe)}
    if layers.beyond:
        counts[_LAYER_AND_MTP] = layers.beyond[-1] + 1
        counts[_MOE_AND_MTP] = len(layers.all_moe)
    return counts


def _ids(reading: str, layers: Layers) -> dict[int, int]:
    """The index of each layer's row in a map."""
    moe = layers.moe if reading in (_LAYER, _MOE) else layers.all_moe
    return {layer: layer if reading in _ABSOLUTE else n for n, layer in enumerate(moe)}


def _counted(way: str, ids: dict[int, int], layers: Layers) -> dict[int, int]:
    """The index of each of these layers' rows, counted in one of the two ways."""
    if way == ALL_ROWS:
        return {layer: layer for layer in ids}
    return {layer: n for n, layer in enumerate(layers.all_moe) if layer in ids}


def _ambiguous(raw: RawMap, layers: Layers, fitting: list[str]) -> BadPlacement:
    """Rows that nothing but their number speaks for, where that speaks for two readings."""
    readings = {r: _ids(r, layers) for r in fitting}
    # the main layers may have the same rows in both: then one of the two has rows of MTP layers
    first = next(n for n in layers.all_moe if len({ids.get(n) for ids in readings.values()}) > 1)
    rows = " or ".join(
        f"row {ids[first]}" if first in ids else "no row" for ids in readings.values()
    )
    return BadPlacement(
        f"the map's {counted(len(raw.rows), 'row')} fit two readings: "
        f"{', or '.join(f'one for each {r}' for r in fitting)}; layer {first} would have {rows}",
        cause=f"there are {counted(layers.hidden, 'hidden layer')}, "
        f"{counted(len(layers.moe), 'MoE layer')} among them, and "
        f"{counted(len(layers.beyond), 'MTP layer')}; no key says which the rows are of",
        fix=f"say `--map-layers {MOE_ROWS}` (row n is of the n-th MoE layer) or "
        f"`--map-layers {ALL_ROWS}` (row n is of layer n)",
    )


def _by_row(raw: RawMap, layers: Layers, way: str | None) -> tuple[dict[int, int], str]:
    counts = _counts(layers)
    fitting = [r for r in _ORDER[raw.format] if counts.get(r) == raw.count]
    if not raw.keyed and len(fitting) > 1:
        if way is not None:
            fitting = [r for r in fitting if (r in _ABSOLUTE) == (way == ALL_ROWS)] or fitting
        elif any(_ids(r, layers) != _ids(fitting[0], layers) for r in fitting[1:]):
            raise _ambiguous(raw, layers, fitting)
    if not fitting:
        told = ", ".join(f"{counts[r]} for each {r}" for r in _ORDER[raw.format] if r in counts)
        raise BadPlacement(
            f"the map has {counted(len(raw.rows), 'row')}, which fits none of the counts",
            cause=f"it would be {told}; MoE layers: {spans(layers.all_moe)}",
            fix="make the map for this checkpoint",
        )
    ids = _ids(fitting[0], layers)
    told = f"{counted(len(raw.rows), 'row')}: one for each {fitting[0]}{_which(ids, raw)}"
    others = [r for r in fitting[1:] if _ids(r, layers) != ids]
    if others:
        told += f"; one for each {others[0]} would fit too, but is not what {raw.format} writes"
    return ids, told


def _which(ids: dict[int, int], raw: RawMap) -> str:
    used = tuple(ids.values())
    if len(used) < len(raw.rows):
        plural = "row" if len(used) == 1 else "rows"
        verb = "is the MoE layer" if len(used) == 1 else "are the MoE layers"
        return f"; {plural} {spans(used)} {verb}, the dense ones were ignored"
    if tuple(ids) == used:
        return ""
    return f", which are {layer_names(tuple(ids))}"


def _by_id(raw: RawMap, layers: Layers) -> tuple[dict[int, int], str]:
    given = {index for index, _ in raw.rows}
    dense = given - set(layers.all_moe)
    named = tuple(n for n in layers.all_moe if n in given)
    absolute = given.issuperset(layers.moe) and all(n < layers.hidden for n in dense)
    ordinal = {_MOE: len(layers.moe), _MOE_AND_MTP: len(layers.all_moe)}
    counted_off = [r for r, n in ordinal.items() if given == set(range(n))]
    # ascend's own tool numbers the MoE layers, so that a row of a dense layer cannot be there
    if absolute and not (counted_off and dense and raw.format == ASCEND):
        ignored = f"; those of {layer_names(sorted(dense))} without experts were ignored"
        return {n: n for n in named}, (
            f"{counted(len(given), 'row')} by absolute layer id: {layer_names(named)}"
            f"{ignored if dense else ''}"
        )
    if counted_off:
        ids = _ids(counted_off[0], layers)
        told = f"{counted(len(given), 'row')}: ids count each {counted_off[0]}{_which(ids, raw)}"
        return ids, told
    strange = sorted(n for n in dense if n >= layers.hidden)
    absent = sorted(set(layers.moe) - given)
    found = []
    if strange:
        found.append(f"the checkpoint has no {layer_names(strange)}")
    if absent:
        found.append(f"the map lacks {layer_names(absent)}")
    raise BadPlacement(
        f"the map's {counted(len(given), 'layer id')} are not those of the checkpoint",
        cause=f"{'; '.join(found)}; MoE layers: {spans(layers.all_moe)}",
        fix="make the map for this checkpoint",
    )


def ep_size_of(raw: RawMap, wanted: int | None) -> int | None:
    """The EP size: the wanted one, or what the map says. Raises BadPlacement where they differ."""
    if wanted is None or raw.devices in (None, wanted):
        return wanted or raw.devices
    raise BadPlacement(
        f"the map is for {counted(raw.devices or 0, 'device')}, not for ep {wanted}",
        cause="the same slots on other ranks are another placement",
        fix=f"say `--ep {raw.devices}`, or make the map for {counted(wanted, 'rank')}",
    )


# --- writing -----------------------------------------------------------------------------------
def written(name: str, placement: Placement, layers: Layers, *, ep_size: int | None) -> bytes:
    """The bytes of a map in a format of `FORMATS`; only ascend needs `ep_size`.

    Layers that a format counts and the placement leaves out get the trivial row.
    Raises BadPlacement where the placement does not fit the layers, or the format is unknown.
    """
    check(placement, layers, ep_size=ep_size, allow_duplicates=True)
    if name == ASCEND:
        return _ascend(placement, layers, ep_size).encode()
    if name not in _WRITERS:
        raise BadPlacement(
            f"{quoted(name)} is no format of placement maps",
            cause=f"the formats are {', '.join(FORMATS)}",
            fix=f"say {quoted(FORMATS[0])}, for example",
        )
    return _WRITERS[name](placement, layers).encode()


def _sglang(placement: Placement, layers: Layers) -> str:
    last = layers.beyond[-1] + 1 if _goes_beyond(placement, layers) else layers.hidden
    return f'{{"{SGLANG_KEY}": {_table(placement, range(last))}}}\n'


def _vllm(placement: Placement, layers: Layers) -> str:
    return f"{_table(placement, _moe_ids(placement, layers))}\n"


def _eplb(placement: Placement, layers: Layers) -> str:
    return f'{{"{EPLB_KEY}": {_table(placement, _moe_ids(placement, layers))}}}\n'


def _trtllm(placement: Placement, _layers: Layers) -> str:
    rows = zip(placement.layers, placement.physical_to_logical, strict=True)
    lines = [f"{TRTLLM_KEY}:", *(f"  {layer}: {json.dumps(row)}" for layer, row in rows)]
    # 0: the map stays as it is
    return "\n".join([*lines, f"num_slots: {placement.slots}", "layer_updates_per_iter: 0", ""])


def _ascend(placement: Placement, layers: Layers, ep_size: int | None) -> str:
    if ep_size is None:
        raise BadPlacement(
            "a map for ascend needs the number of devices",
            cause="it lists the experts of each device",
            fix="say `--ep N`",
        )
    per_device = placement.slots // ep_size
    lines = []
    ids = _moe_ids(placement, layers)
    for number, layer in enumerate(ids):
        row = _row(placement, layer)
        devices = [
            {"device_id": d, "device_expert": row[d * per_device : (d + 1) * per_device]}
            for d in range(ep_size)
        ]
        entry = {"layer_id": number, "device_count": ep_size, "device_list": devices}
        lines.append(f"  {json.dumps(entry)}")
    listed = ",\n".join(lines)
    return f'{{"moe_layer_count": {len(ids)}, "layer_list": [\n{listed}\n]}}\n'


_WRITERS: Final[dict[str, Callable[[Placement, Layers], str]]] = {
    SGLANG: _sglang,
    VLLM: _vllm,
    TRTLLM: _trtllm,
    EPLB: _eplb,
}


def _goes_beyond(placement: Placement, layers: Layers) -> bool:
    return not set(placement.layers).isdisjoint(layers.beyond)


def _moe_ids(placement: Placement, layers: Layers) -> tuple[int, ...]:
    return layers.all_moe if _goes_beyond(placement, layers) else layers.moe


def _row(placement: Placement, layer: int) -> tuple[int, ...]:
    return placement.row(layer) or trivial(placement.experts, placement.slots)


def _table(placement: Placement, ids: Sequence[int]) -> str:
    """A list of rows, one a line."""
    rows = ",\n".join(f"  {json.dumps(_row(placement, n))}" for n in ids)
    return f"[\n{rows}\n]"
