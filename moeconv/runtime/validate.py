"""What a reader of one rank must check of its tensors (FORMAT.md, section 9). No data is read."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final, TypeAlias

from moeconv.errors import BadManifest, quoted
from moeconv.layout.axes import (
    EXPERT,
    IN,
    OUT,
    AxesSyntax,
    geometry,
    parse_axes,
    stored_sizes,
)
from moeconv.manifest.model import ExpertEntry, Root, StackEntry, TensorEntry, addresses

Rows: TypeAlias = Mapping[int, tuple[int, ...]]  # stack number -> [P], for stacks that ranks share
_Spans: TypeAlias = dict[tuple[str, str], list[tuple[int, int]]]  # by projection and component
_WEIGHT: Final = "weight"
_NEEDED: Final = frozenset(("up", "down"))  # projections of every kind of expert


def manifest_error(name: str, cause: str) -> BadManifest:
    """The error for a manifest that describes an impossible tensor."""
    return BadManifest(
        f"the manifest is wrong about {quoted(name)}",
        at=quoted(name),
        cause=cause,
    )


@lru_cache(maxsize=256)  # a rank has thousands of tensors and few kinds of them
def _stored(
    axes: str, matrix: tuple[int, ...], experts: int, projections: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """The shape of a stored tensor and the sizes of its axes, slowest first. Raises ValueError."""
    counted = parse_axes(axes).without_blocks()  # sizes of a matrix are in blocks already
    sizes = stored_sizes(counted, matrix, experts=experts, projections=projections)
    return geometry(counted, sizes).shape, sizes


@lru_cache(maxsize=256)
def _letters(stack: int, axes: str) -> tuple[str, ...]:
    """The letters of a tensor's axes. Raises BadManifest where E is not the first of them."""
    name = f"stack {stack}"
    try:
        letters = tuple(axis.letter for axis in parse_axes(axes).flat)
    except AxesSyntax as problem:
        raise manifest_error(name, str(problem)) from None
    if EXPERT in letters[1:]:
        raise manifest_error(name, f"axes {quoted(axes)} have E after the first axis")
    return letters


def is_stacked(expert: ExpertEntry) -> bool:
    """Whether experts are along dimension 0. Raises BadManifest where along another."""
    return EXPERT in _letters(expert.stack, expert.axes)


def sizes_of(entry: TensorEntry, expert: ExpertEntry) -> dict[str, int]:
    """Of each axis of a tensor, slowest first; its shape is what they give. Raises BadManifest."""
    _letters(expert.stack, expert.axes)  # for its errors
    units = len(expert.experts), len(expert.projections)
    try:
        shape, sizes = _stored(expert.axes, expert.matrix, *units)
    except ValueError:
        shape, sizes = None, {}
    if shape != entry.shape:
        cause = f"{quoted(expert.axes)} of {list(expert.matrix)} is not {list(entry.shape)}"
        raise manifest_error(entry.name, cause)
    return dict(sizes)


def validate_rank(
    root: Root,
    rows: Rows,
    common: Iterable[TensorEntry],
    own: Iterable[TensorEntry],
    *,
    rank: int,
    ep_size: int,
) -> None:
    """Check that each stack has all tensors, once, in the stated shapes. Raises BadManifest."""
    by_stack: list[tuple[list[TensorEntry], list[TensorEntry]]] = [([], []) for _ in root.stacks]
    for side, entries in enumerate((common, own)):
        for entry in entries:
            if entry.expert is not None:
                sizes_of(entry, entry.expert)
                by_stack[entry.expert.stack][side].append(entry)
    for number, (stack, (shared, mine)) in enumerate(zip(root.stacks, by_stack, strict=True)):
        everyone = _spans(shared)
        _check_once(stack.name, "expert", everyone, 0, stack.experts)
        row = rows.get(number)
        if row is None:
            _check_weights(root, stack, everyone)
            continue
        share, slots = len(row) // ep_size, _spans(mine)
        _check_once(stack.name, "slot", slots, rank * share, (rank + 1) * share)
        _check_weights(root, stack, slots)
        if twice := slots.keys() & everyone.keys():
            raise manifest_error(
                stack.name,
                f"{' '.join(min(twice))} is both in the common files and in those of ranks",
            )
        for entry in shared:
            _check_global(entry, stack)
        if len(set(row[rank * share : (rank + 1) * share])) < share:
            _check_replicas(root, mine)


def _spans(entries: Iterable[TensorEntry]) -> _Spans:
    out: _Spans = defaultdict(list)
    for entry in entries:
        expert = entry.expert
        if expert is None:
            continue
        span = expert.slots or (expert.experts[0], expert.experts[-1] + 1)
        for projection in expert.projections:
            out[projection, expert.component].append(span)
    return out


def _check_once(name: str, what: str, spans: _Spans, first: int, last: int) -> None:
    """Check that the slots of the tensors of a component cover the range without overlap."""
    for (projection, component), several in spans.items():
        at = first
        for start, stop in sorted(several):
            if start != at:
                cause = f"appears twice or not at all in {projection} {component}"
                raise manifest_error(name, f"{what} {min(at, start)} {cause}")
            at = stop
        if at != last:
            raise manifest_error(name, f"{what} {at} is missing in {projection} {component}")


def _check_weights(root: Root, stack: StackEntry, spans: _Spans) -> None:
    lacking = {p for p, _ in spans} | _NEEDED
    lacking -= {p for p, component in spans if component == _WEIGHT}
    if lacking:  # the recipe is read only where weights may have other names
        recipe = next((r.toml for r in root.recipes if r.name == stack.recipe), "")
        names = _packed_weights(recipe)
        lacking -= {p for p, component in spans if component in names}
    if lacking:
        raise manifest_error(stack.name, f"this rank has no weight of {', '.join(sorted(lacking))}")


@lru_cache(maxsize=8)
def _packed_weights(recipe: str) -> frozenset[str]:
    """The components that a recipe calls a weight, such as GPTQ's `qweight`."""
    try:
        components = tomllib.loads(recipe).get("components")
    except (tomllib.TOMLDecodeError, RecursionError):
        return frozenset()
    found = components.items() if isinstance(components, dict) else ()
    return frozenset(n for n, c in found if isinstance(c, dict) and c.get("weight") is True)


def _check_global(entry: TensorEntry, stack: StackEntry) -> None:
    """What the common files have of a shared stack: of all experts, or a tensor for each."""
    expert = entry.expert
    if expert is None:
        return
    if not {OUT, IN}.isdisjoint(_letters(expert.stack, expert.axes)):
        raise manifest_error(entry.name, "only small tensors of shared experts are common")
    alone = not is_stacked(expert) and len(expert.experts) == 1
    if not alone and len(expert.experts) != stack.experts:
        raise manifest_error(entry.name, f"it must hold all {stack.experts} experts, or one")
    if alone and expert.local is None and stack.experts > 1:
        raise manifest_error(entry.name, "it lacks `local`, its name on a rank")


def _check_replicas(root: Root, own: Iterable[TensorEntry]) -> None:
    known: dict[str, str] = {}
    for entry in own:
        for address, digest in zip(addresses(entry, root.stacks), entry.digests, strict=False):
            if known.setdefault(address, digest) != digest:
                raise manifest_error(entry.name, f"two slots of {quoted(address)} differ")
