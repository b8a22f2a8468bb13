"""The report of a verification: damage is listed, not raised."""

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


def limit_problems(problems: Iterable[MoeconvError]) -> tuple[MoeconvError, ...]:
    """The first MAX_REPORTED problems, and one more that counts the others."""
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
class VerifyReport:
    """What `verify` found, and how much it read.

    warnings: what is unexpected but harmless, such as a README that was added.
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
        """Whether there are no problems."""
        return not self.problems
