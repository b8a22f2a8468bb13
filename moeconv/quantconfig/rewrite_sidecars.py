"""Rewrite the sidecars that name expert modules, in the names of the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Final

from moeconv.checkpoint.config import CONFIG_NAME, MAX_CONFIG_BYTES
from moeconv.checkpoint.model import Checkpoint
from moeconv.core.strict_json import may_escape
from moeconv.detect.stack import Stack
from moeconv.errors import LfsPointer, Malformed
from moeconv.layout.shipped import vocabulary
from moeconv.manifest.model import StackEntry
from moeconv.plan.model import Plan, Rewrite
from moeconv.store.base import File
from moeconv.store.documents import read_document

_MAX_NAMING_BYTES: Final = 256 * 1024 * 1024  # a line for each tensor of a large model


@cache
def rewritten_documents() -> dict[str, bool]:
    """The files that name modules, and whether all of a file is about quantization."""
    return {CONFIG_NAME: False} | dict.fromkeys(vocabulary().quantization_documents.words, True)


def with_rewrites(plan: Plan, checkpoint: Checkpoint, stacks: tuple[Stack, ...]) -> Plan:
    """Add to a plan the sidecars with the output's module names.

    They are made from the first source's files, never from those of an earlier conversion.
    """
    own = checkpoint.origin
    origin = dict(own.origin.sidecars) if own else {}
    there = {sidecar.name: sidecar for sidecar in checkpoint.sidecars}
    names = origin if plan.restores else rewritten_documents()
    now: dict[str, bytes] = {}
    for name in names:
        with suppress(LfsPointer):  # copied as it is, with a warning
            now |= {name: read_sidecar(there[name])} if name in there else {}
    after, notes = origin, list[str]()
    if not plan.restores:
        first = {name: origin.get(name, raw) for name, raw in now.items()
                 if name in origin or rewritten_documents()[name] or _names_some(raw)}  # fmt: skip
        after, notes = renamed_documents(first, stacks, plan.stacks)
        notes += _stale_notes(there, stacks, plan.stacks)
    rewrites = tuple(
        Rewrite(name, raw, after[name]) for name, raw in now.items() if after.get(name, raw) != raw
    )
    return replace(plan, rewrites=rewrites, notes=(*plan.notes, *notes))


def _stale_notes(
    there: Mapping[str, File], stacks: tuple[Stack, ...], entries: tuple[StackEntry, ...]
) -> Iterator[str]:
    """Yield notes on documents with names of experts' tensors that the output does not have."""
    layouts = {entry.name: entry.layout for entry in entries}
    changed = [s.name.encode() for s in stacks if layouts.get(s.name) != s.layout.name]
    for name in vocabulary().naming_documents.words if changed else ():
        if name not in there:
            continue
        with suppress(LfsPointer, Malformed):  # warned of, or too large for such a document
            raw = read_document(there[name], _MAX_NAMING_BYTES)
            if any(stack in raw for stack in changed):
                yield (
                    f"{name} names experts as SRC has them and is copied as it is: programs that "
                    "look up tensors of the output there will not find them"
                )


def renamed_documents(
    documents: Mapping[str, bytes], stacks: tuple[Stack, ...], entries: tuple[StackEntry, ...]
) -> tuple[dict[str, bytes], list[str]]:
    """Sidecars of the first source as an output with these entries has them, and notes.

    stacks: all that the entries name, with trusted recipes.
    """
    if not documents:
        return {}, []
    # a fifth of the start of a command, and most checkpoints need none of it
    from moeconv.quantconfig.modules import Renamings
    from moeconv.quantconfig.rename_document import renamed_document

    renamings = Renamings(stacks, entries)
    after: dict[str, bytes] = {}
    notes: list[str] = []
    whole = rewritten_documents()
    for name, first in documents.items():
        after[name], found = renamed_document(name, first, renamings, inside=whole[name])
        notes += found
    return after, notes


def _names_some(config: bytes) -> bool:
    """Whether a config.json may hold a list of modules: only these members have one."""
    sections = vocabulary().quantization_sections.words
    return may_escape(config) or any(section.encode() in config for section in sections)


def read_sidecar(sidecar: File) -> bytes:
    """The bytes of a document that conversions may change. Raises Malformed, IoFailed."""
    return read_document(sidecar, MAX_CONFIG_BYTES)
