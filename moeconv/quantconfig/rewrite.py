"""Sidecars that a conversion changes: those that name expert modules, where they do."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from moeconv.checkpoint.config import CONFIG_NAME, MAX_CONFIG_BYTES, QUANTIZATION
from moeconv.checkpoint.sidecars import Sidecar
from moeconv.checkpoint.source import Checkpoint
from moeconv.core.strict_json import may_escape
from moeconv.detect.stack import Stack
from moeconv.manifest.model import StackEntry
from moeconv.plan.model import Plan, Rewrite
from moeconv.store.documents import read_document

# the files that name modules, and whether all of a file is about quantisation
_DOCUMENTS: Final = ((CONFIG_NAME, False), ("hf_quant_config.json", True))


def with_rewrites(plan: Plan, checkpoint: Checkpoint, stacks: tuple[Stack, ...]) -> Plan:
    """The plan with all lists of expert modules in the names of the output.

    They start from the first source's files, so that no conversion builds on another.
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
        after, said = renamed_document(name, origin.get(name, now), renamings, inside=inside)
        notes += said
        if after != now:
            rewrites.append(Rewrite(name, now, after))
    return replace(plan, rewrites=tuple(rewrites), notes=(*plan.notes, *notes))


def is_rewritten(name: str) -> bool:
    """Whether conversions may change a sidecar of this name."""
    return any(name == document for document, _ in _DOCUMENTS)


def rewritten(
    name: str, first: bytes, stacks: tuple[Stack, ...], entries: tuple[StackEntry, ...]
) -> bytes:
    """What a sidecar of the first source becomes in an output whose manifest has these entries.

    stacks: all that the entries name, by the recipes to believe.
    """
    # a fifth of the start of a command, and most checkpoints need none of it
    from moeconv.quantconfig.modules import Renamings
    from moeconv.quantconfig.rename import renamed_document

    inside = dict(_DOCUMENTS)[name]
    return renamed_document(name, first, Renamings(stacks, entries), inside=inside)[0]


def _names_some(config: bytes | None) -> bool:
    """Whether a config.json may hold a list of modules: it would stand in one of these members."""
    if config is None:
        return False
    return may_escape(config) or any(section.encode() in config for section in QUANTIZATION)


def _restoring(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """The first source's sidecars again."""
    own = checkpoint.origin
    rewrites = []
    for name, raw in own.origin.sidecars if own else ():
        now = _read(checkpoint, name)
        if now is not None and now != raw:
            rewrites.append(Rewrite(name, now, raw))
    return replace(plan, rewrites=tuple(rewrites))


def _read(checkpoint: Checkpoint, name: str) -> bytes | None:
    """A sidecar's bytes; None where the output does not get it."""
    sidecar = next((s for s in checkpoint.sidecars if s.name == name), None)
    return None if sidecar is None else read_sidecar(sidecar)


def read_sidecar(sidecar: Sidecar) -> bytes:
    """The bytes of a document that conversions may change. Raises Malformed, IoFailed."""
    return read_document(sidecar.path, MAX_CONFIG_BYTES, name=sidecar.name)
