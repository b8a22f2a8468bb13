"""Plans and checkpoints as tables, lines and JSON; nothing here prints."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from moeconv.api.open import Opened
from moeconv.api.run import Result
from moeconv.checkpoint.header import StoredTensor
from moeconv.core.names import natural_key
from moeconv.core.strict_json import Json, error_json
from moeconv.core.text import LISTED, counted, human_size, listed
from moeconv.detect.stack import Stack
from moeconv.errors import printable
from moeconv.layout.shipped import vocabulary
from moeconv.manifest.model import Root

_LAYER = re.compile(r"(.*?)([0-9]+)((?:\.[^.0-9][^.]*)*)")
Rows = list[list[str]]


# --- plans -------------------------------------------------------------------------------------
def plan_table(result: Result) -> tuple[list[str], Rows]:
    """One row per output file."""
    rows = [
        [printable(f.name), f"{len(f.tensors):,}", f"{len(f.tiles):,}", human_size(f.size)]
        for f in result.plan.files
    ]
    return ["file", "tensors", "tiles", "size"], rows


def plan_summary(result: Result) -> list[str]:
    """Source, output and fingerprint, one line each; the last line is about disk space."""
    plan, source = result.plan, result.source.checkpoint
    verbs = Counter(entry.verb for entry in plan.ledger)
    counts = ", ".join(f"{count:,} {verb}" for verb, count in sorted(verbs.items()))
    lines = [
        f"source: {counted(len(source.files), 'file')}, "
        f"{counted(len(source.tensors), 'tensor')}, {human_size(source.tensor_bytes)} ({counts})",
        f"output: {counted(len(plan.files), 'file')}, "
        f"{counted(plan.tensor_count, 'tensor')}, {human_size(plan.tensor_bytes)}"
        + (", not written" if plan.virtual else "")
        + f"; {counted(len(source.sidecars), 'sidecar')} copied",
    ]
    if plan.ep_size is not None:
        lines.append(f"redundant experts: {human_size(plan.replica_bytes)} more than the source")
    if result.manifest is not None:
        value = result.manifest.root.fingerprint
        lines.append(f"fingerprint: {value or 'unknown until the data is read'}")
    space = result.disk_space
    short = "" if space.enough else ": NOT ENOUGH"
    sharing = f" ({human_size(space.shared)} of it can be cloned)" if space.shared else ""
    lines.append(
        f"disk: {human_size(space.needed)} needed{sharing}, {human_size(space.free)} free{short}"
    )
    return lines


def plan_document(verb: str, result: Result) -> Json:
    """A plan or its result as one JSON document."""
    plan, source = result.plan, result.source.checkpoint
    return {
        "type": "plan" if result.dry_run else "result",
        "verb": verb,
        "out": str(result.out),
        "restores_origin": plan.restores,
        "source": {
            "path": source.store.address,
            "files": len(source.files),
            "tensors": len(source.tensors),
            "bytes": source.tensor_bytes,
        },
        "output": {
            "files": [
                {
                    "name": f.name,
                    "rank": f.rank,
                    "size": f.size,
                    "tensors": [t.name for t in f.tensors],
                    "tiles": len(f.tiles),
                }
                for f in plan.files
            ],
            "tensors": plan.tensor_count,
            "bytes": plan.tensor_bytes,
            "replica_bytes": plan.replica_bytes,
            "ep_size": plan.ep_size,
            "virtual": plan.virtual,
        },
        "stacks": [
            {
                "name": s.name,
                "recipe": s.recipe,
                "layout": s.layout,
                "origin_layout": s.origin_layout,
                "experts": s.experts,
                "width": s.width,
                "hidden": s.hidden,
                "physical_to_logical": None
                if s.physical_to_logical is None
                else list(s.physical_to_logical),
            }
            for s in plan.stacks
        ],
        "ledger": [
            {
                "source": f.source,
                "fate": f.verb,
                "into": list(f.into),
                "bytes": f.nbytes,
                "added": f.added,
            }
            for f in plan.ledger
        ],
        "sidecars": [s.name for s in source.sidecars],
        "notes": list(plan.notes),
        "warnings": list(source.warnings),
        "disk": {
            "needed": result.disk_space.needed,
            "shared": result.disk_space.shared,
            "free": result.disk_space.free,
            "enough": result.disk_space.enough,
        },
        "fingerprint": result.manifest.root.fingerprint if result.manifest else None,
        "copying": _copying(result),
    }


def _copying(result: Result) -> Json:
    """How many bytes each copy method copied; None if nothing was."""
    methods = result.methods
    if methods is None:
        return None
    tally = methods.tally
    return {
        "methods": [*methods.names],
        "cloned": tally.cloned,
        "copied_in_kernel": tally.copied,
        "written": tally.written,
        "written_past_the_cache": tally.direct,
    }


def copying_lines(result: Result) -> list[str]:
    """How many bytes each copy method copied, and a flag that would have copied fewer."""
    methods = result.methods
    if methods is None or not methods.found:
        return []
    tally, total = methods.tally, result.plan.tensor_bytes
    lines = [
        f"{' and '.join(methods.names)}: {human_size(tally.cloned)} cloned, "
        f"{human_size(tally.copied)} copied in the kernel, {human_size(tally.written)} written, "
        f"{human_size(tally.direct)} written past the page cache"
    ]
    if methods.share_blocks and tally.cloned < total // 2 and result.aligned_to_page:
        lines.append("this file system can clone: `--align source` may copy almost nothing")
    return lines


# --- checkpoints -------------------------------------------------------------------------------
def checkpoint_lines(opened: Opened) -> list[str]:
    """The checkpoint as a whole: type, sizes, who wrote it."""
    checkpoint = opened.checkpoint
    config = checkpoint.config
    kind = printable(config.model_type) if config.model_type else "no model_type"
    lines = [
        f"{printable(checkpoint.store.address)}: {kind}, {counted(len(checkpoint.files), 'file')}, "
        f"{counted(len(checkpoint.tensors), 'tensor')}, {human_size(checkpoint.tensor_bytes)}"
    ]
    if checkpoint.origin is not None:
        root = checkpoint.origin.manifest.root
        lines.append(
            f"written by {printable(root.generator)}, "
            f"fingerprint {root.fingerprint or 'unknown: digests are missing'}"
        )
        lines += _sharding_lines(root)
    return lines


def _sharding_lines(root: Root) -> list[str]:
    if root.ep_size is None:
        return []
    slots = sorted({len(s.physical_to_logical) for s in root.stacks if s.physical_to_logical})
    shares = ", ".join(f"{n // root.ep_size} of {n}" for n in slots)
    lines = [f"expert-parallel: {counted(root.ep_size, 'rank')}, slots on each: {shares}"]
    if root.source is not None:
        lines.append(f"virtual: the bytes are in {printable(root.source.directory)}")
    return lines


def other_lines(opened: Opened) -> list[str]:
    """The tensors and files that belong to no stack."""
    others = opened.detection.others
    size = sum(t.nbytes for t in others)
    sidecars = opened.checkpoint.sidecars
    lines = [f"not experts: {counted(len(others), 'tensor')}, {human_size(size)}"]
    coupled = coupled_names(opened)
    if coupled:
        lines.append(f"routers and shared experts, copied as they are: {listed(coupled, most=12)}")
    if sidecars:
        names = [printable(s.name) for s in sidecars[:LISTED]]
        lines.append(f"sidecars: {listed(names, count=len(sidecars))}")
    return lines


def coupled_names(opened: Opened) -> list[str]:
    """Routers, shared experts and the like; each name once for all layers."""
    layers = {_split_layer(s.name)[:2] for s in opened.detection.stacks}
    found: dict[str, None] = {}
    beside = _beside_experts()
    for tensor in opened.detection.others:
        head, layer, tail = _split_layer(tensor.name)
        if (head, layer) in layers and beside.search(tail):
            found[printable(tail.removeprefix("."))] = None
    return sorted(found, key=natural_key)


def _beside_experts() -> re.Pattern[str]:
    names = vocabulary().beside
    words = "|".join(sorted(map(re.escape, names.words)))
    return re.compile("|".join([rf"[._](?:{words})(?:[._]|$)", *map(re.escape, names.parts)]))


def stack_table(stacks: tuple[Stack, ...]) -> tuple[list[str], Rows]:
    """One row for all stacks that differ only in their layer."""
    groups: dict[tuple[str, ...], list[tuple[int, Stack]]] = {}
    for stack in stacks:
        head, layer, tail = _split_layer(stack.name)
        key = (head, tail, *_traits(stack))
        groups.setdefault(key, []).append((layer, stack))
    rows = []
    for (head, tail, *traits), members in groups.items():
        layers = _ranges(layer for layer, _ in members)
        size = sum(t.nbytes for _, s in members for t in s.tensors)
        name = (
            printable(head) + (layers if len(members) == 1 else f"{{{layers}}}") + printable(tail)
        )
        rows.append([name, str(len(members)), *traits, human_size(size)])
    titles = ["stack", "layers", "E", "I", "H", "layout", "recipe", "components", "size"]
    return titles, rows


def _traits(stack: Stack) -> list[str]:
    sizes = stack.sizes
    found: dict[str, list[str]] = {}
    for member in stack.members:
        dtypes = found.setdefault(member.component.name, [])
        if member.dtype not in dtypes:
            dtypes.append(member.dtype)
    components = ", ".join(f"{name} {'/'.join(dtypes)}" for name, dtypes in found.items())
    return [
        str(sizes.experts),
        str(sizes.width),
        str(sizes.hidden),
        stack.layout.name,
        stack.recipe.name,
        components,
    ]


def _split_layer(name: str) -> tuple[str, int, str]:
    match = _LAYER.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else (name, 0, "")


def _ranges(numbers: Iterable[int]) -> str:
    """`0-47`, `3-61`, `0,4,8`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def tensor_table(tensors: Iterable[StoredTensor], files: tuple[str, ...]) -> tuple[list[str], Rows]:
    """One row per tensor, in natural order."""
    rows = [
        [
            printable(t.name),
            t.dtype,
            str(list(t.shape)),
            human_size(t.nbytes),
            printable(files[t.file]),
        ]
        for t in sorted(tensors, key=lambda t: natural_key(t.name))
    ]
    return ["tensor", "dtype", "shape", "size", "file"], rows


def checkpoint_document(opened: Opened, tensors: Iterable[StoredTensor] | None) -> Json:
    """`inspect` as one JSON document."""
    checkpoint, detection = opened.checkpoint, opened.detection
    doc: dict[str, Json] = {
        "type": "checkpoint",
        "path": checkpoint.store.address,
        "model_type": checkpoint.config.model_type,
        "files": [
            {"name": f.name, "size": f.size, "tensors": len(f.header.tensors)}
            for f in checkpoint.files
        ],
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.tensor_bytes,
        "stacks": [
            {
                "name": s.name,
                "recipe": s.recipe.name,
                "layout": s.layout.name,
                "experts": s.sizes.experts,
                "width": s.sizes.width,
                "hidden": s.sizes.hidden,
                "components": [
                    {
                        "projections": list(m.line.projections),
                        "component": m.component.name,
                        "dtype": m.dtype,
                        "axes": str(m.axes),
                        "shape": list(m.geometry.shape),
                    }
                    for m in s.members
                ],
                "bytes": sum(t.nbytes for t in s.tensors),
            }
            for s in detection.stacks
        ],
        "others": {
            "tensors": len(detection.others),
            "bytes": sum(t.nbytes for t in detection.others),
            "coupled": list(coupled_names(opened)),
        },
        "notes": list(detection.notes),
        "sidecars": [{"name": s.name, "size": s.size} for s in checkpoint.sidecars],
        "warnings": list(checkpoint.warnings),
        "problems": [error_json(p) for p in detection.problems],
        "fingerprint": checkpoint.manifest.root.fingerprint if checkpoint.manifest else None,
    }
    if tensors is not None:
        doc["listed"] = [
            {
                "name": t.name,
                "dtype": t.dtype,
                "shape": list(t.shape),
                "bytes": t.nbytes,
                "file": checkpoint.files[t.file].name,
            }
            for t in sorted(tensors, key=lambda t: natural_key(t.name))
        ]
    return doc
