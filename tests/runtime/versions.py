"""Versions of one model as outputs in several placements, and what a model holds of them."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from moeconv import runtime

EXPERTS, LAYERS, EP, HIDDEN, WIDTH = 4, 2, 2, 4, 2
STACKS = [f"model.layers.{n}.mlp.experts" for n in range(LAYERS)]
Row = tuple[int, ...]
OWN: Row = (0, 1, 2, 3, 0, 1)
OTHER: Row = (3, 1, 0, 2, 1, 3)
Whose = tuple[str, int, int]  # version, layer, expert


@dataclass
class Sets:
    """Versions of one model as sets by (version, placement); whose bytes are whose."""

    folder: Path
    owner: dict[bytes, Whose] = field(default_factory=dict)

    def open(self, version: str, row: Row = OWN) -> runtime.Shard:
        path = self.folder / f"{version}-{'own' if row == OWN else 'other'}"
        return runtime.open(path, ep_rank=0, ep_size=EP)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())


def held(model: nn.Module, sets: Sets) -> dict[str, list[set[Whose]]]:
    """Whose matrices are in each local slot of each stack."""
    slots = len(OWN) // EP
    found: dict[str, list[set[Whose]]] = {s: [set() for _ in range(slots)] for s in STACKS}
    size = 2 * HIDDEN * WIDTH
    for name, tensor in model.named_parameters():
        stack = next((s for s in STACKS if name.startswith(s)), None)
        if stack is None:
            continue
        number = name.removeprefix(f"{stack}.").split(".")[0]
        numbers = [int(number)] if number.isdecimal() else range(slots)
        data = raw(tensor)
        share = len(data) // len(numbers)
        for at, slot in enumerate(numbers):
            part = data[at * share : (at + 1) * share]
            for n in range(0, share, size):
                nobody = ("nobody", 0, 0)
                found[stack][slot].add(sets.owner.get(part[n : n + size], nobody))
    return found


def should(version: str, rows: dict[str, Row]) -> dict[str, list[set[Whose]]]:
    """What `held` finds where a model of rank 0 is right."""
    slots = len(OWN) // EP
    return {
        stack: [{(version, STACKS.index(stack), e)} for e in row[:slots]]
        for stack, row in rows.items()
    }
