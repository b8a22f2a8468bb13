"""fuse and unfuse: a checkpoint in another layout. Nothing here prints or exits.

SRC is a directory, a `.safetensors` file, a moeconv output, or `hf://org/name[@revision]`.
Every function raises a class of `moeconv.errors` for what a user can cause.
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from moeconv.api.open import Opened, gc_paused
from moeconv.api.options import ConvertKeywords, WriteOptions
from moeconv.api.run import Result, carry_out
from moeconv.checkpoint.model import Checkpoint
from moeconv.checkpoint.output import RecordedDocuments
from moeconv.core.system_errors import system_errors
from moeconv.detect.identify import identify_origin
from moeconv.errors import NotAnOutput, quoted
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
    source = options.open(src)
    return carry_out(source, Path(out), plan_whole(source, FUSE, options), options)


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
    source = options.open(src)
    if source.checkpoint.origin is not None and options.layout is None:
        plan = plan_original(source)
    else:
        plan = plan_whole(source, UNFUSE, options)
    return carry_out(source, Path(out), plan, options)


@gc_paused()
def plan_whole(source: Opened, verb: str, options: WriteOptions) -> Plan:
    """Plan a complete output in `options.layout`, or in the layout that `verb` means."""
    return plan_conversion(
        source.detection.checked(),
        verb=verb,
        layout=options.layout,
        packing=options.packing(),
        origin_layouts=origin_layouts(source.checkpoint),
    )


def origin_layouts(checkpoint: Checkpoint) -> dict[str, str]:
    """The layout of each stack in the first foreign source; empty if SRC is foreign itself."""
    own = checkpoint.origin
    return {s.name: s.origin_layout for s in own.manifest.root.stacks} if own else {}


def own_documents(source: Opened) -> RecordedDocuments:
    """The documents of an output of moeconv. Raises NotAnOutput for other checkpoints."""
    own = source.checkpoint.origin
    if own is None:
        raise NotAnOutput(
            f"{quoted(source.address)} was not written by moeconv",
            cause=f"it has no `{ROOT_NAME}`, so its original files are not known",
            fix="`moeconv unfuse` splits the experts of any checkpoint",
        )
    return own


@gc_paused()
def plan_original(source: Opened) -> Plan:
    """Plan the original files, bit for bit. Raises NotAnOutput."""
    own = own_documents(source)
    original = identify_origin(own, source.checkpoint.config)
    return plan_restore(source.detection.checked(), original.checked(), own.origin)
