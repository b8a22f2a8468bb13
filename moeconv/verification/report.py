"""What a verification found: never an exception for damage, a list of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final

from moeconv.core.text import counted
from moeconv.errors import Damaged, MoeconvError

STRUCTURE = "structure"
DIGEST = "digest"
SOURCE = "source"
LEVELS = (STRUCTURE, DIGEST, SOURCE)
MAX_REPORTED: Final = 1000


def bounded(problems: Iterable[MoeconvError]) -> tuple[MoeconvError, ...]:
    """The first of many problems, and one more that counts the others: nobody reads a million."""
    rest = iter(problems)
    first = tuple(islice(rest, MAX_REPORTED))
    more = sum(1 for _ in rest)
    if not more:
        return first
    return (
        *first,
        Damaged(
            f"{counted(more, 'more problem')}, not listed",
            cause=f"the first {MAX_REPORTED:,} are listed",
        ),
    )


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
