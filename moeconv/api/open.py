"""Open a checkpoint: read its headers and find its expert stacks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moeconv.checkpoint.model import Checkpoint
from moeconv.checkpoint.source import locate, locate_headers, open_checkpoint
from moeconv.core.system_errors import system_errors
from moeconv.detect.detect import Detection
from moeconv.detect.identify import identify
from moeconv.layout.recipe import Recipe
from moeconv.layout.shipped import vocabulary


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint with its detected experts; `path` is the local SRC, None if it is elsewhere."""

    address: str
    path: Path | None
    checkpoint: Checkpoint
    recipes: tuple[Recipe, ...]
    detection: Detection


@contextmanager
def gc_paused() -> Iterator[None]:
    """Switch the garbage collector off: plans of half a million tensors have no cycles to find."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@system_errors()
@gc_paused()
def open_source(
    src: str | Path,
    *,
    recipe: str | Path | None = None,
    from_layout: str | None = None,
    exclude: tuple[str, ...] = (),
    only_index: bool = False,
    with_data: bool = False,
) -> Opened:
    """Read headers and detect the expert stacks; problems stay in `detection.problems`.

    An output of moeconv carries its own recipes and layouts: `recipe` and `from_layout` are not
    used for it. exclude: globs of files to leave out, of those that the index does not name.
    only_index: take exactly the tensors that the index names. with_data: download a repository on
    the Hub, since more than headers will be read.
    Raises UnknownFamily, BadRecipe, and what `open_checkpoint` raises.
    """
    place = locate(src) if with_data else locate_headers(src)
    checkpoint = open_checkpoint(
        place, exclude=exclude, only_index=only_index, beside=vocabulary().other_weights.words
    )
    recipes, detection = identify(checkpoint, recipe=recipe, from_layout=from_layout)
    path = place if isinstance(place, Path) else None
    return Opened(str(path or src), path, checkpoint, recipes, detection)
