"""A call of `os` with something before and after it, for tests that count, fail or interrupt."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def _nothing(*_: object) -> None:
    """Neither before nor after."""


def watched(real: Callable[P, T], look: Callable[P, object]) -> Callable[P, T]:
    """The call; look: called first with the same arguments, and may raise in its place."""

    def call(*args: P.args, **more: P.kwargs) -> T:
        look(*args, **more)
        return real(*args, **more)

    return call


def around(
    real: Callable[P, T],
    *,
    before: Callable[[], None] = _nothing,
    after: Callable[[T], None] = _nothing,
) -> Callable[P, T]:
    """The call; before: may raise in its place; after: gets what it gave."""

    def call(*args: P.args, **more: P.kwargs) -> T:
        before()
        result = real(*args, **more)
        after(result)
        return result

    return call
