"""Rewrite the sidecars that name expert modules, in the names of the output."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from moeconv.checkpoint.config import CONFIG_NAME, MAX_CONFIG_BYTES
from moeconv.checkpoint.source import Checkpoint
from moeconv.core.strict_json import may_escape
from moeconv.detect.stack import Stack
from moeconv.layout.shipped import vocabulary
from moeconv.manifest.model import StackEntry
from moeconv.plan.model import Plan, Rewrite
from moeconv.store.base import File
from moeconv.store.documents import read_document

# the files that name modules, and whether all of a file is about quantization
_DOCUMENTS: Final = ((CONFIG_NAME, False), ("hf_quant_config.json", True))


def with_rewrites(plan: Plan, checkpoint: Checkpoint, stacks: tuple[Stack, ...]) -> Plan:
    """Add to a plan the sidecars with the output's module names.

    They are made from the first source's files, never from those of an earlier conversion.
    """
    if plan.restores:
        return _restoring(plan, checkpoint)
    own = checkpoint.origin
    origin = dict(own.origin.sidecars) if own else {}
    there = {sidecar.name for sidecar in checkpoint.sidecars}
    speaking = [
        (name, inside)
        for name, inside in _DOCUMENTS
        if name in there and (inside or name in origin or _names_some(_read(checkpoint, name)))
    ]
    if not speaking:
        return plan
    # a fifth of the start of a command, and most checkpoints need none of it
    from moeconv.quantconfig.modules import Renamings
    from moeconv.quantconfig.rename import renamed_document

    renamings = Renamings(stacks, plan.stacks)
    rewrites, notes = [], []
    for name, inside in speaking:
        concerned = renamings.changed or name in origin
        now = _read(checkpoint, name) if concerned else None
        if now is None:
            continue
        after, found = renamed_document(name, origin.get(name, now), renamings, inside=inside)
        notes += found
        if after != now:
            rewrites.append(Rewrite(name, now, after))
    return replace(plan, rewrites=tuple(rewrites), notes=(*plan.notes, *notes))


def is_rewritten(name: str) -> bool:
    """Whether conversions may change a sidecar of this name."""
    return any(name == document for document, _ in _DOCUMENTS)


def rewritten(
    name: str, first: bytes, stacks: tuple[Stack, ...], entries: tuple[StackEntry, ...]
) -> bytes:
    """A sidecar of the first source as an output with these entries has it.

    stacks: all that the entries name, with trusted recipes.
    """
    # a fifth of the start of a command, and most checkpoints need none of it
    from moeconv.quantconfig.modules import Renamings
    from moeconv.quantconfig.rename import renamed_document

    inside = dict(_DOCUMENTS)[name]
    return renamed_document(name, first, Renamings(stacks, entries), inside=inside)[0]


def _names_some(config: bytes | None) -> bool:
    """Whether a config.json may hold a list of modules: only these members have one."""
    if config is None:
        return False
    sections = vocabulary().quantization_sections.words
    return may_escape(config) or any(section.encode() in config for section in sections)


def _restoring(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """The plan with the first source's sidecars."""
    own = checkpoint.origin
    rewrites = []
    for name, raw in own.origin.sidecars if own else ():
        now = _read(checkpoint, name)
        if now is not None and now != raw:
            rewrites.append(Rewrite(name, now, raw))
    return replace(plan, rewrites=tuple(rewrites))


def _read(checkpoint: Checkpoint, name: str) -> bytes | None:
    """A sidecar's bytes; None where the output does not have it."""
    sidecar = next((s for s in checkpoint.sidecars if s.name == name), None)
    return None if sidecar is None else read_sidecar(sidecar)


def read_sidecar(sidecar: File) -> bytes:
    """The bytes of a document that conversions may change. Raises Malformed, IoFailed."""
    return read_document(sidecar, MAX_CONFIG_BYTES)
