"""shard and merge: outputs for expert-parallel ranks, and back. Nothing here prints or exits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, Unpack

from moeconv.api.convert import origin_layouts, own_documents, plan_original, plan_whole
from moeconv.api.open import Opened, gc_paused
from moeconv.api.options import ConvertKeywords, WriteKeywords, WriteOptions
from moeconv.api.run import Result, carry_out
from moeconv.core.system_errors import system_errors
from moeconv.detect.moe_layers import layers_of
from moeconv.errors import UsageProblem, quoted
from moeconv.placement.files import read_map
from moeconv.placement.model import Placement, by_stack, check
from moeconv.placement.resolve import ep_size_of, resolve
from moeconv.plan.assign import RULES, TRIVIAL, PlacementRequest, placed
from moeconv.plan.convert import FUSE, refuse_no_experts, target_of
from moeconv.plan.shard import plan_shards, refuse_tensor_sidecars

# a rule's name, a map (file or inline JSON), a placement, or rows [P] by stack name
Placing: TypeAlias = str | Path | Placement | Mapping[str, tuple[int, ...]]


@system_errors()
def shard(
    src: str | Path,
    out: str | Path,
    *,
    ep_size: int,
    placement: Placing = TRIVIAL,
    map_layers: str | None = None,
    redundant: int | None = None,
    allow_duplicates: bool = False,
    virtual: bool = False,
    **keywords: Unpack[ConvertKeywords],
) -> Result:
    """Write files for each expert-parallel rank, and common files with everything else.

    Each rank gets its slots `[S, …]` in the family's fused layout, or in `layout`. placement: a
    rule (`trivial`, `round-robin`), a map in any of the formats of `moeconv placement`, or rows.
    map_layers: which layer row n of a map without keys is for: the n-th MoE layer (`moe`), or
    layer n (`all`). redundant: R more slots per layer than experts, filled by a rule.
    allow_duplicates: one rank may hold an expert twice. virtual: write no tensor bytes, only where
    they are in SRC. The other keywords are those of `WriteOptions`.
    Raises BadPlacement, NotVirtual and what `fuse` raises.
    """
    options = WriteOptions(**keywords)
    source = options.open(src)
    request = PlacementRequest(ep_size, TRIVIAL, None, redundant, allow_duplicates)
    request, assumptions = _request(source, request, placement, map_layers)
    detection = source.detection.checked()
    refuse_no_experts(detection)
    if virtual:
        refuse_tensor_sidecars(tuple(s.name for s in source.checkpoint.sidecars))
    sharding, words = placed(detection.stacks, request)
    with gc_paused():
        plan = plan_shards(
            detection,
            sharding,
            {s.name: target_of(s, FUSE, options.layout) for s in detection.stacks},
            packing=options.packing(),
            origin_layouts=origin_layouts(source.checkpoint),
            virtual=virtual,
            notes=(*assumptions, *words),
        )
    return carry_out(source, Path(out), plan, options)


def _request(
    source: Opened, request: PlacementRequest, placement: Placing, map_layers: str | None
) -> tuple[PlacementRequest, tuple[str, ...]]:
    """The request for a given placement, and what was assumed to read a map."""
    by_rule = isinstance(placement, str) and placement in RULES
    if map_layers is not None and (by_rule or isinstance(placement, Placement | Mapping)):
        raise UsageProblem(
            "`--map-layers` needs a placement map",
            cause="it says which layers the rows of a map are for",
            fix="drop `--map-layers`, or pass a map with `--placement`",
        )
    if isinstance(placement, str) and placement in RULES:
        return replace(request, rule=placement), ()
    stacks = source.detection.checked().stacks
    if isinstance(placement, str) and _is_no_map(placement):
        raise UsageProblem(
            f"{quoted(placement)} is neither a placement rule nor a map",
            cause=f"the rules are {', '.join(RULES)}; no file of that name exists",
            fix="pass one of the rules, a map file, or the map as JSON",
        )
    if isinstance(placement, Mapping):
        rows = by_stack(tuple(s.name for s in stacks), placement)
        return replace(request, rows=rows), ()
    layers, names = layers_of(stacks, source.checkpoint.config)
    assumptions: tuple[str, ...] = ()
    if not isinstance(placement, Placement):
        raw = read_map(placement)
        ep_size_of(raw, request.ep_size)
        placement, assumed = resolve(raw, layers, map_layers=map_layers, ep_size=request.ep_size)
        assumptions = (f"{raw.format} map, {assumed}",)
    check(placement, layers, ep_size=request.ep_size, allow_duplicates=request.allow_duplicates)
    by_layer = dict(zip(layers.all_moe, names, strict=True))
    given = zip(placement.layers, placement.physical_to_logical, strict=True)
    return replace(request, rows={by_layer[n]: row for n, row in given}, whole=False), assumptions


def _is_no_map(text: str) -> bool:
    return text.lstrip()[:1] not in ("{", "[") and not Path(text).suffix and not Path(text).exists()


@system_errors()
def merge(
    src: str | Path,
    out: str | Path,
    *,
    unchecked: bool = False,
    **keywords: Unpack[WriteKeywords],
) -> Result:
    """Restore the checkpoint that an output of moeconv was made from, bit for bit.

    Its bytes are compared with the recorded digests (raises Damaged), unless `unchecked`.
    With `layout`, write a complete checkpoint in that layout instead.
    The keywords are those of `WriteOptions`. Raises NotAnOutput.
    """
    options = WriteOptions(unchecked=unchecked, **keywords)
    source = options.open(src)
    own_documents(source)
    plan = plan_original(source) if options.layout is None else plan_whole(source, FUSE, options)
    return carry_out(source, Path(out), plan, options)
