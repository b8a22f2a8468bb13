"""What a verification found: never an exception for damage, a list of it."""

from __future__ import annotations

from dataclasses import dataclass

from moeconv.errors import MoeconvError

STRUCTURE = "structure"
DIGEST = "digest"
SOURCE = "source"
LEVELS = (STRUCTURE, DIGEST, SOURCE)


@dataclass(frozen=True, slots=True)
class Report:
    """The answer of `verify`: yes where there are no problems; how much was looked at.

    warnings: what is odd and changes nothing, such as a README that was added.
    """

    level: str
    problems: tuple[MoeconvError, ...]
    files: int
    tensors: int
    bytes_read: int
    fingerprint: str | None
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything is as it should be."""
        return not self.problems
