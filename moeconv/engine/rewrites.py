"""Sidecars that a conversion changes: those that name expert modules, where they do."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Final

from moeconv.checkpoint.config import CONFIG_NAME, MAX_CONFIG_BYTES
from moeconv.checkpoint.quantlists import changed_lists
from moeconv.checkpoint.quanttexts import quant_methods, quant_texts
from moeconv.checkpoint.reading import read_document
from moeconv.checkpoint.source import Checkpoint
from moeconv.errors import quoted
from moeconv.layout.stack import Stack
from moeconv.plan.mentions import Mentions
from moeconv.plan.modules import Renamings
from moeconv.plan.unsure import is_unsure
from moeconv.plan.values import Plan, Rewrite

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
    renamings = Renamings(stacks, plan.stacks)
    rewrites, notes = [], []
    for name, inside in _DOCUMENTS:
        concerned = renamings.changed or name in origin
        now = _read(checkpoint, name) if concerned else None
        if now is None:
            continue
        after, said = reworded(name, origin.get(name, now), renamings, inside=inside)
        notes += said
        if after != now:
            rewrites.append(Rewrite(name, now, after))
    return replace(plan, rewrites=tuple(rewrites), notes=(*plan.notes, *notes))


def reworded(
    name: str, first: bytes, renamings: Renamings, *, inside: bool
) -> tuple[bytes, list[str]]:
    """A document in the new names, and what is to be said of it."""
    if not renamings.changed:
        return first, []
    try:
        document = json.loads(first)
        mentions = Mentions(renamings, quant_methods(document, inside=inside))
        after, unchanged = changed_lists(first, mentions.reworded, inside=inside)
        mentions.left(unchanged)
        said = list(quant_texts(document, inside=inside))
    except (ValueError, IndexError, RecursionError):
        return first, []  # no JSON, and nobody's list of modules
    notes = [f"{name}, `{p}`: {n:,} names of experts renamed" for p, n in mentions.renamed.items()]
    notes += [
        f"{name}, `{place}`: {count:,} names added, of experts that a pattern no longer means"
        for place, count in mentions.added.items()
    ]
    notes += [
        f"{name}, `{place}`: names some experts of a stack only, left as it is"
        for place in mentions.kept
    ]
    unsure = [(t.place, t.text) for t in said if is_unsure(mentions, t)]
    return after, notes + _left_notes(name, [*mentions.shifted, *unsure])


def _left_notes(name: str, pairs: list[tuple[str, str]]) -> list[str]:
    """What names experts, or may, in a way that is not rewritten."""
    left: dict[str, list[str]] = {}
    for place, text in dict.fromkeys(pairs):
        left.setdefault(place, []).append(text)
    return [
        f"{name}, `{place}`: {quoted(texts[0])}"
        + (f" and {len(texts) - 1:,} more" if texts[1:] else "")
        + " left as written: see whether the new names are still meant"
        for place, texts in left.items()
    ]


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
    if sidecar is None:
        return None
    return read_document(sidecar.path, MAX_CONFIG_BYTES, name=name)
