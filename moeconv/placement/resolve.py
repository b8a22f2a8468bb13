"""Match the rows of another system's map with the layers of a checkpoint.

sglang counts all layers, TensorRT-LLM has absolute ids, vLLM, vllm-ascend and EPLB count the MoE
layers. The checkpoint's own stacks decide, and what was assumed is reported.
"""

from __future__ import annotations

from typing import Final

from moeconv.core.text import counted, layer_names, spans
from moeconv.errors import BadPlacement, UsageProblem, quoted
from moeconv.placement import base
from moeconv.placement.formats import FORMATS
from moeconv.placement.model import MoeLayers, Placement

MOE_ROWS: Final = "moe"  # what `--map-layers` may say: row n is of the n-th MoE layer
ALL_ROWS: Final = "all"  # row n is of layer n


def resolve(
    raw: base.RawMap,
    layers: MoeLayers,
    *,
    map_layers: str | None = None,
    ep_size: int | None = None,
) -> tuple[Placement, str]:
    """The placement of a map for a checkpoint, and one sentence that says what was assumed.

    map_layers: which layers the user says that its rows are of, MOE_ROWS or ALL_ROWS. ep_size: for
    maps without rows, which the system itself places.
    Raises BadPlacement where its rows are of no such layers, or may be of either; UsageProblem.
    """
    if map_layers not in {None, MOE_ROWS, ALL_ROWS}:
        raise UsageProblem(
            f"{quoted(str(map_layers))} is not a way to count layers",
            cause=f"`{MOE_ROWS}`: row n is for the n-th MoE layer; `{ALL_ROWS}`: it is for layer n",
            fix=f"pass `--map-layers {MOE_ROWS}` or `--map-layers {ALL_ROWS}`",
        )
    if raw.default is not None:
        if ep_size is None:
            raise UsageProblem(
                "a map without rows needs `--ep N`",
                cause=f"{raw.format} places experts by its own rule, which depends on the ranks",
                fix="pass the number of expert-parallel ranks",
            )
        rows = dict.fromkeys(layers.all_moe, raw.default(layers.experts, ep_size))
        return _placement(rows, layers), f"no rows: {raw.format}'s default for all MoE layers"
    if raw.indexed == base.ALIKE:
        row = raw.rows[0][1]
        assumed = f"one row: all {counted(len(layers.moe), 'MoE layer')} alike"
        return _placement(dict.fromkeys(layers.moe, row), layers), assumed + _if_not_stated(layers)
    rows = dict(raw.rows)
    if raw.indexed == base.BY_ROW:
        ids, assumed = _by_row(raw, layers, map_layers)
    else:
        ids, assumed = _by_id(raw, layers)
    if map_layers and ids != _indices_counted(map_layers, ids, layers):
        raise BadPlacement(
            f"the map's rows are not counted as `--map-layers {map_layers}` says",
            cause=f"in the format {raw.format} the only possible interpretation is: {assumed}",
            fix=f"drop `--map-layers {map_layers}`, or regenerate the map for this checkpoint",
        )
    named = {layer: rows[index] for layer, index in ids.items()}
    return _placement(named, layers), assumed + _if_not_stated(layers)


def _placement(rows: dict[int, tuple[int, ...]], layers: MoeLayers) -> Placement:
    ids = tuple(sorted(rows))
    return Placement(layers.experts, ids, tuple(rows[n] for n in ids))


def _if_not_stated(layers: MoeLayers) -> str:
    if layers.stated:
        return ""
    return (
        "; config.json does not say the number of layers, "
        f"taken to be {layers.hidden}, from the tensors"
    )


def _row_counts(layers: MoeLayers) -> dict[str, int]:
    """How many rows each interpretation of a map would have."""
    counts = {base.LAYER: layers.hidden, base.MOE: len(layers.moe)}
    if layers.beyond:
        counts[base.LAYER_AND_MTP] = layers.beyond[-1] + 1
        counts[base.MOE_AND_MTP] = len(layers.all_moe)
    return counts


def _row_indices(interpretation: str, layers: MoeLayers) -> dict[int, int]:
    """The index of each layer's row in a map."""
    moe = layers.moe if interpretation in (base.LAYER, base.MOE) else layers.all_moe
    return {layer: layer if interpretation in base.ABSOLUTE else n for n, layer in enumerate(moe)}


def _indices_counted(map_layers: str, ids: dict[int, int], layers: MoeLayers) -> dict[int, int]:
    """The index of each of these layers' rows, counted in one of the two ways."""
    if map_layers == ALL_ROWS:
        return {layer: layer for layer in ids}
    return {layer: n for n, layer in enumerate(layers.all_moe) if layer in ids}


def _two_interpretations(raw: base.RawMap, layers: MoeLayers, fitting: list[str]) -> BadPlacement:
    """The error for rows without layer ids whose count fits two interpretations."""
    interpretations = {r: _row_indices(r, layers) for r in fitting}
    # the main layers may have the same rows in both: then one of the two has rows of MTP layers
    first = next(
        n for n in layers.all_moe if len({ids.get(n) for ids in interpretations.values()}) > 1
    )
    rows = " or ".join(
        f"row {ids[first]}" if first in ids else "no row" for ids in interpretations.values()
    )
    return BadPlacement(
        f"the map's {counted(len(raw.rows), 'row')} fit two interpretations: "
        f"{', or '.join(f'one for each {r}' for r in fitting)}; layer {first} would have {rows}",
        cause=f"there are {counted(layers.hidden, 'hidden layer')}, "
        f"{counted(len(layers.moe), 'MoE layer')} among them, and "
        f"{counted(len(layers.beyond), 'MTP layer')}; the rows have no key that says which "
        "layers they are for",
        fix=f"pass `--map-layers {MOE_ROWS}` (row n is for the n-th MoE layer) or "
        f"`--map-layers {ALL_ROWS}` (row n is for layer n)",
    )


def _by_row(
    raw: base.RawMap, layers: MoeLayers, map_layers: str | None
) -> tuple[dict[int, int], str]:
    counts = _row_counts(layers)
    fitting = [r for r in FORMATS[raw.format].layer_order if counts.get(r) == raw.count]
    if not raw.keyed and len(fitting) > 1:
        if map_layers is not None:
            fitting = [
                r for r in fitting if (r in base.ABSOLUTE) == (map_layers == ALL_ROWS)
            ] or fitting
        elif any(_row_indices(r, layers) != _row_indices(fitting[0], layers) for r in fitting[1:]):
            raise _two_interpretations(raw, layers, fitting)
    if not fitting:
        assumed = ", ".join(
            f"{counts[r]} for each {r}" for r in FORMATS[raw.format].layer_order if r in counts
        )
        raise BadPlacement(
            f"the map has {counted(len(raw.rows), 'row')}, which fits none of the counts",
            cause=f"it should have {assumed}; MoE layers: {spans(layers.all_moe)}",
        )
    ids = _row_indices(fitting[0], layers)
    assumed = f"{counted(len(raw.rows), 'row')}: one for each {fitting[0]}{_dense_rows(ids, raw)}"
    others = [r for r in fitting[1:] if _row_indices(r, layers) != ids]
    if others:
        assumed += f"; one for each {others[0]} would fit too, but is not what {raw.format} writes"
    return ids, assumed


def _dense_rows(ids: dict[int, int], raw: base.RawMap) -> str:
    used = tuple(ids.values())
    if len(used) < len(raw.rows):
        plural = "row" if len(used) == 1 else "rows"
        verb = "is the MoE layer" if len(used) == 1 else "are the MoE layers"
        return f"; {plural} {spans(used)} {verb}, the dense ones were ignored"
    if tuple(ids) == used:
        return ""
    return f", which are {layer_names(tuple(ids))}"


def _by_id(raw: base.RawMap, layers: MoeLayers) -> tuple[dict[int, int], str]:
    given = {index for index, _ in raw.rows}
    dense = given - set(layers.all_moe)
    named = tuple(n for n in layers.all_moe if n in given)
    absolute = given.issuperset(layers.moe) and all(n < layers.hidden for n in dense)
    ordinal = {base.MOE: len(layers.moe), base.MOE_AND_MTP: len(layers.all_moe)}
    counted_off = [r for r, n in ordinal.items() if given == set(range(n))]
    # ascend's own tool numbers the MoE layers, so that a row of a dense layer cannot be there
    if absolute and not (counted_off and dense and FORMATS[raw.format].ids_count_moe):
        ignored = f"; those of {layer_names(sorted(dense))} without experts were ignored"
        return {n: n for n in named}, (
            f"{counted(len(given), 'row')} by absolute layer id: {layer_names(named)}"
            f"{ignored if dense else ''}"
        )
    if counted_off:
        ids = _row_indices(counted_off[0], layers)
        assumed = (
            f"{counted(len(given), 'row')}: ids count each {counted_off[0]}{_dense_rows(ids, raw)}"
        )
        return ids, assumed
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
    )


def ep_size_of(raw: base.RawMap, wanted: int | None) -> int | None:
    """The EP size: the requested one, or the map's. Raises BadPlacement where they differ."""
    if wanted is None or raw.devices in (None, wanted):
        return wanted or raw.devices
    raise BadPlacement(
        f"the map is for {counted(raw.devices or 0, 'device')}, not for ep {wanted}",
        cause="the same slots on another number of ranks are a different placement",
        fix=f"pass `--ep {raw.devices}`, or regenerate the map for {counted(wanted, 'rank')}",
    )
