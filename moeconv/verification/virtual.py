"""Check a virtual output: its runs must be those that its source and its placement give."""

from __future__ import annotations

from moeconv.checkpoint.model import Checkpoint
from moeconv.checkpoint.output_files import damaged
from moeconv.detect.detect import Detection
from moeconv.engine.manifest_writer import virtual_parts
from moeconv.errors import DigestsMissing, MoeconvError, NotVirtual, quoted
from moeconv.manifest.model import PARTS_DIR, Manifest, Part, rank_part
from moeconv.plan.pack import Packing
from moeconv.plan.shard import Sharding, plan_shards


def virtual_problems(detection: Detection, manifest: Manifest) -> list[MoeconvError]:
    """Compare the parts of a virtual output with a new plan. Reads no data."""
    root = manifest.root
    entries = {s.name: s for s in root.stacks}
    targets, rows = {}, {}
    for stack in detection.stacks:
        entry = entries.get(stack.name)
        layout = stack.recipe.layout(entry.layout) if entry else None
        if entry is None or layout is None:
            return [damaged(PARTS_DIR, f"it does not have the stack {quoted(stack.name)}")]
        targets[stack.name] = layout
        if entry.physical_to_logical is not None:
            rows[stack.name] = entry.physical_to_logical
    try:
        plan = plan_shards(
            detection,
            Sharding(root.ep_size or 1, rows),
            targets,
            packing=Packing(1 << 62),
            origin_layouts={},
            virtual=True,
        )
    except NotVirtual as problem:
        return [damaged(f"{PARTS_DIR}/", f"its runs cannot be right: {problem.message}")]
    stated = _facts(manifest.parts)
    wanted = _facts(virtual_parts(plan.files, plan.stacks, {}))
    differing = sorted(
        key for key in stated.keys() | wanted.keys() if stated.get(key) != wanted.get(key)
    )
    return [
        damaged(
            rank_part(None if rank < 0 else rank, root.ep_size or 1),
            f"{quoted(name)} points to bytes that do not belong to its experts",
        )
        for rank, name in differing
    ]


def _facts(parts: tuple[Part, ...]) -> dict[tuple[int, str], object]:
    return {
        (-1 if part.rank is None else part.rank, t.name): (t.dtype, t.shape, t.expert, t.runs)
        for part in parts
        for t in part.tensors
    }


def digests_missing(manifest: Manifest, checkpoint: Checkpoint) -> DigestsMissing:
    """The error for an output without digests to compare the bytes with."""
    lacking = [t.name for p in manifest.parts for t in p.tensors if not t.digests]
    return DigestsMissing(
        "the output has no digests to verify",
        at=quoted(lacking[0]) if lacking else None,
        cause=f"{len(lacking):,} tensors have none: their bytes in "
        f"{quoted(checkpoint.store.address)} were never read",
        fix="`moeconv verify OUT --level source --source SRC --fill` compares, then adds them",
    )
