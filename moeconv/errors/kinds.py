"""What every failure has in common, and the kinds that have an exit status each."""

from __future__ import annotations

from typing import ClassVar, Final

from moeconv.jsonvalue import Json
from moeconv.names import abridged, printable

_MAX_QUOTED: Final = 4096  # characters: names and paths are shorter


class MoeconvError(Exception):
    """A failure with a stable `code`, the process `exit_code`, and four short texts.

    message: what is wrong, one sentence without a full stop; at: file and tensor;
    cause: the facts, with numbers; fix: what the user can do.
    also: further problems found in the same pass over the same document.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 4

    def __init__(
        self,
        message: str,
        *,
        at: str | None = None,
        cause: str | None = None,
        fix: str | None = None,
        also: tuple[MoeconvError, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.at = at
        self.cause = cause
        self.fix = fix
        self.also = also

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.message}"]
        lines += [
            f"  {key}: {text}"
            for key, text in (("at", self.at), ("cause", self.cause), ("fix", self.fix))
            if text
        ]
        lines += [str(other) for other in self.also]
        return "\n".join(lines)

    def as_json(self) -> Json:
        """The same fields as one JSON object."""
        doc: dict[str, Json] = {
            "type": "error",
            "code": self.code,
            "exit_code": self.exit_code,
            "message": self.message,
            "at": self.at,
            "cause": self.cause,
            "fix": self.fix,
        }
        if self.also:
            doc["also"] = [other.as_json() for other in self.also]
        return doc

    def with_also(self, others: tuple[MoeconvError, ...]) -> MoeconvError:
        """This error, carrying the other problems of the same document."""
        self.also = others
        return self


def quoted(name: str) -> str:
    """A name out of a file, escaped and in backticks; the middle of a very long one is left out."""
    return f"`{printable(abridged(name, _MAX_QUOTED))}`"


class UsageProblem(MoeconvError):
    """Flags that do not go together, or a value that is not one."""

    code = "usage"
    exit_code = 2


class IoFailed(MoeconvError):
    """The operating system refused a read or a write."""

    code = "io"
    exit_code = 3


class Malformed(MoeconvError):
    """Input that breaks the rules of its own format."""

    code = "malformed"
    exit_code = 4


class Unsupported(MoeconvError):
    """Well-formed, but nothing that moeconv knows."""

    code = "unsupported"
    exit_code = 5


class WouldOverwrite(MoeconvError):
    """OUT is not empty."""

    code = "would-overwrite"
    exit_code = 6


class InternalError(MoeconvError):
    """A plan that fails its own proof: moeconv's fault, never the user's."""

    code = "internal"
    exit_code = 70
