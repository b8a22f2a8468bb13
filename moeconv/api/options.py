"""The options of the library's functions, each written once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypedDict

from moeconv.api.open import Opened, open_source
from moeconv.engine.options import Progress, RunOptions, WorkOptions, one_of
from moeconv.plan.align import ALIGNS, PAGE_ALIGNED
from moeconv.plan.pack import Packing

DEFAULT_SHARD_BYTES: Final = 5_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions(RunOptions):
    """All options of a writing verb; sizes are bytes.

    layout: the target, instead of the family's own. recipe, from_layout: what SRC is, where it
    does not say so itself. only_index: take exactly the tensors that SRC's index names.
    exclude: globs of files to leave out, of those that the index does not name. align: `page`,
    or `source` to make most of SRC clonable. progress: called with (bytes done, bytes in all),
    from workers.
    """

    layout: str | None = None
    recipe: str | Path | None = None
    from_layout: str | None = None
    only_index: bool = False
    exclude: tuple[str, ...] = ()
    max_shard_size: int = DEFAULT_SHARD_BYTES
    align: str = PAGE_ALIGNED

    def packing(self) -> Packing:
        """How tensors are packed into files. Raises UsageProblem."""
        return Packing(self.max_shard_size, one_of("--align", self.align, ALIGNS))

    def open(self, src: str | Path) -> Opened:
        """Open SRC with these options. Raises as `open_source`."""
        return open_source(
            src,
            recipe=self.recipe,
            from_layout=self.from_layout,
            exclude=self.exclude,
            only_index=self.only_index,
            with_data=not self.dry_run or self.resume,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions(WorkOptions):
    """All options of verify, diff and fingerprint; as in `WriteOptions`."""

    recipe: str | Path | None = None
    from_layout: str | None = None
    only_index: bool = False
    exclude: tuple[str, ...] = ()

    def open(self, src: str | Path) -> Opened:
        """Open a checkpoint with these options. Raises as `open_source`."""
        return open_source(
            src,
            recipe=self.recipe,
            from_layout=self.from_layout,
            only_index=self.only_index,
            exclude=self.exclude,
            with_data=True,
        )


class WriteKeywords(TypedDict, total=False):
    """`WriteOptions` as keywords, without those that not every function takes."""

    layout: str | None
    exclude: tuple[str, ...]
    max_shard_size: int
    align: str
    digests: str
    max_memory: int
    jobs: int | None
    overwrite: bool
    resume: bool
    dry_run: bool
    progress: Progress | None


class ConvertKeywords(WriteKeywords, total=False):
    """The keywords of a function that also reads checkpoints of others."""

    recipe: str | Path | None
    from_layout: str | None
    only_index: bool


class ReadKeywords(TypedDict, total=False):
    """`ReadOptions` as keywords."""

    recipe: str | Path | None
    from_layout: str | None
    only_index: bool
    exclude: tuple[str, ...]
    max_memory: int
    jobs: int | None
    progress: Progress | None
