"""Files filled from themselves: each unit read from where it is, to take its digest again."""

from __future__ import annotations

from moeconv.checkpoint.dtypes import BITS
from moeconv.checkpoint.header import StoredTensor
from moeconv.detect.stack import StoredComponent
from moeconv.layout.axes import EXPERT, IN, OUT, PAIR, Axes, Axis, geometry, parse_axes
from moeconv.layout.recipe import Component, Line
from moeconv.manifest.model import ExpertEntry
from moeconv.plan.model import OutputFile
from moeconv.plan.pack import output_file
from moeconv.plan.tensors import Draft, Woven, copied


def from_itself(stored: StoredTensor, expert: ExpertEntry | None) -> Draft:
    """A tensor as it stands; what the manifest says of it is enough, no recipe is asked."""
    if expert is None:
        return copied(stored)
    # sizes of a matrix are in granules already
    bare = Axes(tuple(tuple(Axis(a.letter) for a in dim) for dim in parse_axes(expert.axes).dims))
    inner: list[str] = [c for c in (OUT, IN) if c in bare.letters]
    inner += sorted(c for c in bare.letters if c.islower())
    sizes = dict(zip(inner, expert.matrix, strict=True))
    sizes |= {EXPERT: len(expert.experts), PAIR: len(expert.projections)}
    member = StoredComponent(
        line=Line(expert.projections, "{stack}", bare),
        component=Component(expert.component, bare, "", (bare,)),
        dtype=stored.dtype,
        axes=bare,
        geometry=geometry(bare, sizes),
        tensors=(stored,),
        places=tuple((0, position) for position in range(len(expert.experts))),
    )
    members = (member,) * len(expert.projections)
    keys = tuple(range(len(expert.experts)))
    woven = Woven(members, keys, bare, member.geometry, expert)
    nbytes = member.geometry.numel * BITS[stored.dtype] // 8
    return Draft(stored.name, stored.dtype, stored.shape, nbytes, None, woven)


def onto_itself(file: OutputFile, number: int) -> OutputFile:
    """A planned file as if it were the source, file `number` of it."""
    places = [
        (
            from_itself(
                StoredTensor(t.name, t.dtype, t.shape, number, t.offset, t.nbytes), t.expert
            ),
            t.offset,
        )
        for t in file.tensors
    ]
    return output_file(file.name, file.header, places, size=file.size, rank=file.rank)
