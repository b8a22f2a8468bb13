"""One rank's view of an output: which tensors and experts it has, and where their bytes are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from moeconv.errors import GeometryMismatch, UsageProblem, quoted
from moeconv.placement.model import Given, by_stack
from moeconv.runtime.byte_runs import LocalTensor
from moeconv.runtime.expert_catalog import ExpertCatalog, new_rows, relocate
from moeconv.runtime.files import DataFile
from moeconv.runtime.open import LocatedTensor, OpenOutput, rank_tensors
from moeconv.runtime.validate import Rows
from moeconv.runtime.verify import check_digests


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class RankView:
    """What one rank has of an output: its tensors, and where their bytes are. Opens no file.

    verify: whether every byte that is read through it was held against the manifest before.
    """

    output: OpenOutput
    common: tuple[LocatedTensor, ...]
    own: tuple[LocatedTensor, ...]
    rows: Rows
    tensors: Mapping[str, LocalTensor]
    files: Mapping[int, DataFile]
    verify: bool = False

    def __repr__(self) -> str:
        size = f"{len(self.tensors):,} tensors"
        rank = f"{type(self).__name__} {self.ep_rank} of {self.ep_size}"
        return f"<{rank}: {size}, {str(self.output.path)!r}>"

    @property
    def ep_rank(self) -> int:
        """Which rank it is, from 0."""
        return self.output.rank

    @property
    def ep_size(self) -> int:
        """How many ranks share the experts."""
        return self.output.ep_size

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what `load()` gives."""
        return tuple(self.tensors)

    @property
    def stacks(self) -> tuple[str, ...]:
        """The names of the expert stacks."""
        return tuple(s.name for s in self.output.root.stacks)

    @property
    def placement(self) -> dict[str, tuple[int, ...]]:
        """The expert in each slot, [P], of each stack that the ranks share."""
        return {self.stacks[number]: row for number, row in self.rows.items()}

    def logical_experts(self, stack: str) -> tuple[int, ...]:
        """The expert in each of this rank's slots: [S]; all of a stack that every rank has whole.

        Raises UsageProblem.
        """
        if stack not in self.stacks:
            raise UsageProblem(
                f"{quoted(stack)} is not a stack of the output", fix="see `Shard.stacks`"
            )
        number = self.stacks.index(stack)
        row = self.rows.get(number)
        if row is None:
            return tuple(range(self.output.root.stacks[number].experts))
        share = len(row) // self.ep_size
        return row[self.ep_rank * share : (self.ep_rank + 1) * share]

    def check_placement(self, placement: Given) -> None:
        """Hold a caller's placement against the output's. Raises GeometryMismatch, BadPlacement."""
        have = self.placement
        other = []
        for name, row in by_stack(self.stacks, placement).items():
            experts = self.logical_experts(name)
            # a stack that is not shared is in the trivial placement of one rank
            if row != have.get(name, experts if self.ep_size == 1 else None):
                other.append(name)
        if other:
            raise GeometryMismatch(
                f"the output's placement differs from yours, in {len(other):,} stack(s)",
                at=quoted(str(self.output.path)),
                cause=f"{quoted(other[0])} is one of them",
                fix="shard again with your placement, or take the output's from `Shard.placement`",
            )

    @property
    def weights(self) -> object:
        """Identifies the weights: the fingerprint, or else the identity of the files."""
        if (fingerprint := self.output.root.fingerprint) is not None:
            return fingerprint
        used = {run.file for s in (*self.common, *self.own) for run in s.runs}
        return frozenset(self.files[number].identity for number in used)

    def verified(self) -> Self:
        """The same, its bytes held against their digests. Raises what `open` raises for it."""
        if self.verify:
            return self
        check_digests((*self.common, *self.own), self.output.root.stacks, self.files)
        return replace(self, verify=True)

    def rearranged(self, placement: Given) -> Self:
        """The same rank under a new placement, with the bytes of the experts that it moves here.

        Raises GeometryMismatch, BadPlacement, MissingShard, Damaged, SourceChanged, DigestsMissing.
        """
        rows = new_rows(self.output, self.rows, placement)
        catalog = ExpertCatalog(self.output, dict(self.files))
        own = relocate(catalog, self.own, rows)
        tensors = rank_tensors(self.output, self.common, own, rows)
        if self.verify:
            check_digests(catalog.fetched.values(), self.output.root.stacks, catalog.files)
        # `own` stays as the files have it: the next placement is found from there too
        return replace(self, rows=rows, tensors=tensors, files=catalog.files)
