"""fuse and unfuse: a checkpoint in another layout. Nothing here prints or exits.

SRC is a directory, a `.safetensors` file, an output of moeconv, or `hf://org/name[@revision]`.
Every function raises a class of `moeconv.errors` for what a user can cause.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Unpack

from moeconv.api.open import Opened, open_source, uncollected
from moeconv.api.options import ConvertKeywords, WriteOptions
from moeconv.api.run import Result, carry_out
from moeconv.checkpoint.output import OutputDocuments
from moeconv.checkpoint.source import Checkpoint
from moeconv.core.system_errors import system_errors
from moeconv.detect.detect import detect
from moeconv.detect.interpretations import recorded_ranks
from moeconv.errors import NotASet, quoted
from moeconv.layout.shipped import manifest_recipes
from moeconv.manifest.model import ROOT_NAME
from moeconv.plan.convert import FUSE, UNFUSE, plan_conversion
from moeconv.plan.model import Plan
from moeconv.plan.onto_existing import plan_restore


@system_errors()
def fuse(src: str | Path, out: str | Path, **keywords: Unpack[ConvertKeywords]) -> Result:
    """Write SRC to OUT with every expert stack in its family's fused layout, or in `layout`.

    The keywords are those of `WriteOptions`.
    """
    options = WriteOptions(**keywords)
    source = open_for_writing(src, options)
    return carry_out(source, Path(out), planned(source, FUSE, options), options)


@system_errors()
def unfuse(
    src: str | Path,
    out: str | Path,
    *,
    unchecked: bool = False,
    **keywords: Unpack[ConvertKeywords],
) -> Result:
    """Write SRC to OUT per expert; an output of moeconv goes back to its original files instead.

    The original files are compared with the recorded digests (raises Damaged), unless `unchecked`.
    With `layout`, an output of moeconv is converted like any other checkpoint.
    The keywords are those of `WriteOptions`.
    """
    options = WriteOptions(unchecked=unchecked, **keywords)
    source = open_for_writing(src, options)
    if source.checkpoint.origin is not None and options.layout is None:
        plan = restored(source)
    else:
        plan = planned(source, UNFUSE, options)
    return carry_out(source, Path(out), plan, options)


def open_for_writing(src: str | Path, options: WriteOptions) -> Opened:
    """SRC, opened as the options say."""
    return open_source(
        src,
        recipe=options.recipe,
        from_layout=options.from_layout,
        exclude=options.exclude,
    )


@uncollected()
def planned(source: Opened, verb: str, options: WriteOptions) -> Plan:
    """The plan of a whole output in `options.layout`, or in what the verb means for each family."""
    return plan_conversion(
        source.detection.checked(),
        verb=verb,
        layout=options.layout,
        packing=options.packing(),
        origin_layouts=origin_layouts(source.checkpoint),
    )


def origin_layouts(checkpoint: Checkpoint) -> dict[str, str]:
    """For a set of ours, by stack: the layout of its first foreign source."""
    own = checkpoint.origin
    return {s.name: s.origin_layout for s in own.manifest.root.stacks} if own else {}


def refuse_foreign(source: Opened) -> OutputDocuments:
    """What is known of the origin. Raises NotASet for what is no set of moeconv."""
    own = source.checkpoint.origin
    if own is None:
        raise NotASet(
            f"{quoted(str(source.path))} was not written by moeconv",
            cause=f"it has no `{ROOT_NAME}`, so nothing says what it was made from",
            fix="`moeconv unfuse` splits the experts of any checkpoint",
        )
    return own


@uncollected()
def restored(source: Opened) -> Plan:
    """The plan of the origin, bit for bit. Raises NotASet."""
    own = refuse_foreign(source)
    tensors = tuple(t for f in own.origin.files for t in f.header.tensors)
    known = {s.name: replace(s, layout=s.origin_layout) for s in own.manifest.root.stacks}
    names = tuple(f.name for f in own.origin.files)
    recipes = manifest_recipes(own.manifest.root)
    ranks = recorded_ranks(own.manifest)
    original = detect(
        tensors, source.checkpoint.config, recipes, files=names, recorded=known, ranks=ranks
    )
    return plan_restore(source.detection.checked(), original.checked(), own.origin)
