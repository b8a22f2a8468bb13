"""Level `structure`: manifest, parts, headers, sizes and coverage of an output, no data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Final

from moeconv.checkpoint.header import StoredTensor
from moeconv.checkpoint.index import INDEX_NAME, parse_index
from moeconv.checkpoint.origin import parse_origin
from moeconv.checkpoint.output_files import (
    damaged,
    header_of,
    missing,
    read_entry,
    read_root,
    tensor_problems,
)
from moeconv.core.dtypes import BITS
from moeconv.core.strict_json import dumps
from moeconv.detect.detect import Detection
from moeconv.detect.from_manifest import detection_from_manifest
from moeconv.errors import (
    Damaged,
    IoFailed,
    Malformed,
    MissingExpert,
    MoeconvError,
    TruncatedFile,
    quoted,
)
from moeconv.layout.recipe import WEIGHT, Recipe
from moeconv.layout.shipped import manifest_recipes
from moeconv.manifest.model import (
    MAX_PART_BYTES,
    MINOR,
    ROOT_NAME,
    FileEntry,
    Manifest,
    Part,
    Root,
    StackEntry,
    addresses,
    matrix_address,
    rank_part,
)
from moeconv.manifest.part_reader import parse_parts
from moeconv.manifest.rules import contradictions
from moeconv.plan.pack import METADATA, index_text
from moeconv.store.base import Store

_MAX_MISSING: Final = 20


def check_structure(store: Store) -> tuple[Manifest | None, list[MoeconvError]]:
    """Check everything about an output's own files that needs no data; return all problems.

    The manifest is returned, too, if all of its parts could be read.
    """
    try:
        top = read_root(store)
    except MoeconvError as problem:
        return None, [problem]
    problems: list[MoeconvError] = []
    documents = []
    for entry in top.parts:
        with _listing(problems):
            raw = read_entry(store, entry, limit=MAX_PART_BYTES)
            documents.append(parse_parts(raw, top, where=entry.name))
    parts = [part for document in documents for part in document]
    for part in parts:
        if part.file:
            with _listing(problems):
                _check_data_file(store, part, problems, newer=top.minor > MINOR)
    whole = len(documents) == len(top.parts)
    with _listing(problems):
        _check_index(store, top, parts if whole else None)
    with _listing(problems):
        parse_origin(read_entry(store, top.origin))
    for entry in top.sidecars:
        with _listing(problems):
            _check_sidecar(store, entry)
    if not whole:
        return None, problems
    manifest = Manifest(top, tuple(parts))
    return manifest, problems + _coverage(manifest)


@contextmanager
def _listing(problems: list[MoeconvError]) -> Iterator[None]:
    """Add what is wrong with a file to the problems instead of raising it."""
    try:
        yield
    except (Malformed, IoFailed) as problem:
        problems.append(problem)


def _check_data_file(
    store: Store, part: Part, problems: list[MoeconvError], *, newer: bool
) -> None:
    """Add what is wrong with the size, header or metadata of a data file; may raise the last."""
    name, file = part.file, store.file(part.file)
    if file is None:
        raise missing(name)
    raw = file.read(0, min(part.header_size, file.size))
    if file.size != part.size:
        kind = TruncatedFile if file.size < part.size else Damaged
        problems.append(
            kind(
                f"{quoted(name)} does not have the size it was written with",
                at=quoted(name),
                cause=f"it has {file.size:,} bytes; its part says {part.size:,}",
                fix="fetch that file again, or convert again",
            )
        )
    header = header_of(part, raw)
    problems += tensor_problems(header, part)
    if not newer and dict(header.metadata) != METADATA:
        cause = f"its `__metadata__` is not {dumps(dict(METADATA)).decode()}: loaders rely on it"
        raise damaged(name, cause)


def _check_index(store: Store, top: Root, parts: list[Part] | None) -> None:
    """Raise Damaged if the index is not one that loaders follow to these parts."""
    if top.index is None:
        if any(entry.name == INDEX_NAME for entry in top.sidecars):
            cause = f"it names an index, {quoted(INDEX_NAME)}: an expert-parallel output has none"
            raise damaged(ROOT_NAME, cause)
        return
    if top.index.name != INDEX_NAME:
        cause = f"its index is {quoted(top.index.name)}, but loaders follow {quoted(INDEX_NAME)}"
        raise damaged(ROOT_NAME, cause)
    raw = read_entry(store, top.index)
    index = parse_index(raw, name=top.index.name)
    if parts is None:
        return
    held = {t.name: p.file for p in parts for t in p.tensors}
    total = sum(p.size - p.header_size for p in parts)
    if index.weight_map != held or index.total_size != total:
        raise damaged(top.index.name, "it does not list the tensors of the output")
    if top.minor <= MINOR and raw != index_text(held, total):
        raise damaged(top.index.name, "it has more than the tensors and their total size")


def _check_sidecar(store: Store, entry: FileEntry) -> None:
    file = store.file(entry.name)
    if file is None:
        raise damaged(entry.name, "it is missing")
    if file.size != entry.size:
        cause = f"it has {file.size:,} bytes; the manifest says {entry.size:,}"
        raise damaged(entry.name, cause)


def _coverage(manifest: Manifest) -> list[MoeconvError]:
    """Check that each expert of each stack is there once, and totals and fingerprint match."""
    root = manifest.root
    try:
        recipes = {r.name: r for r in manifest_recipes(root)}
    except MoeconvError as problem:
        return [problem]
    if root.ep_size is None:
        problems = _all_experts(manifest, recipes)
    else:
        problems = _all_slots(manifest, tuple(recipes.values()))
    return problems + [damaged(ROOT_NAME, cause) for cause in contradictions(manifest)]


def _all_experts(manifest: Manifest, recipes: dict[str, Recipe]) -> list[MoeconvError]:
    """In an output that is not sharded, each matrix of each expert must be there once."""
    stacks = manifest.root.stacks
    held: Counter[str] = Counter()
    kinds: dict[int, set[tuple[str, str]]] = {}
    for part in manifest.parts:
        for tensor in part.tensors:
            held.update(addresses(tensor, stacks))
            if tensor.expert is not None:
                kinds.setdefault(tensor.expert.stack, set()).update(
                    (p, tensor.expert.component) for p in tensor.expert.projections
                )
    problems: list[MoeconvError] = []
    for number, stack in enumerate(stacks):
        recipe, there = recipes[stack.recipe], kinds.get(number, set())
        layout = recipe.layout(stack.layout)
        bare = [
            p
            for p in (layout.projections if layout else ())
            if not any((p, weight) in there for weight in recipe.weights)
        ]
        problems += _missing(stack, there | {(p, WEIGHT) for p in bare}, held)
    return problems


def _all_slots(manifest: Manifest, recipes: tuple[Recipe, ...]) -> list[MoeconvError]:
    """In an expert-parallel output, slots and names must be unique and replicas equal."""
    stored = {
        (part.file or str(part.rank), t.name): StoredTensor(
            t.name, t.dtype, t.shape, number, t.start, t.stop - t.start
        )
        for number, part in enumerate(manifest.parts)
        for t in part.tensors
    }
    if len(stored) != sum(len(p.tensors) for p in manifest.parts):
        return [damaged(ROOT_NAME, "a part names a tensor twice")]
    problems = [*_run_sizes(manifest), *_in_both(manifest)]
    try:
        found = detection_from_manifest(manifest, stored, recipes)
    except MoeconvError as problem:
        return [*problems, problem]
    return [*problems, *found.problems, *_without_weights(found)]


def _run_sizes(manifest: Manifest) -> list[MoeconvError]:
    """Check that runs are as long as their tensors: a virtual output has no header to check."""
    return [
        damaged(
            rank_part(part.rank, manifest.root.ep_size or 1),
            f"{quoted(t.name)} is {t.dtype} {list(t.shape)}, but its runs have {t.stop:,} bytes",
        )
        for part in manifest.parts
        if not part.file
        for t in part.tensors
        if t.dtype not in BITS or prod(t.shape) * BITS[t.dtype] != 8 * (t.stop - t.start)
    ]


def _in_both(manifest: Manifest) -> list[MoeconvError]:
    """Refuse names that are in the common files and in a rank's own: a rank reads both."""
    common = {t.name for p in manifest.parts if p.rank is None for t in p.tensors}
    return [
        damaged(
            rank_part(part.rank, manifest.root.ep_size or 1),
            f"{quoted(name)} is in the common files too",
        )
        for part in manifest.parts
        if part.rank is not None
        for name in sorted(common & {t.name for t in part.tensors})
    ]


def _without_weights(found: Detection) -> list[MoeconvError]:
    return [
        damaged(ROOT_NAME, f"{quoted(s.name)} has no weight for {p}")
        for s in found.stacks
        for p in s.layout.projections
        if not any(s.member(p, weight) for weight in s.recipe.weights)
    ]


def _missing(
    stack: StackEntry, kinds: set[tuple[str, str]], held: Counter[str]
) -> list[MoeconvError]:
    """Report the matrices of a stack that are missing or there twice."""
    # bounded by the matrices that exist: the manifest may claim any number of experts
    experts = range(min(stack.experts, held.total() + 1))
    missing = [
        address
        for projection, component in sorted(kinds)
        for expert in experts
        if held[address := matrix_address(stack.name, expert, projection, component)] != 1
    ]
    if not missing:
        return []
    return [
        MissingExpert(
            f"{quoted(stack.name)} is not complete",
            at=", ".join(map(quoted, missing[:_MAX_MISSING])),
            cause=f"{len(missing)} matrices are missing or duplicated",
            fix="convert the checkpoint again",
        )
    ]
