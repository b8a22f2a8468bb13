"""Use the digests that the source's manifest records: check the source, skip hashing."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeconv.checkpoint.model import Checkpoint
from moeconv.engine.copy.sink import (
    LATER,
    TAKE,
    DigestPlan,
    Digests,
    DigestSource,
    known,
    take_all,
)
from moeconv.engine.manifest_writer import entry_of
from moeconv.errors import Damaged, quoted
from moeconv.manifest.model import Part, StackEntry, addresses
from moeconv.plan.model import OutputFile, Plan
from moeconv.store.base import File
from moeconv.store.documents import file_digest


@dataclass(frozen=True, slots=True)
class Recorded:
    """The digests that an output records: of units by address, of sidecars by name.

    complete: whether there is one for every unit. A foreign checkpoint records none.
    """

    source: str
    matrices: dict[str, str] = field(default_factory=dict)
    sidecars: dict[str, str] = field(default_factory=dict)
    complete: bool = False

    def refuse_edited(self, sidecars: tuple[File, ...]) -> None:
        """Read all sidecars and compare them with their digests. Raises Damaged, IoFailed."""
        for sidecar in sidecars:
            if sidecar.name in self.sidecars:
                self.check_sidecar(sidecar, file_digest(sidecar.path, name=sidecar.name))

    def check_sidecar(self, sidecar: File, value: str) -> None:
        """Raise Damaged if the digest of a sidecar is not the recorded one."""
        wanted = self.sidecars.get(sidecar.name)
        if wanted is not None and wanted != value:
            raise Damaged(
                f"{quoted(sidecar.name)} differs from the source's manifest",
                at=quoted(str(sidecar.path)),
                cause="its digest is not the recorded one: it was damaged or edited",
                fix=f"fetch it again, or leave it out with `--exclude '{sidecar.name}'`",
            )

    def contradicts(self, address: str, value: str) -> bool:
        """Return whether another digest is recorded, or none in an otherwise complete manifest."""
        wanted = self.matrices.get(address)
        return wanted != value and (wanted is not None or self.complete)

    def check_file(self, part: Part, digests: Digests, stacks: tuple[StackEntry, ...]) -> None:
        """Raise Damaged if the digest of a unit of an output file is not the recorded one.

        part: the file as it was written, with its tensors in the order of `digests`.
        """
        for tensor, row in zip(part.tensors, digests, strict=True):
            for address, value in zip(addresses(tensor, stacks), row, strict=True):
                if self.contradicts(address, value):
                    raise self._damaged(address, value, self.matrices.get(address))

    def _damaged(self, address: str, value: str, wanted: str | None) -> Damaged:
        return Damaged(
            f"{quoted(address)} differs from the source's manifest",
            at=quoted(self.source),
            cause=f"its digest is {value or 'unknown'}, the manifest records {wanted or 'none'}",
            fix="fetch the source again; `moeconv verify SRC` lists all the damage",
        )


def recorded(checkpoint: Checkpoint) -> Recorded:
    """Return what the source's own manifest records; nothing for a foreign checkpoint."""
    own = checkpoint.origin
    if own is None:
        return Recorded(checkpoint.store.address)
    manifest = own.manifest
    return Recorded(
        source=checkpoint.store.address,
        matrices={address: value for address, _, _, value in manifest.matrices()},
        sidecars={entry.name: entry.digest for entry in manifest.root.sidecars},
        complete=manifest.complete,
    )


class DigestPolicy:
    """Which digests a run takes, which it carries over from the source, and which it leaves out.

    later: leave digests to `verify --fill`. unchecked: restore an origin without comparing it with
    the recorded digests. Otherwise a restore takes every digest that is recorded, whatever `later`
    says and however the bytes are copied: nothing could tell afterwards.
    compares: whether written files are compared with the recorded digests.
    """

    def __init__(self, plan: Plan, recorded: Recorded, *, later: bool, unchecked: bool) -> None:
        self._recorded = recorded
        self._stacks = plan.stacks
        self._restores = plan.restores
        self._later = later
        self._all_later = unchecked or (later and not plan.restores)
        self.compares = not unchecked if plan.restores else not later

    def of_file(self, file: OutputFile) -> DigestPlan:
        """Return how each unit of an output file gets its digest."""
        if self._all_later:
            return lambda _tensor, _unit: LATER
        if not self._recorded.matrices:
            return (lambda _tensor, _unit: LATER) if self._later else take_all
        rows: dict[int, tuple[str | None, ...]] = {}

        def policy(tensor: int, unit: int) -> DigestSource:
            if tensor not in rows:
                names = addresses(entry_of(file.tensors[tensor]), self._stacks)
                rows[tensor] = tuple(map(self._recorded.matrices.get, names))
            value = rows[tensor][unit]
            if value is None:
                return LATER if self._later else TAKE
            return TAKE if self._restores else known(value)

        return policy
