"""What the manifest of a set records of its bytes, held against those that are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from moeconv.checkpoint.sidecars import Sidecar
from moeconv.checkpoint.source import Checkpoint
from moeconv.engine.copy.worker import Digests
from moeconv.errors import Damaged, quoted
from moeconv.manifest.model import Part, StackEntry, addresses
from moeconv.store.documents import file_digest


@dataclass(frozen=True, slots=True)
class Recorded:
    """The digests that a set records: of matrices and tensors by address, of sidecars by name.

    complete: whether there is one for every matrix and tensor. Of a foreign checkpoint there are
    none.
    """

    root: Path
    matrices: dict[str, str] = field(default_factory=dict)
    sidecars: dict[str, str] = field(default_factory=dict)
    complete: bool = False

    def refuse_edited(self, sidecars: tuple[Sidecar, ...]) -> None:
        """Read all sidecars and hold them against the record. Raises Damaged, IoFailed."""
        for sidecar in sidecars:
            if sidecar.name in self.sidecars:
                self.check_sidecar(sidecar, file_digest(sidecar.path, name=sidecar.name))

    def check_sidecar(self, sidecar: Sidecar, value: str) -> None:
        """Raise Damaged where the digest of a sidecar is not the recorded one."""
        wanted = self.sidecars.get(sidecar.name)
        if wanted is not None and wanted != value:
            raise Damaged(
                f"{quoted(sidecar.name)} is not what the source's manifest says",
                at=quoted(str(sidecar.path)),
                cause="its digest is another one: it was damaged, or edited",
                fix=f"fetch it again, or leave it out with `--exclude '{sidecar.name}'`",
            )

    def check_file(self, part: Part, digests: Digests, stacks: tuple[StackEntry, ...]) -> None:
        """Raise Damaged where the digest of a unit of an output file is not the recorded one.

        part: the file as it was written, its tensors in the order of `digests`.
        """
        for tensor, row in zip(part.tensors, digests, strict=True):
            for address, value in zip(addresses(tensor, stacks), row, strict=True):
                wanted = self.matrices.get(address)
                if wanted != value and (wanted is not None or self.complete):
                    raise self._damaged(address, value, wanted)

    def _damaged(self, address: str, value: str, wanted: str | None) -> Damaged:
        return Damaged(
            f"{quoted(address)} is not what the source's manifest says",
            at=quoted(str(self.root)),
            cause=f"its digest is {value or 'unknown'}, the manifest has {wanted or 'none'}",
            fix="fetch the set again; `moeconv verify SRC` lists all the damage",
        )


def recorded(checkpoint: Checkpoint) -> Recorded:
    """What the manifest of the set at hand records; nothing of a foreign checkpoint."""
    own = checkpoint.origin
    if own is None:
        return Recorded(checkpoint.root)
    manifest = own.manifest
    return Recorded(
        root=checkpoint.root,
        matrices={address: value for address, _, _, value in manifest.matrices()},
        sidecars={entry.name: entry.digest for entry in manifest.root.sidecars},
        complete=manifest.complete,
    )
