"""What a manifest tells of a stack's matrices, where shapes alone leave several readings open."""

from __future__ import annotations

from typing import TypeAlias

from moeconv.detect.interpretations import Reading
from moeconv.layout.axes import EXPERT, PAIR
from moeconv.layout.recipe import Layout
from moeconv.manifest.model import Manifest

# number of dimensions of a canonical matrix, by (stack, projection, component)
RecordedRanks: TypeAlias = dict[tuple[str, str, str], int]


def recorded_ranks(manifest: Manifest) -> RecordedRanks:
    """How many dimensions the canonical matrices of each kind have."""
    stacks = manifest.root.stacks
    return {
        (stacks[held.stack].name, projection, held.component): len(held.matrix)
        for part in manifest.parts
        for tensor in part.tensors
        if (held := tensor.expert) is not None
        for projection in held.projections
    }


def recorded_first(
    options: list[Reading], layout: Layout, stack: str, told: RecordedRanks
) -> list[Reading]:
    """The readings with those first that make of each component what is told.

    A grid of one block and one number look alike; nothing else says which of them it is.
    """
    sides = {line.template: line.projections[0] for line in layout.lines}

    def others(reading: Reading) -> int:
        ranks = {key: len(axes.letters - {EXPERT, PAIR}) for key, (_, axes) in reading.items()}
        return sum(
            told.get((stack, sides[template], name), rank) != rank
            for (template, name), rank in ranks.items()
        )

    return sorted(options, key=others)
