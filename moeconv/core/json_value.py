"""JSON as a type, and an error as JSON."""

from __future__ import annotations

from typing import TypeAlias

from moeconv.errors import MoeconvError

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"


def error_json(problem: MoeconvError) -> dict[str, Json]:
    """The fields of an error as one JSON object; `also` where it carries further problems."""
    doc: dict[str, Json] = {
        "type": "error",
        "code": problem.code,
        "exit_code": problem.exit_code,
        "message": problem.message,
        "at": problem.at,
        "cause": problem.cause,
        "fix": problem.fix,
    }
    if problem.also:
        doc["also"] = [error_json(other) for other in problem.also]
    return doc
