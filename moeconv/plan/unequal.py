"""Gate and up that share a tensor but not a value: said once the digests are known.

A plan knows headers only; the digests of a finished set tell equal values without a read.
"""

from __future__ import annotations

from collections import defaultdict

from moeconv.core.text import counted
from moeconv.detect.stack import Stack
from moeconv.manifest.model import Manifest


def unequal_notes(stacks: tuple[Stack, ...], manifest: Manifest) -> tuple[str, ...]:
    """A line for each component whose recipe asks for it and whose gate and up differ."""
    asked = {
        (stack.name, m.component.name): m.component.unequal
        for stack in stacks
        for m in stack.members
        if m.component.unequal
    }
    differ: dict[tuple[str, str], int] = defaultdict(int)
    for tensor in (t for part in manifest.parts for t in part.tensors):
        expert = tensor.expert
        if expert is None or len(expert.projections) != 2 or not tensor.digests:
            continue
        why = asked.get((manifest.root.stacks[expert.stack].name, expert.component))
        if why:
            pairs = zip(tensor.digests[::2], tensor.digests[1::2], strict=True)
            differ[expert.component, why] += sum(gate != up for gate, up in pairs)
    return tuple(
        f"{component} of gate and up differ in {counted(count, 'expert')}, kept apart: {why}"
        for (component, why), count in differ.items()
        if count
    )
