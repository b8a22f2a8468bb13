"""Reading an expert-parallel set with the stock safetensors parser, knowing nothing of plans."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from safetensors import deserialize

from tests.helpers import Spec
from tests.models import FAMILIES, Model
from tests.reference import Part, Parts, Place, stored

Rows: TypeAlias = dict[str, tuple[int, ...]]
_NAME = re.compile(
    r"(?:common|rank-(?P<rank>\d{5})-of-(?P<ranks>\d{5}))-(?P<n>\d{5})-of-(?P<of>\d{5})\.safetensors"
)


def tensors_by_rank(out: Path) -> dict[int | None, dict[str, Spec]]:
    """All tensors of the ranks' files, and under None those of the common ones."""
    found: dict[int | None, dict[str, Spec]] = {}
    for path in sorted(out.glob("*.safetensors")):
        if path.name == "consolidated.safetensors":  # a sidecar of some sources
            continue
        match = _NAME.fullmatch(path.name)
        assert match, path.name
        rank = None if match["rank"] is None else int(match["rank"])
        held = found.setdefault(rank, {})
        for name, facts in deserialize(path.read_bytes()):
            assert name not in held, f"{name} is twice on rank {rank}"
            held[name] = (facts["dtype"], tuple(facts["shape"]), bytes(facts["data"]))
    return found


def cut(parts: Parts, experts: Sequence[int]) -> Parts:
    """The matrices of these experts, in this order."""
    index = np.array(experts, dtype=np.int64)
    return {key: Part(p.dtype, p.letters, p.items[index]) for key, p in parts.items()}


def expected(model: Model, layout: str, rows: Rows, ep: int) -> dict[int | None, dict[str, Spec]]:
    """What each rank must hold: slot p of a stack's row is on rank p // (P / ep)."""
    out: dict[int | None, dict[str, Spec]] = {None: dict(model.others)}
    for rank in range(ep):
        out[rank] = {}
    for name, parts in model.stacks.items():
        places = [
            Place(p.name.replace("{s}", name), p.projections, p.component, p.axes)
            for p in FAMILIES[model.family].layouts[layout]
        ]
        row = rows.get(name)
        if row is None:
            out[None] |= stored(parts, places)
            continue
        share = len(row) // ep
        for rank in range(ep):
            out[rank] |= stored(cut(parts, row[rank * share : (rank + 1) * share]), places)
    return out


def experts_of(parts: Parts) -> int:
    """E of a stack."""
    return len(next(iter(parts.values())).items)
